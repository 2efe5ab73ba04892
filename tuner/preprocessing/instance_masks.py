"""Draws the masks of objects on the canvas: from COCO's polygons and run lengths.

Objects that overlap lie in different layers, so that no pixel of a mask is lost, and a few layers
hold any number of masks.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_masks
from numpy.typing import NDArray

from tuner.core.geometry import Placement, place_on_canvas
from tuner.core.input_spec import ImageInputSpec
from tuner.errors import DataError
from tuner.preprocessing.image_decoding import PathOrPixels
from tuner.preprocessing.image_store import ImageDecoder
from tuner.preprocessing.mask_decoding import place_mask

Shape = Sequence[Sequence[float]] | Mapping[str, Any]
"""The mask of an object: polygons, each x, y, x, y, … of its corners; or run lengths as COCO writes
them, a mapping of size (height, width) and counts.
"""

Mask = NDArray[np.bool_]
MIN_NUMBERS = 6  # of a polygon: three corners
MAX_OBJECTS_OF_IMAGE = 254  # numbers of objects are in one byte, from 1


def find_shape_problem(shape: Any) -> str:
    """What is wrong with the mask of an object, or '' if nothing is."""
    if isinstance(shape, Mapping):
        size: Any = shape.get("size")
        counts: Any = shape.get("counts")
        if not _is_size(size) or not isinstance(counts, (str, list)):
            return "run lengths need size, [height, width], and counts"
        if isinstance(counts, list) and not _adds_up(counts, size):
            return f"counts of run lengths must add up to {size[0]} x {size[1]} pixels"
        return ""
    if not isinstance(shape, (list, tuple)) or not shape:
        return "needs a segmentation: polygons, or run lengths"
    for polygon in shape:
        if (
            not isinstance(polygon, (list, tuple))
            or len(polygon) < MIN_NUMBERS
            or len(polygon) % 2
            or not all(type(v) in (int, float) and abs(v) < 1e9 for v in polygon)
        ):
            return "a polygon of its segmentation needs x, y of three corners at least"
    return ""


def _is_size(size: Any) -> bool:
    return (
        isinstance(size, (list, tuple))
        and len(size) == 2
        and all(type(side) is int and 0 < side < 100_000 for side in size)
    )


def _adds_up(counts: list[Any], size: Sequence[int]) -> bool:
    return all(type(count) is int and count >= 0 for count in counts) and sum(counts) == (
        size[0] * size[1]
    )


def draw_shape(
    shape: Shape, width: int, height: int, image_spec: ImageInputSpec, *, is_relative: bool
) -> Mask:
    """The mask of an object on the canvas, bool (size, size).

    Args:
        shape: polygons or run lengths.
        width: the width of the image in pixels.
        height: the height of the image in pixels.
        image_spec: the canvas.
        is_relative: whether polygons are in shares of the image's sides.

    Raises:
        ValueError: run lengths are of an image of another size, or damaged.
    """
    side = image_spec.size
    if isinstance(shape, Mapping):
        return _draw_run_lengths(shape, width, height, image_spec)
    placement = place_on_canvas(width, height, image_spec)
    unit = (1, 1) if is_relative else (width, height)
    polygons = [_move_polygon(polygon, placement, unit) for polygon in shape]
    encoded = coco_masks.merge(coco_masks.frPyObjects(polygons, side, side))
    return decode_run_lengths(encoded)


def decode_run_lengths(shape: Mapping[str, Any]) -> Mask:
    """The mask that run lengths stand for, bool (height, width).

    Written out, as the library's own function needs the text form, and does not say what is wrong.

    Raises:
        ValueError: the counts do not add up to the size, or are no text of COCO's.
    """
    height, width = shape["size"]
    counts = shape["counts"]
    lengths = np.array(counts if isinstance(counts, list) else parse_counts(counts), np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(
            f"its run lengths add up to {lengths.sum()}, not to {width} x {height} pixels"
        )
    is_object = np.arange(len(lengths)) % 2 == 1
    return np.repeat(is_object, lengths).reshape(width, height).T  # columns come first


def parse_counts(text: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed text: groups of 5 bits and a sign, each from the third
    on as the difference from the one before the last; rleFrString in COCO's maskApi.c.

    Raises:
        ValueError: the text ends within a number.
    """
    codes = [code - 48 for code in (text.encode() if isinstance(text, str) else text)]
    counts: list[int] = []
    value, shift = 0, 0
    for code in codes:
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("its run lengths end within a number")
    return counts


