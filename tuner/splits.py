"""What a source of images lists, and which part of it trains, validates and tests: by its folders, or by a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tuner.decoding import Picture
from tuner.errors import DataError
from tuner.run import ImageOptions

TRAIN, VALID, TEST, UNSPLIT = 0, 1, 2, -1
PARTS = {TRAIN: "training", VALID: "validation", TEST: "test"}


@dataclass(frozen=True)
class Items:
    """`labels` index `classes`; `part` is TRAIN, VALID, TEST or UNSPLIT; both hold one entry a picture."""

    pictures: Sequence[Picture]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    part: NDArray[np.int64]

    def rows(self, rows: NDArray[np.int64]) -> "Items":
        """The items at these places."""
        return replace(self, pictures=[self.pictures[int(i)] for i in rows], labels=self.labels[rows], part=self.part[rows])


def divided(items: Items, options: ImageOptions) -> Items:
    """Every item in a part, and at most `limit` of each. Raises DataError on too few classes or images."""
    checked(items)
    return limited(split(items, options), options)


def checked(items: Items) -> None:
    counts = np.bincount(items.labels, minlength=len(items.classes))
    if len(items.classes) < 2:
        found = f"found {len(items.classes)} ({', '.join(map(repr, items.classes))})" if items.classes else "found none"
        raise DataError(f"data: classification needs at least 2 classes, {found}")
    if (counts == 0).any():
        empty = ", ".join(repr(c) for c, n in zip(items.classes, counts, strict=True) if n == 0)
        raise DataError(f"data: classes with 0 images: {empty}; add images or remove the folders")


def split(items: Items, options: ImageOptions) -> Items:
    """UNSPLIT items become train, valid and test, each class in proportion, by the seed."""
    part = items.part.copy()
    shares = {p: share for p, share in ((VALID, options.valid), (TEST, options.test)) if not (part == p).any()}
    few = []
    for label, name in enumerate(items.classes):
        free = np.flatnonzero((items.labels == label) & (part == UNSPLIT))
        if len(free) == 0:
            continue
        if len(free) <= len(shares):
            few.append(f"{name!r} has {len(free)}")
            continue
        order = np.random.default_rng([options.seed, label]).permutation(free)
        for p, share in shares.items():
            count = min(max(1, round(len(free) * share)), len(order) - 1)
            part[order[:count]] = p
            order = order[count:]
        part[order] = TRAIN
    if few:
        raise DataError(
            f"data: each class needs at least {len(shares) + 1} images to be split, but {', '.join(few)}; "
            "add images or give the parts as folders"
        )
    return replace(items, part=part)


def limited(items: Items, options: ImageOptions) -> Items:
    """At most `limit` items of each part, the classes in proportion."""
    if options.limit is None:
        return items
    if options.limit < len(items.classes):
        raise DataError(f"data.limit: {options.limit}, but there are {len(items.classes)} classes; allow one image of each at least")
    keep: list[int] = []
    for part in PARTS:
        rows = np.flatnonzero(items.part == part)
        shuffled = np.random.default_rng([options.seed, 7, part]).permutation(rows)
        keep += shuffled[np.argsort(_ranks(items.labels[shuffled]), kind="stable")][: options.limit].tolist()
    return items.rows(np.sort(np.array(keep)))


def _ranks(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each item's place within its class, 0..1, so that cutting a list sorted by it keeps the classes' proportions."""
    rank = np.zeros(len(labels))
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class)) / len(of_class)
    return rank
