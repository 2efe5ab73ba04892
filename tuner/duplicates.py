"""The same picture in two parts of a data set: what was trained with would be tested with."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuner.decoding import Picture
from tuner.splits import PARTS

LISTED = 5  # pairs that a message names


def shared_between_parts(pictures: Sequence[Picture], part: NDArray[np.int64]) -> list[str]:
    """A warning where pictures of equal content lie in different parts; none where there are none.

    Only files of equal size are read. A file that cannot be read equals no other.
    """
    alike: dict[int, list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        alike[_size(picture)].append(i)
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    for rows in alike.values():
        if len({int(part[i]) for i in rows}) > 1:
            for i in rows:
                other = first.setdefault(_hash(pictures[i], i), i)
                if part[other] != part[i]:
                    pairs.append((other, i))
    if not pairs:
        return []
    named = [
        f"{_name(pictures, i)} ({PARTS[int(part[i])]}) and {_name(pictures, j)} ({PARTS[int(part[j])]})"
        for i, j in pairs[:LISTED]
    ]
    more = f", and {len(pairs) - LISTED} more" if len(pairs) > LISTED else ""
    count = f"{len(pairs)} images lie" if len(pairs) > 1 else "1 image lies"
    return [
        f"data: {count} in two parts with the same content, so that scores may be too good: {'; '.join(named)}{more}"
    ]


def _size(picture: Picture) -> int:
    if not isinstance(picture, Path):
        return picture.nbytes
    try:
        return picture.stat().st_size
    except OSError:
        return -1


def _hash(picture: Picture, row: int) -> bytes:
    try:
        content = (
            picture.read_bytes()
            if isinstance(picture, Path)
            else np.ascontiguousarray(picture).data
        )
    except OSError:
        return str(row).encode()
    return hashlib.sha256(content).digest()


def _name(pictures: Sequence[Picture], row: int) -> str:
    picture = pictures[row]
    return str(picture) if isinstance(picture, Path) else f"number {row}"
