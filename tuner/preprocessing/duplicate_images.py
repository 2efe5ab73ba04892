"""Equal pictures where there should be none: in two parts of a data set, or in two of its classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuner.preprocessing.image_decoding import PathOrPixels
from tuner.preprocessing.splits import SPLIT_NAMES

MAX_LISTED = 5  # pairs that a message names


def find_images_in_two_splits(
    pictures: Sequence[PathOrPixels], split: NDArray[np.int64], same: NDArray[np.int64]
) -> list[str]:
    """A warning where equal pictures lie in different parts, so that what trains also tests; none where there are none.

    `same`: pairs of rows, as `Store.same` has them.
    """
    parts = [SPLIT_NAMES[int(p)] for p in split]
    return _format_warning(pictures, parts, same, "parts", "so that scores may be too good")


def find_images_in_two_classes(
    pictures: Sequence[PathOrPixels],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    same: NDArray[np.int64],
) -> list[str]:
    """A warning where equal pictures lie in different classes; none where there are none."""
    names = [repr(classes[int(label)]) for label in labels]
    return _format_warning(
        pictures, names, same, "classes", "so that one of the two labels is wrong"
    )


def _format_warning(
    pictures: Sequence[PathOrPixels],
    homes: Sequence[str],
    same: NDArray[np.int64],
    what: str,
    why: str,
) -> list[str]:
    pairs = [(first, row) for row, first in same.tolist() if homes[row] != homes[first]]
    if not pairs:
        return []
    named = [
        f"{_name(pictures, first)} ({homes[first]}) and {_name(pictures, row)} ({homes[row]})"
        for first, row in pairs[:MAX_LISTED]
    ]
    more = f", and {len(pairs) - MAX_LISTED} more" if len(pairs) > MAX_LISTED else ""
    count = f"{len(pairs)} images lie" if len(pairs) > 1 else "1 image lies"
    return [f"data: {count} in two {what} with the same content, {why}: {'; '.join(named)}{more}"]


def _name(pictures: Sequence[PathOrPixels], row: int) -> str:
    picture = pictures[row]
    return str(picture) if isinstance(picture, Path) else f"number {row}"
