"""Makes a dataset of images with boxes: checks the boxes and moves them to the canvas."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.config.data_options import ImageOptions
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec, InputSpec
from tuner.core.targets import NO_OBJECT, Boxes, InstanceMasks, Targets, ignored_label
from tuner.core.types import Dataset
from tuner.errors import DataError, count_words, limit_listing
from tuner.preprocessing.example_groups import with_groups
from tuner.preprocessing.image_dataset import assemble_dataset
from tuner.preprocessing.image_files import warn_about_unread_files
from tuner.preprocessing.image_store import ImageStore, open_image_store, stored_pixels
from tuner.preprocessing.instance_masks import Shape, make_layers_decoder
from tuner.preprocessing.splits import SPLIT_NAMES, UNSPLIT, Items

MAX_EMPTY_SHARE = 0.01  # of the boxes that may be empty, and are dropped
STRATA = ("images with objects", "images without objects")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its objects, as an annotation describes them.

    Args:
        path: the image file.
        boxes: left, top, right, bottom of each object: in pixels, or in shares of the image's
            sides if `is_relative`.
        labels: the index of each object's class.
        locations: where each object is written, such as `file:line`; messages name it.
        split: TRAIN, VALID, TEST or UNSPLIT.
        is_relative: whether the boxes are in shares of the image's sides, 0 to 1.
        stated_size: width and height of the image in pixels according to the annotation.
        ignored_boxes: areas in which detections of a class do not count, such as crowds.
        ignored_labels: the index of the class of each ignored area.
        shapes: the mask of each object, where the annotation has masks.
        ignored_shapes: the mask of each ignored area.
        group: the name of the image's group; of all images, or of none.
    """

    path: Path
    boxes: Sequence[Box]
    labels: Sequence[int]
    locations: Sequence[str]
    split: int = UNSPLIT
    is_relative: bool = False
    stated_size: tuple[int, int] | None = None
    ignored_boxes: Sequence[Box] = ()
    ignored_labels: Sequence[int] = ()
    shapes: Sequence[Shape] = ()
    ignored_shapes: Sequence[Shape] = ()
    group: str | None = None


def detection_dataset(
    home: Path,
    annotated: Sequence[AnnotatedImage],
    classes: Sequence[str],
    options: ImageOptions,
    input_spec: InputSpec,
    warnings: Sequence[str] = (),
    *,
    with_masks: bool = False,
) -> Dataset:
    """Split and decode annotated images, and move their boxes to the model's canvas.

    Args:
        home: the folder with the caches.
        annotated: the images with their objects.
        classes: the names of the classes that the labels index.
        options: the image keys of the `data:` section.
        input_spec: how the examples must look for the model's weights.
        warnings: what the data source has to say already.
        with_masks: whether the objects have masks, which are targets too.

    Raises:
        DataError: images are missing or are named twice, there are no objects at all, a box is
            inverted or wholly outside its image, or more than a few boxes are empty.
    """
    _check_images_exist(annotated)
    annotated, empty_warnings = drop_empty_boxes(annotated)
    if not any(image.labels for image in annotated):
        raise DataError(
            f"data: {len(annotated)} images, but not one object on them; check the annotations"
        )
    warnings = [*warnings, *empty_warnings]
    empty_count = sum(not image.labels for image in annotated)
    if empty_count:
        warnings.append(f"data: {empty_count} of {len(annotated)} images have no objects")
    by_path = {image.path: image for image in annotated}

    def make_targets(
        store: ImageStore, items: Items, image_spec: ImageInputSpec
    ) -> tuple[Targets, list[str]]:
        readable = [by_path[path] for path in items.examples]
        boxes, box_warnings = boxes_on_canvas(readable, store.original_sizes, image_spec)
        if not with_masks:
            return boxes, box_warnings
        return _draw_masks(home, readable, store, boxes, image_spec), box_warnings

    return assemble_dataset(
        home, _make_items(annotated), options, input_spec, tuple(classes), make_targets, warnings
    )


def _draw_masks(
    home: Path,
    annotated: Sequence[AnnotatedImage],
    store: ImageStore,
    boxes: Boxes,
    image_spec: ImageInputSpec,
) -> InstanceMasks:
    """The masks of the objects of all images, drawn once and kept in the cache."""
    sizes = {
        image.path: (width, height)
        for image, (width, height) in zip(annotated, store.original_sizes.tolist(), strict=True)
    }
    shapes = {
        image.path: [*image.shapes, *_shapes_of_kept_areas(image, *sizes[image.path])]
        for image in annotated
    }
    decoder = make_layers_decoder(shapes, sizes, is_relative=annotated[0].is_relative)
    masks = open_image_store(home, list(shapes), image_spec, "error", decoder)
    return InstanceMasks(boxes, masks.entry, stored_pixels(masks), masks.digest)


