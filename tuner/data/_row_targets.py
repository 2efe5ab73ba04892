"""Makes items of rows: the targets from the cells of their labels, and splits, groups and weights.

A target is a class, a set of labels, or one or several numbers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.data._labelled_rows import FileExamples, check_no_empty_cell, split_of_cell
from tuner.errors import DataError, limit_listing
from tuner.preprocessing.example_groups import number_groups
from tuner.preprocessing.splits import TRAIN, Items

TARGET_KINDS = {
    "classification": "class",
    "text_classification": "class",
    "multilabel": "labels",
    "text_multilabel": "labels",
    "regression": "numbers",
    "text_regression": "numbers",
}
"""What a target is, by task."""
SEPARATORS = ("|", ";", ",")  # of several labels in one cell, where none is stated
TRUE_CELLS, FALSE_CELLS = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}
MAX_QUANTILES = 10  # strata of numbers; each has MIN_QUANTILE_EXAMPLES at least
MIN_QUANTILE_EXAMPLES = 10
Files = Mapping[int, FileExamples]


def make_items(
    files: Files, kind: str, examples: Sequence[Any], separator: str | None = None
) -> Items:
    """The examples of all files as items.

    Args:
        files: the examples of each split's file.
        kind: `class`, `labels`, `numbers`, or `none` for examples without a target.
        examples: what the items hold for each row, in the order of the files and rows.
        separator: of the labels in one cell; None: guessed.

    Raises:
        DataError: cells are missing or wrong; the message has their lines.
    """
    split = np.array(split_of_cell(files), np.int64)
    extras: dict[str, Any] = {"weights": read_weights(files)}
    groups = [cell for file in files.values() for cell in file.groups]
    if groups:
        extras |= number_groups(groups)
    if kind == "none":
        return Items(
            examples,
            np.zeros(len(examples), np.int64),
            ("texts",),
            split,
            output_names=(),
            **extras,
        )
    if kind == "numbers":
        return _with_numbers(files, examples, split, extras)
    if kind == "labels":
        return _with_label_sets(files, examples, split, separator, extras)
    for file in files.values():
        if len(file.label_columns) > 1:
            raise DataError(
                f"data.label: {len(file.label_columns)} columns, but an example has one class; "
                "name one column, or take the task multilabel"
            )
        check_no_empty_cell(file.path, "a label", [cells[0] for cells in file.labels], file.lines)
    names = [cells[0] for file in files.values() for cells in file.labels]
    classes = sort_names(names)
    _check_classes(files, len(classes), len(examples))
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[name] for name in names], np.int64)
    return Items(examples, labels, classes, split, **extras)


def sort_names(names: Sequence[str]) -> tuple[str, ...]:
    """The different names: numbers by value, before others in the order of the alphabet."""
    return tuple(sorted(set(names), key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n)))


def _check_classes(files: Files, class_count: int, total: int) -> None:
    """Raise DataError if there are too many labels, or labels that no training example has."""
    if class_count > max(20, total // 2):
        raise DataError(
            f"data.label: {class_count} different labels of {total} examples; "
            "is it the right column? write data: {label: …}, or take a regression for numbers"
        )
    if TRAIN not in files:
        return
    train_labels = {cells[0] for cells in files[TRAIN].labels}
    for file in files.values():
        for index, (label,) in enumerate(file.labels):
            if label not in train_labels:
                raise DataError(
                    f"data.path: {file.location(index)}: the label {label!r} "
                    f"does not occur in {files[TRAIN].path.name}"
                )


# -- sets of labels


def _with_label_sets(
    files: Files,
    examples: Sequence[Any],
    split: NDArray[np.int64],
    separator: str | None,
    extras: dict[str, Any],
) -> Items:
    columns = _same_columns(files)
    if len(columns) > 1:
        labels = columns
        memberships = np.array(
            [row for file in files.values() for row in _read_flags(file)], np.bool_
        )
    else:
        sets = _read_sets(files, separator)
        labels = sort_names([name for names in sets for name in names])
        index = {name: i for i, name in enumerate(labels)}
        memberships = np.zeros((len(sets), len(labels)), np.bool_)
        for row, names in enumerate(sets):
            memberships[row, [index[name] for name in names]] = True
    counts = memberships.sum(0)
    if not len(labels) or (counts == 0).any():
        missing = ", ".join(repr(n) for n, c in zip(labels, counts, strict=True) if c == 0)
        raise DataError(
            f"data.label: no example has the label {missing or 'of any name'}; add some, or "
            "leave the label out"
        )
    if len(labels) > max(20, len(examples) // 2):
        raise DataError(
            f"data.label: {len(labels)} different labels of {len(examples)} examples; is "
            f"{columns[0]!r} the right column? several labels in a cell are separated by one of "
            f"{' '.join(SEPARATORS)}; for another one write data: {{separator: …}}"
        )
    # an example counts for its rarest label where a limit keeps the proportions
    rarest = np.where(memberships, counts, counts.max() + 1).argmin(1)
    targets = memberships.astype(np.float32)
    return Items(
        examples, rarest.astype(np.int64), labels, split, memberships, targets=targets, **extras
    )


def _same_columns(files: Files) -> tuple[str, ...]:
    return next(iter(files.values())).label_columns


def _read_flags(file: FileExamples) -> list[list[bool]]:
    """Whether each example has the label of each column. Raises DataError."""
    problems = [
        f"{file.location(i)}: {cell!r} in the column {name!r}"
        for i, cells in enumerate(file.labels)
        for name, cell in zip(file.label_columns, cells, strict=True)
        if cell.lower() not in TRUE_CELLS | FALSE_CELLS
    ]
    if problems:
        raise DataError(
            *limit_listing(problems),
            f"data.label: {len(problems)} cells are neither 1 nor 0 (nor true, false, yes, no), "
            "which say whether an example has the label that the column is called",
        )
    return [[cell.lower() in TRUE_CELLS for cell in cells] for cells in file.labels]


def _read_sets(files: Files, separator: str | None) -> list[list[str]]:
    """The labels of each example from one cell each; an empty cell has none. Raises DataError."""
    cells = [cells[0] for file in files.values() for cells in file.labels]
    if any(cell.startswith("[") for cell in cells):
        return [_read_list(f, i) for f in files.values() for i in range(len(f.labels))]
    if separator is None:
        used = [mark for mark in SEPARATORS if any(mark in cell for cell in cells)]
        if len(used) > 1:
            raise DataError(
                f"data.separator: the cells hold {' and '.join(map(repr, used))}; which one is "
                "between the labels of an example? write data: {separator: '" + used[0] + "'}"
            )
        separator = used[0] if used else "\0"
    return [
        list(dict.fromkeys(filter(None, (name.strip() for name in cell.split(separator)))))
        for cell in cells
    ]


def _read_list(file: FileExamples, index: int) -> list[str]:
    """The labels of an example whose cell is a list as JSON writes it."""
    cell = file.labels[index][0]
    try:
        names = json.loads(cell) if cell else []
    except ValueError:
        names = None
    if not isinstance(names, list) or any(isinstance(name, (list, dict)) for name in names):
        raise DataError(
            f"data.label: {file.location(index)}: {cell[:80]!r} is no list of labels, but other "
            'rows have lists, such as ["red", "round"]'
        )
    return list(dict.fromkeys(str(name) for name in names))


# -- numbers


def _with_numbers(
    files: Files, examples: Sequence[Any], split: NDArray[np.int64], extras: dict[str, Any]
) -> Items:
    names = _same_columns(files)
    targets = np.concatenate([_read_numbers(file, file.labels, "label") for file in files.values()])
    for name, column in zip(names, targets.T, strict=True):
        if len(set(column.tolist())) == 1:
            raise DataError(
                f"data.label: the column {name!r} has the value {column[0]:g} in all "
                f"{len(column)} rows, so there is nothing to learn; is it the right column?"
            )
    strata, labels = quantiles(targets)
    return Items(
        examples,
        labels,
        strata,
        split,
        targets=targets.astype(np.float32),
        output_names=names,
        **extras,
    )


def quantiles(targets: NDArray[np.float64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Strata of numbers, so that every split has low and high ones.

    Several targets are ranked by the mean of their ranks.

    Args:
        targets: float64 (n, targets).

    Returns:
        The names of the strata, which are equally large, and the one of each example, int64 (n,).
    """
    count = max(1, min(MAX_QUANTILES, len(targets) // MIN_QUANTILE_EXAMPLES))
    ranks = targets.argsort(0, kind="stable").argsort(0, kind="stable").mean(1)
    order = ranks.argsort(kind="stable")
    labels = np.empty(len(targets), np.int64)
    labels[order] = np.arange(len(targets)) * count // len(targets)
    return tuple(f"quantile {i + 1} of {count}" for i in range(count)), labels


def read_weights(files: Files) -> NDArray[np.float32] | None:
    """How much each example counts, with a mean of 1; None where no column says it.

    Raises DataError.
    """
    if not any(file.weights for file in files.values()):
        return None
    columns = [
        _read_numbers(file, [(cell,) for cell in file.weights], "weight")[:, 0]
        for file in files.values()
    ]
    for file, column in zip(files.values(), columns, strict=True):
        negative = [f"{file.location(int(i))}: {column[i]:g}" for i in np.flatnonzero(column < 0)]
        if negative:
            raise DataError(
                *limit_listing(negative),
                f"data.weight: {len(negative)} weights are below 0; a weight is 0 or more",
            )
    weights: NDArray[np.float32] = np.concatenate(columns).astype(np.float32)
    if not weights.any():
        raise DataError("data.weight: all weights are 0; some must be above it")
    scaled: NDArray[np.float32] = weights / weights.mean()
    return scaled


def _read_numbers(
    file: FileExamples, rows: Sequence[Sequence[str]], key: str
) -> NDArray[np.float64]:
    """The cells as numbers, float64 (n, columns). Raises DataError with the lines of others."""
    values = np.array([[_to_number(cell) for cell in cells] for cells in rows], np.float64)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        problems = [f"{file.location(int(r))}: {rows[int(r)][int(c)]!r}" for r, c in wrong]
        raise DataError(
            *limit_listing(problems),
            f"data.{key}: {len(problems)} of {values.size} cells are no finite numbers; mend or "
            "remove these rows, or name another column",
        )
    return values.reshape(len(rows), -1)


def _to_number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