def _move_polygon(
    polygon: Sequence[float], placement: Placement, unit: tuple[int, int]
) -> list[float]:
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    scale = [placement.width / unit[0], placement.height / unit[1]]
    moved: list[float] = (corners * scale + [placement.left, placement.top]).ravel().tolist()
    return moved


def _draw_run_lengths(
    shape: Mapping[str, Any], width: int, height: int, image_spec: ImageInputSpec
) -> Mask:
    if list(shape["size"]) != [height, width]:
        raise ValueError(
            f"its run lengths are of {shape['size'][1]} x {shape['size'][0]} pixels, but the image "
            f"has {width} x {height}"
        )
    mask = np.ascontiguousarray(decode_run_lengths(shape).astype(np.uint8))
    placed: Mask = place_mask(mask, (width, height), image_spec)[0] == 1
    return placed


def assign_layers(boxes: NDArray[np.float64]) -> list[int]:
    """A layer for each object, from 0: objects whose boxes overlap are in different layers.

    Args:
        boxes: float64 (k, 4), left, top, right, bottom of the masks.
    """
    layers: list[int] = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        before = boxes[:number]
        overlaps = (
            (before[:, 0] < right + 1)  # a pixel may belong to both edges
            & (before[:, 2] > left - 1)
            & (before[:, 1] < bottom + 1)
            & (before[:, 3] > top - 1)
        )
        taken = {layers[i] for i in np.flatnonzero(overlaps)}
        layers.append(next(layer for layer in range(len(taken) + 1) if layer not in taken))
    return layers


def shape_box(shape: Shape) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a mask, in the unit of its corners."""
    if isinstance(shape, Mapping):
        rows, columns = np.nonzero(decode_run_lengths(shape))
        if not len(rows):
            return 0.0, 0.0, 0.0, 0.0
        return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    corners = np.concatenate([np.array(polygon, np.float64).reshape(-1, 2) for polygon in shape])
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    return float(left), float(top), float(right), float(bottom)


def make_layers_decoder(
    shapes: Mapping[Path, Sequence[Shape]],
    sizes: Mapping[Path, tuple[int, int]],
    *,
    is_relative: bool,
) -> ImageDecoder:
    """A decoder that gives the masks of an image's objects: uint8 (layers, size, size), the number
    of the object whose pixel it is, from 1; 0: of none.

    Args:
        shapes: the masks of the objects of each image.
        sizes: width and height of each image in pixels.
        is_relative: whether polygons are in shares of the image's sides.

    Raises:
        DataError: an image has more objects than numbers, or run lengths are damaged.
    """
    too_many = [path for path, masks in shapes.items() if len(masks) > MAX_OBJECTS_OF_IMAGE]
    if too_many:
        raise DataError(
            f"data: {too_many[0]}: {len(shapes[too_many[0]])} objects; an image may have "
            f"{MAX_OBJECTS_OF_IMAGE} with masks (so do {len(too_many)} images); leave some out"
        )
    try:
        layers = {p: _layers_of(masks, sizes[p], is_relative) for p, masks in shapes.items()}
    except ValueError as error:
        raise DataError(f"data: the mask of an object: {error}; mend or remove it") from None
    count = 1 + max((layer for numbers in layers.values() for layer in numbers), default=0)

    def try_decode(picture: PathOrPixels, image_spec: ImageInputSpec) -> NDArray[np.uint8] | str:
        assert isinstance(picture, Path)
        canvas = np.zeros((count, image_spec.size, image_spec.size), np.uint8)
        pairs = zip(shapes[picture], layers[picture], strict=True)
        for number, (shape, layer) in enumerate(pairs, 1):
            try:
                mask = draw_shape(shape, *sizes[picture], image_spec, is_relative=is_relative)
            except (ValueError, TypeError) as error:
                return f"{picture}: object {number}: {error}"
            canvas[layer][mask] = number
        return canvas

    content = json.dumps([[list(sizes[path]), list(masks)] for path, masks in shapes.items()])
    return ImageDecoder(f"instances 1 {is_relative} {content}", count, try_decode)


def _layers_of(shapes: Sequence[Shape], size: tuple[int, int], is_relative: bool) -> list[int]:
    boxes = np.array([shape_box(shape) for shape in shapes], np.float64).reshape(-1, 4)
    return assign_layers(boxes * ([*size, *size] if is_relative else 1.0))
