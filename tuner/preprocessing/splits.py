"""Divides the examples of a dataset into splits: by given names, or by a seed."""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.config.data_options import SplitOptions
from tuner.errors import DataError, limit_listing
from tuner.preprocessing.stratification import deal_units

TRAIN, VALID, TEST, UNSPLIT = 0, 1, 2, -1
SPLIT_NAMES = {TRAIN: "training", VALID: "validation", TEST: "test"}  # as messages name them
SPLIT_BY_NAME = {
    "train": TRAIN,
    "valid": VALID,
    "val": VALID,
    "validation": VALID,
    "dev": VALID,
    "test": TEST,
}
"""The names of files, folders and keys that mean a split. Every data source accepts all of them."""


@dataclass(frozen=True)
class Items:
    """The examples of a dataset before they are decoded: one entry per example in each field.

    Args:
        examples: paths or arrays of images; texts.
        labels: int64 (n,), an index into `strata` for each example.
        strata: the groups whose share is the same in every split: the classes where an example
            has one class, otherwise what the kind of target has instead.
        split: int64 (n,), TRAIN, VALID, TEST or UNSPLIT for each example.
        memberships: bool (n, strata), where an example is in any number of strata; None: each is
            in the one that `labels` says.
        groups: int64 (n,), an index into `group_names` for each example: examples of one group
            are all in the same split; None: each example is a group of its own.
        group_names: the names of the groups, for messages.
        targets: float32 (n, outputs), where the target is not the class in `labels`.
        weights: float32 (n,), how much each example counts in the loss; None: all alike.
        output_names: the names of what a model gives, such as classes; None: the strata.
    """

    examples: Sequence[Any]
    labels: NDArray[np.int64]
    strata: tuple[str, ...]
    split: NDArray[np.int64]
    memberships: NDArray[np.bool_] | None = None
    groups: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    targets: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None
    output_names: tuple[str, ...] | None = None

    def select(self, rows: NDArray[np.int64]) -> "Items":
        """The items in these rows."""
        optional: dict[str, Any] = {
            name: None if values is None else values[rows]
            for name in ("memberships", "groups", "targets", "weights")
            for values in [getattr(self, name)]
        }
        return replace(
            self,
            examples=[self.examples[int(i)] for i in rows],
            labels=self.labels[rows],
            split=self.split[rows],
            **optional,
        )

    def with_examples(self, examples: Sequence[Any]) -> "Items":
        """The items with these examples instead, in the same order."""
        return replace(self, examples=examples)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what a model gives: classes, labels or targets."""
        return self.strata if self.output_names is None else self.output_names

    @property
    def deals_singly(self) -> bool:
        """Whether each example is dealt to a split alone, and has one stratum."""
        return self.groups is None and self.memberships is None


@dataclass
class NewExamples:
    """The examples of data that are read for a test alone, in the order of their source."""

    examples: list[Any] = field(default_factory=list)


_new_examples: contextvars.ContextVar[NewExamples | None] = contextvars.ContextVar(
    "_new_examples", default=None
)


@dataclass
class ExaminedData:
    """What data sources make known of their examples in a block of `examining_data`.

    Args:
        items: The examples with their splits, those that can be read; None: the source splits by
            itself.
        image_sizes: int64 (n, 2), width and height in pixels of each image; None: no images.
        equal_rows: int64 (k, 2), as in `ImageStore`; None: no images.
        unreadable: One line for each image that cannot be read.
    """

    items: Items | None = None
    image_sizes: NDArray[np.int64] | None = None
    equal_rows: NDArray[np.int64] | None = None
    unreadable: tuple[str, ...] = ()


_examined: contextvars.ContextVar[ExaminedData | None] = contextvars.ContextVar(
    "_examined", default=None
)


@contextlib.contextmanager
def examining_data() -> Iterator[ExaminedData]:
    """In this block a data source makes known what it reads, and leaves out every unreadable image.

    What is yielded gets what is known of the source's examples.
    """
    record = ExaminedData()
    token = _examined.set(record)
    try:
        yield record
    finally:
        _examined.reset(token)


def examined_data() -> ExaminedData | None:
    """The record of the block of `examining_data` that this is in, if any."""
    return _examined.get()


@contextlib.contextmanager
def all_for_testing() -> Iterator[NewExamples]:
    """In this block every example that a data source reads belongs to the test split.

    The other splits are the same examples again, so that a dataset can be made without any for
    training. What is yielded gets the examples.
    """
    record = NewExamples()
    token = _new_examples.set(record)
    try:
        yield record
    finally:
        _new_examples.reset(token)


def rows_of(items: Items, *splits: int) -> NDArray[np.int64]:
    """The rows of the items in some splits, int64 (n,)."""
    record = _new_examples.get()
    if record is None:
        return np.flatnonzero(np.isin(items.split, splits))
    record.examples = list(items.examples)
    return np.arange(len(items.split))


def group_by_split(paths: Iterable[Path]) -> dict[int, list[Path]]:
    """The files and folders whose names mean a split, by split. Other names are ignored.

    A file counts by its name without ending, a folder by its whole name, both in any case.
    """
    groups: dict[int, list[Path]] = {}
    for path in paths:
        name = path.name if path.is_dir() else path.stem
        if name.lower() in SPLIT_BY_NAME:
            groups.setdefault(SPLIT_BY_NAME[name.lower()], []).append(path)
    return groups


def require_one_per_split(
    groups: Mapping[int, Sequence[Path]], root: Path | str
) -> dict[int, Path]:
    """The one file or folder of each split, in the order of the splits.

    Raises:
        DataError: two names in `root` mean the same split.
    """
    for paths in groups.values():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise DataError(f"data.path: {root} has {names}, which mean the same part; keep one")
    return {split: groups[split][0] for split in sorted(groups)}


def read_split_lists(folder: Path) -> dict[int, tuple[Path, list[str]]]:
    """The text files that list the examples of a split, one example per line, by split.

    Returns:
        The file of each split, and the first word of each line that is not empty.
    """
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    lists = {}
    for split, file in require_one_per_split(group_by_split(files), folder).items():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        lists[split] = file, [line.split()[0] for line in lines if line.strip()]
    return lists


def assign_and_limit_splits(items: Items, options: SplitOptions) -> Items:
    """Give every item a split, and keep at most `limit` items of each split.

    Raises:
        DataError: there are too few examples.
    """
    if _new_examples.get() is not None:
        return replace(items, split=np.full(len(items.split), TEST, np.int64))
    items = assign_fold(limit_splits(assign_splits(items, options), options), options)
    record = _examined.get()
    if record is not None:
        record.items = items
    return items


def check_classes(items: Items) -> None:
    """Raise DataError unless there are at least two classes, and examples of each.

    New examples, with which a model is only tested, may be of one class.
    """
    if _new_examples.get() is not None:
        return
    if len(items.strata) < 2:
        names = ", ".join(map(repr, items.strata))
        count = f"{len(items.strata)} ({names})" if items.strata else "none"
        raise DataError(f"data: classification needs at least 2 classes, found {count}")
    counts = np.bincount(items.labels, minlength=len(items.strata))
    if (counts == 0).any():
        empty = ", ".join(repr(c) for c, n in zip(items.strata, counts, strict=True) if n == 0)
        raise DataError(f"data: classes with 0 examples: {empty}; add some or remove the classes")


def assign_splits(items: Items, options: SplitOptions) -> Items:
    """Divide the UNSPLIT items by the seed, each stratum in proportion.

    Where the dataset names training examples but no validation or no test examples, the missing
    split is taken from the training examples.
    """
    split = items.split.copy()
    shares = {
        number: share
        for number, share in ((VALID, options.valid), (TEST, options.test))
        if not (split == number).any()
    }
    if shares:
        split[split == TRAIN] = UNSPLIT
    _check_groups(items, split)
    if not items.deals_singly:
        rows = np.flatnonzero(split == UNSPLIT)
        parts = {TRAIN: 1 - sum(shares.values()), **shares}
        split[rows] = _deal_rows(items, rows, parts, [options.seed, 13])
        return replace(items, split=split)
    too_few = []
    for label, name in enumerate(items.strata):
        unsplit = np.flatnonzero((items.labels == label) & (split == UNSPLIT))
        if len(unsplit) == 0:
            continue
        if len(unsplit) <= len(shares):
            too_few.append(f"{name!r} has {len(unsplit)}")
            continue
        order = np.random.default_rng([options.seed, label]).permutation(unsplit)
        for number, share in shares.items():
            count = min(max(1, round(len(unsplit) * share)), len(order) - 1)
            split[order[:count]] = number
            order = order[count:]
        split[order] = TRAIN
    if too_few:
        raise DataError(
            f"data: each class needs at least {len(shares) + 1} examples to be split, "
            f"but {', '.join(too_few)}; add some or give the parts themselves"
        )
    return replace(items, split=split)


def limit_splits(items: Items, options: SplitOptions) -> Items:
    """Keep at most `limit` items of each split, the classes in proportion."""
    if options.limit is None:
        return items
    if options.limit < len(items.strata):
        raise DataError(
            f"data.limit: {options.limit}, but there are {len(items.strata)} classes; "
            "allow one example of each at least"
        )
    keep: list[int] = []
    for number in SPLIT_NAMES:
        rows = np.flatnonzero(items.split == number)
        shuffled = np.random.default_rng([options.seed, 7, number]).permutation(rows)
        by_rank = shuffled[np.argsort(_class_ranks(items.labels[shuffled]), kind="stable")]
        keep += by_rank[: options.limit].tolist()
    return items.select(np.sort(np.array(keep)))


def assign_fold(items: Items, options: SplitOptions) -> Items:
    """Divide the train and validation items into `folds` folds, each stratum in proportion.

    Fold number `fold` becomes the validation split, the other folds the training split.

    Raises:
        DataError: a fold would be empty.
    """
    if options.folds == 1:
        return items
    if options.fold >= options.folds:
        raise DataError(
            f"data.fold: {options.fold}, but there are {options.folds} folds, "
            f"0 to {options.folds - 1}"
        )
    rows = np.flatnonzero(np.isin(items.split, (TRAIN, VALID)))
    if len(rows) < 2 * options.folds:
        raise DataError(
            f"data.folds: {options.folds}, but there are {len(rows)} examples "
            "to train and validate with; lower it"
        )
    if not items.deals_singly:
        parts = dict.fromkeys(range(options.folds), 1 / options.folds)
        fold_of = _deal_rows(items, rows, parts, [options.seed, 17])
        split = items.split.copy()
        split[rows] = np.where(fold_of == options.fold, VALID, TRAIN)
        return replace(items, split=split)
    shuffled = np.random.default_rng([options.seed, 11]).permutation(rows)
    # sorted by stratum and then dealt to the folds in turn, so that each fold gets its share
    by_stratum = shuffled[np.argsort(items.labels[shuffled], kind="stable")]
    is_valid = np.arange(len(by_stratum)) % options.folds == options.fold
    split = items.split.copy()
    split[by_stratum] = np.where(is_valid, VALID, TRAIN)
    return replace(items, split=split)


def _class_ranks(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The position of each item within its class, 0 to 1.

    A list that is sorted by it keeps the proportions of the classes wherever it is cut.
    """
    rank = np.zeros(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rank[rows] = np.arange(len(rows)) / len(rows)
    return rank


def _check_groups(items: Items, split: NDArray[np.int64]) -> None:
    """Raises DataError where the data itself puts examples of one group into two splits.

    Where one of them is UNSPLIT, the split is drawn without the group's other examples.
    """
    if items.groups is None:
        return
    lowest = np.full(len(items.group_names), max(SPLIT_NAMES) + 1)
    highest = np.full(len(items.group_names), min(UNSPLIT, *SPLIT_NAMES))
    np.minimum.at(lowest, items.groups, split)
    np.maximum.at(highest, items.groups, split)
    straddling = np.flatnonzero(lowest < highest)
    if len(straddling):
        names = limit_listing([repr(items.group_names[int(i)]) for i in straddling])
        raise DataError(
            f"data.group: {len(straddling)} groups have examples in more than one of the given "
            f"splits: {', '.join(names)}; put each into one, or leave the splits out, and they "
            "are drawn by group"
        )


def _deal_rows(
    items: Items, rows: NDArray[np.int64], shares: Mapping[int, float], seed: Sequence[int]
) -> NDArray[np.int64]:
    """The key of `shares` for each of the items in `rows`, groups undivided: int64 (rows,).

    Raises DataError where there are fewer groups than shares.
    """
    if len(rows) == 0:
        return rows
    kind = "examples" if items.groups is None else "groups"
    groups = np.arange(len(rows)) if items.groups is None else items.groups[rows]
    _, unit_of = np.unique(groups, return_inverse=True)
    unit_count = int(unit_of.max()) + 1
    if unit_count < len(shares):
        raise DataError(
            f"data: {unit_count} {kind} cannot be divided into {len(shares)} splits; add some, or "
            "give the splits themselves"
        )
    counts = np.zeros((unit_count, len(items.strata)))
    if items.memberships is None:
        np.add.at(counts, (unit_of, items.labels[rows]), 1)
    else:
        np.add.at(counts, unit_of, items.memberships[rows].astype(float))
    sizes = np.bincount(unit_of).astype(float)
    part_of = deal_units(counts, sizes, np.array(list(shares.values())), seed)
    return np.array(list(shares))[part_of[unit_of]]
