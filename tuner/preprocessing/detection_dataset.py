"""Images with the boxes of what is on them: checked, brought to the model's canvas, split, and ready."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.config.run import ImageOptions
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec, InputSpec
from tuner.core.targets import NO_OBJECT, Boxes
from tuner.core.types import Dataset
from tuner.errors import DataError
from tuner.preprocessing.image_dataset import assemble_dataset
from tuner.preprocessing.image_store import ImageStore
from tuner.preprocessing.splits import SPLIT_NAMES, TRAIN, UNSPLIT, Items

MAX_LISTED = 10  # of a kind that a message names
STRATA = ("images with objects", "images without objects")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its objects. `boxes`: left, top, right, bottom in pixels, or in shares of the image's sides where `relative`.

    `labels` index the classes; `places` say where each object is written, as messages should name it. `size`: the image's width and
    height as the annotation has them.
    """

    path: Path
    boxes: Sequence[Box]
    labels: Sequence[int]
    locations: Sequence[str]
    split: int = UNSPLIT
    is_relative: bool = False
    stated_size: tuple[int, int] | None = None


def detection_dataset(
    home: Path,
    annotated: Sequence[AnnotatedImage],
    classes: Sequence[str],
    options: ImageOptions,
    input_spec: InputSpec,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Raises DataError on missing images, images named twice, no objects, empty or inverted boxes, and boxes beside their image."""
    _check_images_exist(annotated)
    if not any(image.labels for image in annotated):
        raise DataError(
            f"data: {len(annotated)} images, but not one object on them; check the annotations"
        )
    bare = sum(not image.labels for image in annotated)
    found = [
        *warnings,
        *([f"data: {bare} of {len(annotated)} images have no objects"] if bare else []),
    ]
    by_picture = {image.path: image for image in annotated}

    def truth(store: ImageStore, items: Items, preprocess: ImageInputSpec) -> Boxes:
        kept = [by_picture[picture] for picture in items.examples]
        return boxes_on_canvas(kept, store.original_sizes, preprocess, found)

    data = assemble_dataset(
        home, _make_items(annotated), options, input_spec, tuple(classes), truth
    )
    return replace(data, warnings=(*dict.fromkeys(found), *data.warnings))


def _check_images_exist(annotated: Sequence[AnnotatedImage]) -> None:
    missing = [str(image.path) for image in annotated if not image.path.is_file()]
    if missing:
        raise DataError(
            *limit_listing([f"{name}: there is no such image" for name in missing]),
            f"data: {len(missing)} images are missing",
        )
    counts: dict[Path, int] = defaultdict(int)
    for image in annotated:
        counts[image.path] += 1
    twice = [f"{name}: named {n} times" for name, n in counts.items() if n > 1]
    if twice:
        raise DataError(
            *limit_listing(twice),
            f"data: {len(twice)} images are named more than once; keep one of each",
        )


def _make_items(annotated: Sequence[AnnotatedImage]) -> Items:
    """Each part gets its share of images without objects, where there are enough of them to go round."""
    bare = np.array([not image.labels for image in annotated])
    labels = (
        bare.astype(np.int64)
        if bare.sum() > len(SPLIT_NAMES) and (~bare).sum() > len(SPLIT_NAMES)
        else np.zeros(len(bare), np.int64)
    )
    parts = np.array([image.split for image in annotated], np.int64)
    return Items(
        [image.path for image in annotated],
        labels,
        STRATA[: 1 + int(labels.max(initial=0))],
        parts,
    )


def unsplit_incomplete(given: NDArray[np.int64] | Sequence[int]) -> list[int]:
    """Parts as a data set states them; where it lacks one, that is taken from what trains."""
    parts = np.array(given, np.int64)
    if len(set(SPLIT_NAMES) - set(parts.tolist())) > 0:
        parts[parts == TRAIN] = UNSPLIT
    return [int(part) for part in parts]


def boxes_on_canvas(
    annotated: Sequence[AnnotatedImage],
    sizes: NDArray[np.int64],
    image_spec: ImageInputSpec,
    warnings: list[str],
) -> Boxes:
    """The boxes where their images lie on the model's canvas. What reaches beyond its image is clipped, with a warning.

    Raises DataError naming every box that is empty, inverted, not finite, or wholly beside its image.
    """
    wrong: list[str] = []
    clipped: list[str] = []
    stated: list[str] = []
    most = max(1, *(len(image.labels) for image in annotated))
    boxes = np.zeros((len(annotated), most, 4), np.float32)
    labels = np.full((len(annotated), most), NO_OBJECT, np.int64)
    for row, (image, (width, height)) in enumerate(zip(annotated, sizes.tolist(), strict=True)):
        if image.stated_size is not None and image.stated_size != (width, height) and image.labels:
            stated.append(
                f"{image.locations[0]}: the image is said to be {image.stated_size[0]} x {image.stated_size[1]} pixels, but is {width} x {height}"
            )
        at = place_on_canvas(width, height, image_spec)
        for i, (box, place) in enumerate(zip(image.boxes, image.locations, strict=True)):
            pixels = np.array(box) * (np.array([width, height] * 2) if image.is_relative else 1.0)
            problem = find_box_problem(pixels, width, height)
            if problem:
                wrong.append(f"{place}: {problem}")
                continue
            inside = pixels.clip(0, [width, height] * 2)
            if np.abs(inside - pixels).max() > 1:  # a pixel is what conventions differ by
                clipped.append(
                    f"{place}: box {_format_box(pixels)} reaches beyond its image of {width} x {height} pixels"
                )
            boxes[row, i] = (
                inside * ([at.width / width, at.height / height] * 2) + [at.left, at.top] * 2
            )
        labels[row, : len(image.labels)] = image.labels
    if wrong:
        raise DataError(
            *limit_listing(wrong), f"data: {len(wrong)} boxes are wrong; mend or remove them"
        )
    if clipped:
        warnings += [
            f"data: {len(clipped)} boxes reach beyond their image and are clipped",
            *limit_listing(clipped),
        ]
    if stated:
        warnings += [
            f"data: {len(stated)} images have another size than stated",
            *limit_listing(stated),
        ]
    return Boxes(torch.from_numpy(boxes), torch.from_numpy(labels), image_spec.size)


def find_box_problem(box: NDArray[np.float64], width: int, height: int) -> str:
    """What makes a box of pixels useless; '' where nothing does."""
    left, top, right, bottom = box.tolist()
    if not np.isfinite(box).all():
        return f"box {_format_box(box)} is not made of finite numbers"
    if right < left or bottom < top:
        return f"box {_format_box(box)} is inverted: left, top, right, bottom"
    if right == left or bottom == top:
        return f"box {_format_box(box)} is empty"
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        return f"box {_format_box(box)} lies wholly outside its image of {width} x {height} pixels"
    return ""


def _format_box(box: NDArray[np.float64]) -> str:
    return f"({', '.join(f'{side:g}' for side in box.tolist())})"


def check_relative_name(name: str, location: str) -> str:
    """A name of a file as an annotation states it. Raises DataError on one that leaves its folder, or that no file can have."""
    parts = name.replace("\\", "/").split("/")
    if (
        name.startswith(("/", "\\"))
        or ".." in parts
        or "\0" in name
        or not name.isprintable()
        or max(map(_bytes, parts)) > 255
    ):
        raise DataError(
            f"{location}: {name[:100]!r} leaves the folder of the images, or is no file's name; name files below it"
        )
    return name


def _bytes(part: str) -> int:
    return len(part.encode(errors="surrogatepass"))


def limit_listing(problems: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = [f"… and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return [*problems[:MAX_LISTED], *more]
