"""Makes a dataset of images with masks: checks the masks and moves them to the canvas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec, InputSpec
from tuner.core.targets import IGNORED, Masks
from tuner.core.types import Dataset
from tuner.errors import DataError, limit_listing, nearest_path_hint
from tuner.preprocessing.example_groups import with_groups
from tuner.preprocessing.image_dataset import assemble_dataset
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.image_files import warn_about_unread_files
from tuner.preprocessing.image_store import ImageStore, open_image_store, stored_pixels
from tuner.preprocessing.mask_decoding import (
    MaskArray,
    decode_mask,
    make_colour_map,
    make_mask_decoder,
    place_mask,
    resize_mask,
    value_flags,
)
from tuner.preprocessing.splits import SPLIT_NAMES, TEST, TRAIN, VALID, Items, read_split_lists

# a store of 16 x 16 = 256 flags: which values a mask has
FLAGS_SPEC = ImageInputSpec(16, 16, "nearest", (0.0,) * 3, (1.0,) * 3)

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe")
MAX_ASPECT_DIFFERENCE = 0.01  # of a mask's aspect ratio from its image's, by rounding

ImageMaskPair = tuple[Path, Path]
"""An image and its mask."""
SizeByMask = Mapping[Path, tuple[int, int]]
"""Width and height by mask."""


@dataclass(frozen=True)
class MaskLegend:
    """What the values of masks mean.

    Args:
        classes: the names of the ids 0, 1, …; None: the ids that occur.
        ignore: the value of pixels that belong to no class.
        colours: the colour of each class, in order, if masks are painted in RGB.
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
    groups: Sequence[str] = (),
) -> Dataset:
    """Split and decode images that have a mask each.

    Args:
        home: the folder with the caches.
        pairs: the images with their masks (n).
        split: int64 (n,), TRAIN, VALID, TEST or UNSPLIT for each pair.
        options: the image keys of the `data:` section.
        input_spec: how the examples must look for the model's weights.
        legend: what the values of the masks mean.
        warnings: what the data source has to say already.
        groups: the group of each pair (n); empty: each is a group of its own.

    Raises:
        DataError: files are unreadable, a mask has another aspect ratio than its image, a mask
            has an unknown class id, or all masks have one class.
    """
    colour_map = make_colour_map(legend.colours, legend.classes)
    masks = [mask for _, mask in pairs]
    flags_decoder = make_mask_decoder("flags", colour_map, value_flags)
    flags = open_image_store(home, masks, FLAGS_SPEC, options.on_bad_image, flags_decoder)
    pairs, split = [pairs[int(i)] for i in flags.readable], split[flags.readable]
    groups = [groups[int(i)] for i in flags.readable] if groups else ()
    classes, ids = resolve_classes(
        stored_pixels(flags).flatten(1).numpy().astype(bool), [mask for _, mask in pairs], legend
    )
    mask_of_image = dict(pairs)
    mask_sizes = _size_by_mask([mask for _, mask in pairs], flags)

    def make_targets(
        images: ImageStore, readable: Items, image_spec: ImageInputSpec
    ) -> tuple[Masks, list[str]]:
        own_masks = [mask_of_image[image] for image in readable.examples]
        image_sizes = _size_by_mask(own_masks, images)
        size_warnings = _check_sizes(readable.examples, own_masks, image_sizes, mask_sizes)

        def transform(mask: Path, values: MaskArray, canvas: ImageInputSpec) -> MaskArray:
            return place_mask(ids[values], image_sizes[mask], canvas)

        name = f"masks {ids.tobytes().hex()} {list(image_sizes.values())}"
        decoder = make_mask_decoder(name, colour_map, transform)
        store = open_image_store(home, own_masks, image_spec, "error", decoder)

        def read_original(row: int) -> torch.Tensor:
            mask = own_masks[row]
            original = ids[decode_mask(mask, colour_map)]
            return torch.from_numpy(resize_mask(original, image_sizes[mask]))

        return Masks(
            store.entry, stored_pixels(store)[:, 0], store.digest, read_original
        ), size_warnings

    items = Items([image for image, _ in pairs], np.zeros(len(pairs), np.int64), ("images",), split)
    items = with_groups(items, groups)
    all_warnings = [*warnings, *flags.warnings, *_warn_jpeg(masks)]
    data = assemble_dataset(home, items, options, input_spec, classes, make_targets, all_warnings)
    _check_counted_pixels(data, legend)
    return data