def _shapes_of_kept_areas(image: AnnotatedImage, width: int, height: int) -> list[Shape]:
    """The masks of the ignored areas that `boxes_on_canvas` keeps, in their order."""
    unit = np.array([width, height] * 2) if image.is_relative else np.ones(4)
    return [
        shape
        for box, shape in zip(image.ignored_boxes, image.ignored_shapes, strict=True)
        if not find_box_problem(np.array(box) * unit, width, height)
    ]


def _check_images_exist(annotated: Sequence[AnnotatedImage]) -> None:
    missing = [image.path for image in annotated if not image.path.is_file()]
    if missing:
        raise DataError(
            *limit_listing([f"{path}: there is no such image" for path in missing]),
            *warn_about_unread_files({path.parent for path in missing}),
            f"data: {count_words(len(missing), 'image is', 'images are')} missing",
        )
    counts: dict[Path, int] = defaultdict(int)
    for image in annotated:
        counts[image.path] += 1
    twice = [f"{name}: named {n} times" for name, n in counts.items() if n > 1]
    if twice:
        raise DataError(
            *limit_listing(twice),
            f"data: {count_words(len(twice), 'image is', 'images are')} named more than once; "
            "keep one of each",
        )


def drop_empty_boxes(
    annotated: Sequence[AnnotatedImage],
) -> tuple[Sequence[AnnotatedImage], list[str]]:
    """The images without objects whose box has no width or no height; a warning names these.

    Published sets have a few of these: two of the 860,001 boxes of COCO's train2017.

    Raises:
        DataError: they are MAX_EMPTY_SHARE of all boxes or more.
    """
    empty = [
        f"{location}: box ({', '.join(f'{side:g}' for side in box)}) is empty"
        for image in annotated
        for box, location in zip(image.boxes, image.locations, strict=True)
        if _is_empty(box)
    ]
    if not empty:
        return annotated, []
    total = sum(len(image.boxes) for image in annotated)
    if len(empty) >= MAX_EMPTY_SHARE * total:
        raise DataError(
            *limit_listing(empty),
            f"data: {len(empty)} of {total} boxes have no width or no height; fewer than "
            f"{MAX_EMPTY_SHARE:.0%} would be left out; are the columns in the right order? "
            "mend or remove them",
        )
    cleaned = [_without_empty_boxes(image) for image in annotated]
    return cleaned, _warn_about(empty, "boxes have no width or no height and are left out")


def _is_empty(box: Box) -> bool:
    left, top, right, bottom = box
    return left == right or top == bottom


def _without_empty_boxes(image: AnnotatedImage) -> AnnotatedImage:
    kept = [i for i, box in enumerate(image.boxes) if not _is_empty(box)]
    if len(kept) == len(image.boxes):
        return image
    return replace(
        image,
        boxes=[image.boxes[i] for i in kept],
        labels=[image.labels[i] for i in kept],
        locations=[image.locations[i] for i in kept],
        shapes=[image.shapes[i] for i in kept] if image.shapes else (),
    )


def _make_items(annotated: Sequence[AnnotatedImage]) -> Items:
    """The images as items. Images with and without objects are the strata, if both are enough."""
    is_empty = np.array([not image.labels for image in annotated])
    enough = min(is_empty.sum(), (~is_empty).sum()) > len(SPLIT_NAMES)
    labels = is_empty.astype(np.int64) if enough else np.zeros(len(is_empty), np.int64)
    items = Items(
        [image.path for image in annotated],
        labels,
        STRATA[: 1 + int(labels.max(initial=0))],
        np.array([image.split for image in annotated], np.int64),
    )
    return with_groups(items, [image.group for image in annotated if image.group is not None])


