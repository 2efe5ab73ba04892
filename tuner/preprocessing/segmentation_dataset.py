"""Masks: files with a class per pixel, checked, and laid on the model's canvas as their images are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuner.config.run import ImageOptions
from tuner.core.input_spec import ImageInputSpec, InputSpec
from tuner.core.targets import IGNORED, Masks
from tuner.core.types import Dataset
from tuner.errors import DataError, nearest_hint
from tuner.preprocessing.image_dataset import assemble_dataset
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.image_store import ImageStore, open_image_store
from tuner.preprocessing.mask_decoding import (
    MaskArray,
    make_colour_map,
    make_mask_decoder,
    place_mask,
    value_flags,
)
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID, Items

MAX_LISTED = 10  # masks that a message names
FLAGS_SPEC = ImageInputSpec(
    16, 16, "nearest", (0.0,) * 3, (1.0,) * 3
)  # a store of 16 x 16 = 256 flags: which values a mask has

MAX_ASPECT_DIFFERENCE = 0.01  # what the proportions of a mask may differ from its image's: rounding

ImageMaskPair = tuple[Path, Path]
"""An image and its mask."""
SizeByMask = Mapping[Path, tuple[int, int]]
"""Width and height by mask."""


@dataclass(frozen=True)
class MaskLegend:
    """What the values of masks mean. `ignore` is the value of pixels that count for nothing.

    `classes`: the names of the ids 0, 1, …; None: what is found. `colours`: of the classes, in order, where masks are painted in RGB.
    """

    classes: tuple[str, ...] | None = None
    ignore: int = IGNORED
    colours: tuple[str, ...] | None = None


def segmentation_dataset(
    home: Path,
    pairs: Sequence[ImageMaskPair],
    split: NDArray[np.int64],
    options: ImageOptions,
    input_spec: InputSpec,
    legend: MaskLegend,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Images with a mask each, split, decoded and ready.

    Raises DataError on unreadable files, masks of another shape than their image, unknown class ids, and a set of one class.
    """
    inks = make_colour_map(legend.colours, legend.classes)
    masks = [mask for _, mask in pairs]
    seen = open_image_store(
        home, masks, FLAGS_SPEC, options.on_bad_image, make_mask_decoder("flags", inks, value_flags)
    )
    pairs, split = [pairs[int(i)] for i in seen.readable], split[seen.readable]
    classes, ids = resolve_classes(
        seen.pixels.flatten(1).numpy().astype(bool), [mask for _, mask in pairs], legend
    )
    said = [*warnings, *seen.warnings, *_warn_jpeg(masks)]
    mask_of = dict(pairs)
    of_masks = {
        mask: (wide, high)
        for (_, mask), (wide, high) in zip(pairs, seen.original_sizes.tolist(), strict=True)
    }

    def truth(held: ImageStore, kept: Items, preprocess: ImageInputSpec) -> Masks:
        listed = [mask_of[image] for image in kept.examples]
        of_images = {
            mask: (wide, high)
            for mask, (wide, high) in zip(listed, held.original_sizes.tolist(), strict=True)
        }
        said.extend(_check_sizes(kept.examples, listed, of_images, of_masks))
        name = f"masks {ids.tobytes().hex()} {list(of_images.values())}"
        stored = open_image_store(
            home,
            listed,
            preprocess,
            "error",
            make_mask_decoder(
                name, inks, lambda mask, values, at: place_mask(ids[values], of_images[mask], at)
            ),
        )
        return Masks(stored.entry, stored.pixels[:, 0], stored.digest)

    items = Items([image for image, _ in pairs], np.zeros(len(pairs), np.int64), ("images",), split)
    return assemble_dataset(home, items, options, input_spec, classes, truth, said)


def resolve_classes(
    value_present: NDArray[np.bool_], masks: Sequence[Path], legend: MaskLegend
) -> tuple[tuple[str, ...], MaskArray]:
    """The classes, and the id of each value 0..255, from the values that each mask has (n, 256).

    Masks of 0 and one other value are binary, whatever the other is, unless more than two classes are named. Raises DataError.
    """
    values = np.flatnonzero(value_present.any(0)).tolist()
    names = legend.classes
    ids = np.arange(256, dtype=np.uint8)
    if len(values) == 2 and values[0] == 0 and values[1] > 1 and (names is None or len(names) == 2):
        ids[values[1]] = 1
        values, names = [0, 1], names or ("background", "foreground")
    else:
        ids[legend.ignore] = IGNORED
        values = [value for value in values if value != legend.ignore]
    if names is None and len(values) > 64 and max(values) > 200:
        raise DataError(
            f"data: the masks hold {len(values)} different values up to {max(values)}; two-valued masks with soft edges? "
            "save them without smoothing, or name data.classes"
        )
    names = names or tuple(str(value) for value in range(max(values, default=0) + 1))
    beyond = [value for value in values if value >= min(len(names), IGNORED)]
    if beyond:
        raise_data_error(
            [
                f"{mask}: class id {', '.join(map(str, np.flatnonzero(row & _value_mask(beyond))))}"
                for mask, row in _masks_having(masks, value_present, beyond)
            ],
            f"masks have ids beyond the {len(names)} classes {', '.join(names[:20])} (0 to {len(names) - 1}); "
            "name all of them in data.classes, or the id that counts for nothing in data.ignore",
        )
    if len(values) < 2:
        only = (
            f"only {names[values[0]]!r} (id {values[0]})"
            if values
            else "nothing but ignored pixels"
        )
        raise DataError(
            f"data: all {len(masks)} masks hold {only}; segmentation needs pixels of at least 2 classes"
        )
    return names, ids