def _check_counted_pixels(data: Dataset, legend: MaskLegend) -> None:
    """Raise DataError where all pixels of a split are ignored: nothing is learnt or scored there.

    Of most splits one mask is read.
    """
    for split, source in ((TRAIN, data.train), (VALID, data.valid), (TEST, data.test)):
        masks = (source.take(row, 0).y for row in torch.split(torch.arange(len(source)), 1))
        if not any(isinstance(mask, torch.Tensor) and (mask != IGNORED).any() for mask in masks):
            raise DataError(
                f"data: all pixels of the {len(source)} {SPLIT_NAMES[split]} masks are ignored "
                f"(the value {legend.ignore}, data.ignore), or outside of what the model sees; "
                "mend these masks, or divide the images in another way"
            )


def _size_by_mask(masks: Sequence[Path], store: ImageStore) -> SizeByMask:
    """Width and height, in pixels, that the store has for the file of each mask."""
    sizes = store.original_sizes.tolist()
    return {mask: (width, height) for mask, (width, height) in zip(masks, sizes, strict=True)}


def resolve_classes(
    value_present: NDArray[np.bool_], masks: Sequence[Path], legend: MaskLegend
) -> tuple[tuple[str, ...], MaskArray]:
    """Find out the classes of masks and which value stands for which class.

    Masks of 0 and one more value are binary, whatever that value is, unless more than two classes
    are named, or the user ignores one of the two.

    Args:
        value_present: bool (n, 256), which values each mask has.
        masks: the files of the masks (n), for messages.
        legend: what the user says about the values.

    Returns:
        The names of the classes; and the class id of each value, uint8 (256,).

    Raises:
        DataError: a value has no class, or all masks have one class.
    """
    values = np.flatnonzero(value_present.any(0)).tolist()
    names = legend.classes
    ids = np.arange(256, dtype=np.uint8)
    is_binary = len(values) == 2 and values[0] == 0 and values[1] > 1
    ignores_either = legend.ignore in values and legend.ignore != IGNORED  # only a user says so
    if is_binary and not ignores_either and (names is None or len(names) == 2):
        ids[values[1]] = 1
        values, names = [0, 1], names or ("background", "foreground")
    else:
        ids[legend.ignore] = IGNORED
        values = [value for value in values if value != legend.ignore]
    if names is None and len(values) > 64 and max(values) > 200:
        raise DataError(
            f"data: the masks hold {len(values)} different values up to {max(values)}; "
            "two-valued masks with soft edges? save them without smoothing, or name data.classes"
        )
    names = names or tuple(str(value) for value in range(max(values, default=0) + 1))
    beyond = [value for value in values if value >= min(len(names), IGNORED)]
    if beyond:
        raise_data_error(
            [
                f"{mask}: class id {', '.join(map(str, np.flatnonzero(row & _value_mask(beyond))))}"
                for mask, row in _masks_having(masks, value_present, beyond)
            ],
            f"masks have ids beyond the {len(names)} classes {', '.join(names[:20])} "
            f"(0 to {len(names) - 1}); name all of them in data.classes, "
            "or the id that counts for nothing in data.ignore",
        )
    if len(values) < 2:
        only = (
            f"only {names[values[0]]!r} (id {values[0]})"
            if values
            else "nothing but ignored pixels"
        )
        ignored = f" beside the ignored {legend.ignore} (data.ignore)" if ignores_either else ""
        raise DataError(
            f"data: all {len(masks)} masks hold {only}{ignored}; "
            "segmentation needs pixels of at least 2 classes"
        )
    return names, ids


def _value_mask(values: Sequence[int]) -> NDArray[np.bool_]:
    return np.isin(np.arange(256), values)


def _masks_having(
    masks: Sequence[Path], value_present: NDArray[np.bool_], values: Sequence[int]
) -> list[tuple[Path, NDArray[np.bool_]]]:
    return [
        (mask, row)
        for mask, row in zip(masks, value_present, strict=True)
        if (row & _value_mask(values)).any()
    ]


def raise_data_error(problems: Sequence[str], summary: str) -> None:
    """Raise DataError with the first problems and their number."""
    raise DataError(*limit_listing(problems), f"data: {len(problems)} {summary}")


