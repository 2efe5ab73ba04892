"""What a source of images lists, and which part of it trains, validates and tests: by its folders, or by a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.config.run import SplitOptions
from tuner.errors import DataError

TRAIN, VALID, TEST, UNSPLIT = 0, 1, 2, -1
SPLIT_NAMES = {TRAIN: "training", VALID: "validation", TEST: "test"}


@dataclass(frozen=True)
class Items:
    """`labels` index `strata`, whose proportions each part keeps; `part` is TRAIN, VALID, TEST or UNSPLIT; all hold one entry an example.

    `strata` are the classes where an example has one; otherwise what its kind of truth has instead.
    """

    examples: Sequence[Any]  # paths or arrays of images; texts
    labels: NDArray[np.int64]
    strata: tuple[str, ...]
    split: NDArray[np.int64]

    def select(self, rows: NDArray[np.int64]) -> "Items":
        """The items at these places."""
        return replace(
            self,
            examples=[self.examples[int(i)] for i in rows],
            labels=self.labels[rows],
            split=self.split[rows],
        )


def assign_and_limit_splits(items: Items, options: SplitOptions) -> Items:
    """Every item in a part, and at most `limit` of each. Raises DataError on too few examples."""
    return assign_fold(limit_splits(assign_splits(items, options), options), options)


def check_classes(items: Items) -> None:
    """Raises DataError unless there are two classes, and examples of each."""
    counts = np.bincount(items.labels, minlength=len(items.strata))
    if len(items.strata) < 2:
        found = (
            f"found {len(items.strata)} ({', '.join(map(repr, items.strata))})"
            if items.strata
            else "found none"
        )
        raise DataError(f"data: classification needs at least 2 classes, {found}")
    if (counts == 0).any():
        empty = ", ".join(repr(c) for c, n in zip(items.strata, counts, strict=True) if n == 0)
        raise DataError(f"data: classes with 0 examples: {empty}; add some or remove the classes")


def assign_splits(items: Items, options: SplitOptions) -> Items:
    """UNSPLIT items become train, valid and test, each class in proportion, by the seed."""
    part = items.split.copy()
    shares = {
        p: share
        for p, share in ((VALID, options.valid), (TEST, options.test))
        if not (part == p).any()
    }
    few = []
    for label, name in enumerate(items.strata):
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
            f"data: each class needs at least {len(shares) + 1} examples to be split, but {', '.join(few)}; "
            "add some or give the parts themselves"
        )
    return replace(items, split=part)


def limit_splits(items: Items, options: SplitOptions) -> Items:
    """At most `limit` items of each part, the classes in proportion."""
    if options.limit is None:
        return items
    if options.limit < len(items.strata):
        raise DataError(
            f"data.limit: {options.limit}, but there are {len(items.strata)} classes; allow one example of each at least"
        )
    keep: list[int] = []
    for part in SPLIT_NAMES:
        rows = np.flatnonzero(items.split == part)
        shuffled = np.random.default_rng([options.seed, 7, part]).permutation(rows)
        keep += shuffled[np.argsort(_class_ranks(items.labels[shuffled]), kind="stable")][
            : options.limit
        ].tolist()
    return items.select(np.sort(np.array(keep)))


def assign_fold(items: Items, options: SplitOptions) -> Items:
    """With `folds`, what trains and validates is divided into as many parts, each stratum in proportion; part `fold` validates.

    Raises DataError where a fold would be empty.
    """
    if options.folds == 1:
        return items
    if options.fold >= options.folds:
        raise DataError(
            f"data.fold: {options.fold}, but there are {options.folds} folds, 0 to {options.folds - 1}"
        )
    rows = np.flatnonzero(np.isin(items.split, (TRAIN, VALID)))
    if len(rows) < 2 * options.folds:
        raise DataError(
            f"data.folds: {options.folds}, but there are {len(rows)} examples to train and validate with; lower it"
        )
    shuffled = np.random.default_rng([options.seed, 11]).permutation(rows)
    dealt = shuffled[
        np.argsort(items.labels[shuffled], kind="stable")
    ]  # stratum by stratum, dealt like cards
    part = items.split.copy()
    part[dealt] = np.where(np.arange(len(dealt)) % options.folds == options.fold, VALID, TRAIN)
    return replace(items, split=part)


def _class_ranks(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each item's place within its class, 0..1, so that cutting a list sorted by it keeps the classes' proportions."""
    rank = np.zeros(len(labels))
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class)) / len(of_class)
    return rank
