"""Warns about images with equal content in two splits, or in two classes, of a dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuner.errors import limit_listing
from tuner.preprocessing.image_decoding import PathOrPixels
from tuner.preprocessing.splits import SPLIT_NAMES, examined_data

MAX_PAIRS_LISTED = 5  # pairs of images that a message names


def find_images_in_two_splits(
    images: Sequence[PathOrPixels], split: NDArray[np.int64], equal_rows: NDArray[np.int64]
) -> list[str]:
    """A warning if equal images lie in different splits, so that a training image is also a test.

    Args:
        images: the images (n).
        split: int64 (n,), the split of each image.
        equal_rows: int64 (k, 2), pairs of rows with equal pixels; `ImageStore.equal_rows`.

    Returns:
        One line, or none.
    """
    if examined_data() is not None:
        return []  # who examines the data tells all of them
    names = [SPLIT_NAMES[int(number)] for number in split]
    return _format_warning(images, names, equal_rows, "parts", "so that scores may be too good")


def find_images_in_two_classes(
    images: Sequence[PathOrPixels],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    equal_rows: NDArray[np.int64],
) -> list[str]:
    """A warning if equal images lie in different classes; arguments as above."""
    if examined_data() is not None:
        return []
    names = [repr(classes[int(label)]) for label in labels]
    return _format_warning(
        images, names, equal_rows, "classes", "so that one of the two labels is wrong"
    )


def _format_warning(
    images: Sequence[PathOrPixels],
    groups: Sequence[str],
    equal_rows: NDArray[np.int64],
    kind: str,
    consequence: str,
) -> list[str]:
    pairs = [
        f"{_name(images, first)} ({groups[first]}) and {_name(images, row)} ({groups[row]})"
        for row, first in equal_rows.tolist()
        if groups[row] != groups[first]
    ]
    if not pairs:
        return []
    count = f"{len(pairs)} images lie" if len(pairs) > 1 else "1 image lies"
    listed = "; ".join(limit_listing(pairs, MAX_PAIRS_LISTED))
    return [f"data: {count} in two {kind} with the same content, {consequence}: {listed}"]


def _name(images: Sequence[PathOrPixels], row: int) -> str:
    image = images[row]
    return str(image) if isinstance(image, Path) else f"number {row}"