def _check_sizes(
    images: Sequence[Path],
    masks: Sequence[Path],
    image_sizes: SizeByMask,
    mask_sizes: SizeByMask,
) -> list[str]:
    """A warning if masks have another size than their image.

    Raises:
        DataError: masks have another aspect ratio than their image.
    """
    resized, misshapen = [], []
    for image, mask in zip(images, masks, strict=True):
        image_size, mask_size = image_sizes[mask], mask_sizes[mask]
        if image_size == mask_size:
            continue
        line = f"{mask}: {_format_size(mask_size)} pixels, but {image} has "
        resized.append(line + _format_size(image_size))
        if abs(_aspect_ratio(image_size) / _aspect_ratio(mask_size) - 1) > MAX_ASPECT_DIFFERENCE:
            misshapen.append(resized[-1])
    if misshapen:
        raise_data_error(
            misshapen,
            "masks have another shape than their image, and no pixel of one is a pixel of the "
            "other; make them anew",
        )
    if not resized:
        return []
    return [
        f"data: {len(resized)} of {len(images)} masks have another size than their image, "
        f"and are resized to it: {resized[0]}"
    ]


def _aspect_ratio(size: tuple[int, int]) -> float:
    return size[0] / size[1]


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _warn_jpeg(masks: Sequence[Path]) -> list[str]:
    count = sum(mask.suffix.lower() in JPEG_SUFFIXES for mask in masks)
    if not count:
        return []
    return [
        f"data: {count} masks are JPEG, which blurs edges; they are read as two classes, "
        "parted at half brightness; save masks as PNG"
    ]


# -- the layout of Pascal VOC

VOC_CLASSES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, "
    "dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)


def voc_segmentation_dataset(
    home: Path,
    root: Path,
    input_spec: InputSpec,
    options: ImageOptions,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """A dataset from Pascal VOC's folders for segmentation.

    They are JPEGImages, SegmentationClass (ids 0 to 20 by the palette, 255 for ignored borders) and
    ImageSets/Segmentation with train.txt, val.txt and test.txt. Without these lists every image
    that has a mask is taken.

    Args:
        home: the folder with the caches.
        root: the folder that holds these folders.
        input_spec: how the examples must look for the model's weights.
        options: the image keys of the `data:` section.
        classes: the names of the ids, background first; None: VOC's own.

    Raises:
        DataError: a listed image or its mask is missing, or as `segmentation_dataset` does.
    """
    expected = "JPEGImages and SegmentationClass"
    images = list_images_by_stem(root / "JPEGImages", expected)
    masks = list_images_by_stem(root / "SegmentationClass", expected)
    lists = {
        split: (file, stems)
        for split, (file, stems) in read_split_lists(root / "ImageSets" / "Segmentation").items()
        if any(stem in masks for stem in stems)  # VOC does not publish its test masks
    }
    if TRAIN not in lists:
        lists = {TRAIN: (root, sorted(images.keys() & masks.keys()))}
    missing = [
        f"{file}: {stem} has no {kind}"
        for file, stems in lists.values()
        for stem in stems
        for kind, files in (("image in JPEGImages", images), ("mask in SegmentationClass", masks))
        if stem not in files
    ]
    if missing:
        raise_data_error(missing, "files are missing; add them, or take them off the list")
    pairs = [(images[stem], masks[stem]) for _, stems in lists.values() for stem in stems]
    split = np.array([split for split, (_, stems) in lists.items() for _ in stems], np.int64)
    legend = MaskLegend(tuple(classes or VOC_CLASSES.split(", ")))
    warnings = warn_about_unread_files([root / "JPEGImages", root / "SegmentationClass"])
    return segmentation_dataset(home, pairs, split, options, input_spec, legend, warnings)


def list_images_by_stem(folder: Path, expected: str) -> dict[str, Path]:
    """The images below a folder, by their path in it without the ending.

    Args:
        folder: the folder.
        expected: what the user should have there, for the message.

    Raises:
        DataError: there is no such folder, it has no images, or two differ only in their ending.
    """
    if not folder.is_dir():
        hint = nearest_path_hint(folder, folders_only=True)
        raise DataError(
            f"data.path: {folder} is not a folder (looked in {Path.cwd()}); "
            f"expected {expected}{hint}"
        )
    images: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if (
            path.suffix.lower() in SUFFIXES
            and not any(name.startswith(".") for name in inner.parts)
            and not path.is_dir()
        ):
            stem = str(inner.with_suffix(""))
            if stem in images:
                raise DataError(
                    f"data.path: {images[stem]} and {path} differ only in their ending; keep one"
                )
            images[stem] = path
    if not images:
        raise DataError(
            *warn_about_unread_files([folder]),
            f"data.path: {folder} holds no images ({', '.join(sorted(SUFFIXES))})",
        )
    return images