def _value_mask(values: Sequence[int]) -> NDArray[np.bool_]:
    return np.isin(np.arange(256), values)


def _masks_having(
    masks: Sequence[Path], has: NDArray[np.bool_], values: Sequence[int]
) -> list[tuple[Path, NDArray[np.bool_]]]:
    return [
        (mask, row)
        for mask, row in zip(masks, has, strict=True)
        if (row & _value_mask(values)).any()
    ]


def raise_data_error(problems: Sequence[str], summary: str) -> None:
    """Raises DataError with the first of what was found, and how many there are."""
    listed = list(problems[:MAX_LISTED])
    if len(problems) > MAX_LISTED:
        listed.append(f"… and {len(problems) - MAX_LISTED} more")
    raise DataError(*listed, f"data: {len(problems)} {summary}")


def _check_sizes(
    images: Sequence[Path], masks: Sequence[Path], of_images: SizeByMask, of_masks: SizeByMask
) -> list[str]:
    """A warning where masks have their image's shape but another size. Raises DataError where they have another shape."""
    other = [
        (image, mask)
        for image, mask in zip(images, masks, strict=True)
        if of_images[mask] != of_masks[mask]
    ]
    said = [
        f"{mask}: {_format_size(of_masks[mask])} pixels, but {image} has {_format_size(of_images[mask])}"
        for image, mask in other
    ]
    wrong = [
        line
        for line, (_, mask) in zip(said, other, strict=True)
        if abs(_aspect(of_images[mask]) / _aspect(of_masks[mask]) - 1) > MAX_ASPECT_DIFFERENCE
    ]
    if wrong:
        raise_data_error(
            wrong,
            "masks have another shape than their image, and no pixel of one is a pixel of the other; make them anew",
        )
    return (
        [
            f"data: {len(other)} of {len(images)} masks have another size than their image, and are resized to it: {said[0]}"
        ]
        if other
        else []
    )


def _aspect(size: tuple[int, int]) -> float:
    return size[0] / size[1]


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _warn_jpeg(masks: Sequence[Path]) -> list[str]:
    count = sum(mask.suffix.lower() in (".jpg", ".jpeg") for mask in masks)
    if not count:
        return []
    return [
        f"data: {count} masks are JPEG, which blurs edges; they are read as two classes, parted at half brightness; save masks as PNG"
    ]


# -- the layout of Pascal VOC

VOC_CLASSES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, "
    "pottedplant, sheep, sofa, train, tvmonitor"
)
VOC_SPLITS = {"train": TRAIN, "val": VALID, "test": TEST}


def voc_segmentation_dataset(
    home: Path,
    root: Path,
    input_spec: InputSpec,
    options: ImageOptions,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Pascal VOC's folders for segmentation: JPEGImages, SegmentationClass (ids 0 to 20 by the palette, 255 for borders that count
    for nothing) and ImageSets/Segmentation/{train,val,test}.txt; without those lists every image that has a mask.

    `classes`: the names of the ids, background first; None: VOC's own. Raises DataError as `masked` does, and on what is missing.
    """
    images, masks = (
        list_images_by_stem(root / name, "JPEGImages and SegmentationClass")
        for name in ("JPEGImages", "SegmentationClass")
    )
    lists = {name: root / "ImageSets" / "Segmentation" / f"{name}.txt" for name in VOC_SPLITS}
    named = {
        name: path.read_text(encoding="utf-8", errors="replace").split()
        for name, path in lists.items()
        if path.is_file()
    }
    named = {
        name: stems for name, stems in named.items() if any(stem in masks for stem in stems)
    }  # VOC keeps its test masks to itself
    if "train" not in named:
        named = {"train": sorted(images.keys() & masks.keys())}
    missing = [
        f"{lists[name]}: {stem} has no {kind}"
        for name, stems in named.items()
        for stem in stems
        for kind, there in (("image in JPEGImages", images), ("mask in SegmentationClass", masks))
        if stem not in there
    ]
    if missing:
        raise_data_error(missing, "files are missing; add them, or take them off the list")
    pairs = [(images[stem], masks[stem]) for stems in named.values() for stem in stems]
    part = np.array([VOC_SPLITS[name] for name, stems in named.items() for _ in stems], np.int64)
    if {VALID, TEST} - set(part.tolist()):  # what is missing is taken from the training images
        part[part == TRAIN] = UNSPLIT
    return segmentation_dataset(
        home,
        pairs,
        part,
        options,
        input_spec,
        MaskLegend(tuple(classes or VOC_CLASSES.split(", "))),
    )


def list_images_by_stem(folder: Path, expected: str) -> dict[str, Path]:
    """The pictures in a folder and in those in it, by their path without its ending. Raises DataError."""
    if not folder.is_dir():
        beside = (
            [p.name for p in folder.parent.iterdir() if p.is_dir()]
            if folder.parent.is_dir()
            else []
        )
        raise DataError(
            f"data.path: {folder} is not a folder (looked in {Path.cwd()}); expected {expected}{nearest_hint(folder.name, beside)}"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if (
            path.suffix.lower() in SUFFIXES
            and not any(name.startswith(".") for name in inner.parts)
            and not path.is_dir()
        ):
            stem = str(inner.with_suffix(""))
            if stem in found:
                raise DataError(
                    f"data.path: {found[stem]} and {path} differ only in their ending; keep one"
                )
            found[stem] = path
    if not found:
        raise DataError(f"data.path: {folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return found
