"""Examples with labels from files of rows: which columns they are in, and what is wrong with them.

`text` and `table` read their files by this, so that both have the same keys.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.data._rows import KIND_BY_SUFFIX, TableRows, read_rows
from tuner.errors import DataError, limit_listing, nearest_hint
from tuner.preprocessing.data_paths import resolve_path
from tuner.preprocessing.splits import (
    SPLIT_BY_NAME,
    TRAIN,
    UNSPLIT,
    group_by_split,
    require_one_per_split,
)

USUAL_LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "sentiment",
    "intent",
    "y",
    "v1",
)
MAX_EMPTY_ONE_IN = 100  # one in so many texts may be empty


@dataclass(frozen=True)
class ColumnKeys:
    """The keys of the data section that name columns, as the file states them; None: not stated.

    Args:
        example: `text` or `image`, the key of the column that has the examples.
        name: what that key says.
        usual_names: usual names of that column.
        second: the column of second texts.
        label: the column or the columns of the labels.
        is_labelled: whether the task has labels.
        split, group, weight: the columns of these names.
        header: whether the first row names the columns.
    """

    example: str
    name: str | None
    usual_names: tuple[str, ...]
    second: str | None = None
    label: str | tuple[str, ...] | None = None
    is_labelled: bool = True
    split: str | None = None
    group: str | None = None
    weight: str | None = None
    header: bool | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """The columns of the labels that are stated."""
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def optional_names(self) -> dict[str, str]:
        """The stated columns that are neither examples nor labels, by key."""
        given = {"split": self.split, "group": self.group, "weight": self.weight}
        return {key: name for key, name in given.items() if name is not None}


@dataclass(frozen=True)
class FileExamples:
    """The examples of one file.

    Args:
        path: the file.
        examples: the cells of each example: one, or a pair of texts.
        label_columns: the names of the columns of the labels; empty if there are no labels.
        labels: the cells of each example in these columns.
        splits, groups, weights: the cell of each example in such a column; empty without one.
        lines: the number of the line at which each example begins.
        warnings: what is odd about the file.
    """

    path: Path
    examples: list[tuple[str, ...]]
    label_columns: tuple[str, ...]
    labels: list[tuple[str, ...]]
    splits: list[str]
    groups: list[str]
    weights: list[str]
    lines: list[int]
    warnings: tuple[str, ...]

    def location(self, index: int) -> str:
        """File and line of an example."""
        return f"{self.path}:{self.lines[index]}"


def read_files(path: str, keys: ColumnKeys, home: Path | None = None) -> dict[int, FileExamples]:
    """The examples of the file of each split; of UNSPLIT alone where `path` is a file.

    `home`: the folder with the caches, to which an archive is unpacked. Raises DataError.
    """
    stated = (keys.name, keys.second, *keys.label_names, *keys.optional_names.values())
    expected = (*filter(None, stated), *keys.usual_names, *USUAL_LABEL_COLUMNS)
    files = find_split_files(path, home)
    if keys.split is not None and UNSPLIT not in files:
        raise DataError(
            f"data.split: {path} has a file for each split; drop the key, or name one file"
        )
    return {
        split: read_examples(read_rows(file, keys.header, expected), keys)
        for split, file in files.items()
    }


def find_split_files(
    path: str, home: Path | None = None, suffixes: Collection[str] = tuple(KIND_BY_SUFFIX)
) -> dict[int, Path]:
    """The file of each split, with one of these endings or none; UNSPLIT alone where `path` is a
    file.
    """
    root = resolve_path(path, home)
    if not root.is_dir():
        return {UNSPLIT: root}
    names = sorted(root.iterdir())
    groups = group_by_split(
        file for file in names if file.is_file() and file.suffix.lower() in ("", *suffixes)
    )
    if TRAIN not in groups:
        listed = ", ".join(limit_listing([file.name for file in names])) or "nothing"
        raise DataError(
            f"data.path: {path} has no train file, such as train{next(iter(suffixes))} "
            f"(it holds {listed}); name the file itself where there is one"
        )
    return require_one_per_split(groups, path)


def read_examples(table: TableRows, keys: ColumnKeys) -> FileExamples:
    """The rows of a file whose example is not empty. Raises DataError."""
    example_columns, label_columns = find_columns(table, keys)
    optional = {
        key: find_column(table, key, name, (), []) for key, name in keys.optional_names.items()
    }
    cells = [tuple(row[i].strip() for i in example_columns) for row in table.values]
    rows = [i for i, row_cells in enumerate(cells) if row_cells[0]]
    empty_lines = [table.lines[i] for i, row_cells in enumerate(cells) if not row_cells[0]]
    warnings = check_empty_examples(table, keys.example, empty_lines)
    lines = [table.lines[i] for i in rows]
    labels = [tuple(table.values[i][c].strip() for c in label_columns) for i in rows]
    columns = {
        key: [table.values[i][column].strip() for i in rows] for key, column in optional.items()
    }
    for key, values in columns.items():
        check_no_empty_cell(table.path, f"a {key}", values, lines)
    return FileExamples(
        table.path,
        [cells[i] for i in rows],
        tuple(table.columns[c] for c in label_columns),
        labels,
        columns.get("split", []),
        columns.get("group", []),
        columns.get("weight", []),
        lines,
        warnings,
    )


def find_columns(table: TableRows, keys: ColumnKeys) -> tuple[list[int], list[int]]:
    """The columns of the examples, one or two, and those of the labels."""
    stated = [find_column(table, key, name, (), []) for key, name in keys.optional_names.items()]
    label_columns: list[int] = []
    if keys.is_labelled and keys.label_names:
        label_columns = [find_column(table, "label", n, (), []) for n in keys.label_names]
    elif keys.is_labelled:
        named = [find_column(table, keys.example, keys.name, (), [])] if keys.name else []
        taken = [*named, *stated]
        label_columns = [find_column(table, "label", None, USUAL_LABEL_COLUMNS, taken)]
    taken = [*label_columns, *stated]
    examples = [find_column(table, keys.example, keys.name, keys.usual_names, taken)]
    if keys.second is not None:
        examples.append(find_column(table, "second", keys.second, (), []))
    return examples, label_columns


def find_column(
    table: TableRows,
    key: str,
    name: str | None,
    usual_names: Sequence[str],
    taken_columns: Sequence[int],
) -> int:
    """The index of a column: the named one, the one with a usual name, or the only one left."""
    if name is not None:
        if name not in table.columns:
            raise DataError(
                f"data.{key}: {table.path} has no column {name!r}"
                f"{nearest_hint(name, table.columns)} "
                f"(it has {', '.join(map(repr, table.columns))})"
            )
        return table.columns.index(name)
    free = [i for i in range(len(table.columns)) if i not in taken_columns]
    likely = [i for usual in usual_names for i in free if table.columns[i].lower() == usual]
    takes_first = key != "label" and len(free) > 1 and len(set(likely)) == 1
    if len(likely) == 1 or (likely and takes_first):
        return likely[0]
    if len(free) == 1 and not likely:
        return free[0]
    problem = "several columns may be it" if likely else "no column has a usual name"
    listed = ", ".join(repr(table.columns[i]) for i in (likely or free))
    raise DataError(
        f"data.{key}: which column of {table.path} holds the {key}s? {problem}: {listed}; "
        f"write data: {{{key}: …}}"
    )


def check_empty_examples(table: TableRows, key: str, lines: list[int]) -> tuple[str, ...]:
    """A warning about empty texts, which are left out. Raises DataError if they are many."""
    if not lines:
        return ()
    summary = (
        f"data.path: {table.path}: {len(lines)} of {len(table.values)} {key}s are empty, "
        f"at {format_lines(lines)}"
    )
    if len(lines) > max(1, len(table.values) // MAX_EMPTY_ONE_IN):
        raise DataError(
            f"{summary}; fill or remove them (one in {MAX_EMPTY_ONE_IN} is left out with a warning)"
        )
    return (f"{summary}; left out",)


def check_no_empty_cell(path: Path, what: str, cells: Sequence[str], lines: Sequence[int]) -> None:
    """Raises DataError, with the lines, where a cell is empty. `what` is such as `a label`."""
    missing = [line for line, cell in zip(lines, cells, strict=True) if not cell]
    if missing:
        verb = "label" if what == "a label" else "fill"
        raise DataError(
            f"data.path: {path}: {len(missing)} rows without {what}, "
            f"at {format_lines(missing)}; {verb} or remove them"
        )


def format_lines(lines: Sequence[int]) -> str:
    """`line 3`, or `lines 3, 4` and how many more."""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(limit_listing(list(map(str, lines))))}"


def split_of_cell(files: Mapping[int, FileExamples]) -> list[int]:
    """The split of each example of all files: its file's, or what its row says. Raises DataError"""
    splits: list[int] = []
    problems: list[str] = []
    for split, file in files.items():
        if not file.splits:
            splits += [split] * len(file.examples)
            continue
        for index, cell in enumerate(file.splits):
            name = cell.lower()
            if name not in SPLIT_BY_NAME:
                hint = nearest_hint(name, SPLIT_BY_NAME)
                problems.append(f"{file.location(index)}: {cell!r} is no split{hint}")
            splits.append(SPLIT_BY_NAME.get(name, UNSPLIT))
    if problems:
        raise DataError(
            *limit_listing(problems),
            f"data.split: {len(problems)} rows name no split; allowed: {', '.join(SPLIT_BY_NAME)}",
        )
    if splits and UNSPLIT not in splits and TRAIN not in splits:
        raise DataError("data.split: no row names the split train")
    return splits