def boxes_on_canvas(
    annotated: Sequence[AnnotatedImage], sizes: NDArray[np.int64], image_spec: ImageInputSpec
) -> tuple[Boxes, list[str]]:
    """Move boxes to where their images lie on the model's canvas.

    Args:
        annotated: the images with their objects.
        sizes: int64 (n, 2), width and height in pixels of each image.
        image_spec: the canvas.

    Returns:
        The boxes, and warnings: boxes that reach beyond their image are clipped with a warning, and
        those of which no width or no height is left are left out with one.

    Raises:
        DataError: boxes are inverted, not finite, or wholly outside their image. The message
            names each of them. Ignored areas of this kind are left out.
    """
    problems: list[str] = []
    clipped: list[str] = []
    lost: list[str] = []
    most = max(1, *(len(image.labels) + len(image.ignored_labels) for image in annotated))
    boxes = np.zeros((len(annotated), most, 4), np.float32)
    labels = np.full((len(annotated), most), NO_OBJECT, np.int64)
    for row, (image, (width, height)) in enumerate(zip(annotated, sizes.tolist(), strict=True)):
        placement = place_on_canvas(width, height, image_spec)
        scale = np.array([placement.width / width, placement.height / height] * 2)
        shift = np.array([placement.left, placement.top] * 2)
        unit = np.array([width, height] * 2) if image.is_relative else np.ones(4)
        labels[row, : len(image.labels)] = image.labels
        for i, (box, location) in enumerate(zip(image.boxes, image.locations, strict=True)):
            pixels = np.array(box) * unit
            problem = find_box_problem(pixels, width, height)
            if problem:
                problems.append(f"{location}: {problem}")
                continue
            inside = pixels.clip(0, [width, height] * 2)
            if np.abs(inside - pixels).max() > 1:  # annotation conventions differ by one pixel
                clipped.append(
                    f"{location}: box {_format_box(pixels)} reaches beyond "
                    f"its image of {width} x {height} pixels"
                )
            boxes[row, i] = inside * scale + shift
            if _is_empty(boxes[row, i].tolist()):  # what is left is less than a rounding
                boxes[row, i], labels[row, i] = 0, NO_OBJECT
                lost.append(f"{location}: box {_format_box(pixels)}")
        row_after = len(image.labels)
        for box, label in zip(image.ignored_boxes, image.ignored_labels, strict=True):
            pixels = np.array(box) * unit
            if not find_box_problem(pixels, width, height):
                boxes[row, row_after] = pixels.clip(0, [width, height] * 2) * scale + shift
                labels[row, row_after] = ignored_label(label)
                row_after += 1
    if problems:
        raise DataError(
            *limit_listing(problems), f"data: {len(problems)} boxes are wrong; mend or remove them"
        )
    warnings = _warn_about(clipped, "boxes reach beyond their image and are clipped")
    warnings += _warn_about(
        lost, "boxes have no width or no height inside of their image and are left out"
    )
    warnings += _warn_about(
        _find_size_mismatches(annotated, sizes), "images have another size than stated"
    )
    return Boxes(torch.from_numpy(boxes), torch.from_numpy(labels), image_spec.size), warnings


def _find_size_mismatches(
    annotated: Sequence[AnnotatedImage], sizes: NDArray[np.int64]
) -> list[str]:
    """One line for each image with objects whose annotation states another size than it has."""
    return [
        f"{image.locations[0]}: the image is said to be {image.stated_size[0]} x "
        f"{image.stated_size[1]} pixels, but is {width} x {height}"
        for image, (width, height) in zip(annotated, sizes.tolist(), strict=True)
        if image.labels and image.stated_size not in (None, (width, height))
    ]


def _warn_about(problems: Sequence[str], summary: str) -> list[str]:
    """`data: N summary`, then the first of the problems; nothing if there are none."""
    return [f"data: {len(problems)} {summary}", *limit_listing(problems)] if problems else []


def find_box_problem(box: NDArray[np.float64], width: int, height: int) -> str:
    """What makes a box useless, or '' if nothing does.

    Args:
        box: float64 (4,): left, top, right, bottom in pixels.
        width: the width of the image in pixels.
        height: the height of the image in pixels.
    """
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
    """The name of an image file, as an annotation at `location` states it.

    Raises:
        DataError: the name leaves the folder of the images, or no file can have it.
    """
    parts = name.replace("\\", "/").split("/")
    if (
        name.startswith(("/", "\\"))
        or ".." in parts
        or "\0" in name
        or not name.isprintable()
        or max(map(_byte_length, parts)) > 255
    ):
        raise DataError(
            f"{location}: {name[:100]!r} leaves the folder of the images, or is no file's name; "
            "name files below it"
        )
    return name


def _byte_length(name: str) -> int:
    return len(name.encode(errors="surrogatepass"))
