"""What a table of images or texts can be read as: which columns it has, and for which tasks."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tuner.data._rows import TableRows
from tuner.errors import DataError
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.splits import SPLIT_BY_NAME

MAX_LABELS = 100  # different values of a column that may hold labels
SAMPLED_ROWS = 20  # rows whose files are looked for
MIN_NUMBERS = 20  # different numbers of a column that may be estimated and not classified
SEPARATORS = ("|", ";", ",")
SPLIT_COLUMNS = ("split", "part", "subset", "set", "partition", "fold_name")
WEIGHT_COLUMNS = ("weight", "sample_weight", "weights")
GROUP_COLUMNS = ("group", "patient", "patient_id", "subject", "subject_id", "person", "user_id")


@dataclass(frozen=True)
class ColumnReading:
    """One way to read a column of labels.

    Args:
        target: `class`, `labels` or `numbers`.
        label: the column, or several.
        sizes: how often each class or label occurs; empty for numbers.
    """

    target: str
    label: str | tuple[str, ...]
    sizes: dict[str, int] = field(default_factory=dict)


def column_of_images(
    rows: TableRows, usual: tuple[str, ...], base: Path
) -> tuple[str, str | None] | None:
    """The column whose cells are images, and the folder that they begin in, where that is not
    `base`; None where no column is one.

    Raises DataError where a column has names of images, and no such file is near.
    """
    names = sorted(rows.columns, key=lambda n: n.lower() not in usual)  # usual names first
    missing = ""
    for name in names:
        cells = [cell for cell in column(rows, name) if cell][:SAMPLED_ROWS]
        is_named = bool(cells) and all(Path(cell).suffix.lower() in SUFFIXES for cell in cells)
        if not is_named and name.lower() not in usual:
            continue
        for folder in (base, *_folders_below(base)):
            there = sum(is_image(folder, cell) for cell in cells)
            if there and there >= len(cells) / 2:
                return name, None if folder == base else str(folder)
        missing = missing or (cells[0] if is_named else "")
    if missing:
        raise DataError(
            f"{rows.path} lists images such as {missing!r}, and neither {base} nor a folder in it "
            "has them; write a space file with data: {name: table, folder: …}"
        )
    return None


def is_image(folder: Path, cell: str) -> bool:
    """Whether a cell names an image in a folder, with or without its ending."""
    path = folder / cell
    if path.suffix.lower() in SUFFIXES:
        return path.is_file()
    return any(path.with_name(path.name + ending).is_file() for ending in SUFFIXES)


def _folders_below(base: Path) -> Iterator[Path]:
    """The folders in a folder, and those in these."""
    for depth, (parent, names, _) in enumerate(os.walk(base)):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if depth > 200:
            return
        if len(Path(parent).relative_to(base).parts) >= 2:
            names.clear()
        yield from (Path(parent) / name for name in names)


def extra_columns(rows: TableRows, taken: str) -> dict[str, str]:
    """The columns of splits, groups and weights, by key, as their usual names tell them."""
    found: dict[str, str] = {}
    for name in rows.columns:
        cells = set(column(rows, name))
        if name == taken or not cells:
            continue
        lower = name.lower()
        if lower in SPLIT_COLUMNS and {c.lower() for c in cells} <= set(SPLIT_BY_NAME):
            found.setdefault("split", name)
        elif lower in WEIGHT_COLUMNS and all(is_number(cell) for cell in cells):
            found.setdefault("weight", name)
        elif lower in GROUP_COLUMNS and "" not in cells:
            found.setdefault("group", name)
    return found


def label_columns(rows: TableRows, taken: set[str], usual: tuple[str, ...]) -> list[ColumnReading]:
    """The ways to read the labels: the column with a usual name, or all that could be it."""
    others = [name for name in rows.columns if name not in taken]
    by_name = {name.lower(): name for name in others}
    named = next((by_name[name] for name in usual if name in by_name), None)
    readings = [r for name in ([named] if named else others) if (r := read_column(rows, name))]
    flags = [name for name in others if set(column(rows, name)) <= {"0", "1"}]
    if named is None and len(flags) > 1:
        sizes = {name: column(rows, name).count("1") for name in flags}
        if all(sizes.values()):
            readings = [r for r in readings if r.label not in flags]
            readings.insert(0, ColumnReading("labels", tuple(flags), sizes))
    return readings


def read_column(rows: TableRows, name: str) -> ColumnReading | None:
    """What a column says of each row; None where it is no label."""
    cells = column(rows, name)
    sizes = count(cells)
    filled = [cell for cell in cells if cell]
    used = [mark for mark in SEPARATORS if any(mark in cell for cell in filled)]
    if len(used) == 1:
        parts = [part.strip() for cell in filled for part in cell.split(used[0])]
        of_parts = count([part for part in parts if part])
        repeats = len(parts) >= 4 * len(of_parts)
        if 2 <= len(of_parts) <= MAX_LABELS and repeats and len(of_parts) < len(sizes):
            return ColumnReading("labels", name, of_parts)
    is_numeric = bool(filled) and len(filled) == len(cells) and all(map(is_number, filled))
    has_fractions = is_numeric and any(float(cell) % 1 for cell in filled)
    if is_numeric and len(sizes) >= 2 and (has_fractions or len(sizes) > MIN_NUMBERS):
        in_order = [float(cell) for cell in filled]
        is_counter = not has_fractions and len(sizes) == len(in_order)  # a number of the row
        return None if is_counter else ColumnReading("numbers", name)
    most = min(MAX_LABELS, len(cells) // 4)
    return ColumnReading("class", name, sizes) if 2 <= len(sizes) <= most else None


def column(rows: TableRows, name: str) -> list[str]:
    """The cells of a column."""
    index = rows.columns.index(name)
    return [row[index].strip() for row in rows.values]


def count(cells: list[str]) -> dict[str, int]:
    """How often each value occurs, by value."""
    sizes: dict[str, int] = {}
    for cell in cells:
        sizes[cell] = sizes.get(cell, 0) + 1
    return dict(sorted(sizes.items()))


def is_number(cell: str) -> bool:
    try:
        return abs(float(cell)) < float("inf")
    except ValueError:
        return False


def has_unusual_header(rows: TableRows) -> bool:
    """Whether the first row of a table names its columns by names that nobody expects.

    The columns are then still called 1, 2, …, and the first value of one with few different values
    is none of the others.
    """
    if rows.columns[:1] != ("1",) or len(rows.values) < 3:
        return False
    first, *others = rows.values
    most = min(MAX_LABELS, len(others) // 4)
    columns = [{row[i] for row in others} for i in range(len(first))]
    return any(
        1 < len(column) <= most and value not in column
        for value, column in zip(first, columns, strict=True)
    )


def guess_columns(
    rows: TableRows, usual_texts: tuple[str, ...], usual_labels: tuple[str, ...]
) -> tuple[str | None, list[str]]:
    """The column of texts, and those that may hold the labels.

    A usual name decides. Else the texts are in the column with the longest values, and labels in
    a column with few different ones.
    """
    names = {name.lower(): name for name in rows.columns}
    text = next((names[n] for n in usual_texts if n in names), None)
    if text is None and rows.values:
        lengths = [sum(len(row[i]) for row in rows.values) for i in range(len(rows.columns))]
        text = rows.columns[lengths.index(max(lengths))]
    label = next((names[n] for n in usual_labels if n in names and names[n] != text), None)
    if label is not None:
        return text, [label]
    most = min(MAX_LABELS, len(rows.values) // 4)
    others = [name for name in rows.columns if name != text]
    return text, [name for name in others if 2 <= len(count(column(rows, name))) <= most]
