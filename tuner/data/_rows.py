"""Reads a file of examples as rows with their line numbers: csv, tsv, JSON lines, Parquet (extra
`parquet`) or plain text.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config.requirements import pip_install
from tuner.errors import DataError, limit_listing

KIND_BY_SUFFIX = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
}
MAX_FILE_BYTES = 2_000_000_000  # a file is in memory as a whole while it is read


@dataclass(frozen=True)
class TableRows:
    """The rows of a file.

    Args:
        path: the file.
        columns: the names of the columns, in the file's order.
        values: the values of each row, one per column.
        lines: the number of the line at which each row begins, from 1; in Parquet, of the row.
    """

    path: Path
    columns: tuple[str, ...]
    values: list[tuple[str, ...]]
    lines: list[int]


def read_rows(path: Path, header: bool | None, expected_columns: Sequence[str]) -> TableRows:
    """Read the rows of a file. Columns without names are called 1, 2, …

    Args:
        path: the file.
        header: whether the first row names the columns; None: it does if one of its cells is in
            `expected_columns`.
        expected_columns: usual names of columns.

    Raises:
        DataError: the file cannot be read. The message names the line.
    """
    if path.suffix.lower() == ".parquet":
        return _require_rows(_read_parquet(path))
    text = read_text(path)
    kind = KIND_BY_SUFFIX.get(path.suffix.lower()) or _guess_kind(text)
    if kind == "jsonl":
        return _read_jsonl(path, text)
    if kind == "txt":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        values: list[tuple[str, ...]] = [(line,) for _, line in lines]
        return _require_rows(TableRows(path, ("text",), values, [number for number, _ in lines]))
    return _require_rows(_read_table(path, text, kind, header, expected_columns))


def read_text(path: Path) -> str:
    """The file's characters; all line ends become \\n."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"data.path: {path} has {size:,} bytes, more than {MAX_FILE_BYTES:,}; "
                "split it or take a part of it"
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.path: {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"data.path: {path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
            "save the file in UTF-8, such as by iconv -f latin1 -t utf-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(
            f"data.path: {path}:{line}: holds a NUL character, "
            "so it is no text file, or a damaged one"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _guess_kind(text: str) -> str:
    """The kind of a file whose ending does not say it."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if "\t" in first else "csv" if "," in first else "txt"


def _require_rows(table: TableRows) -> TableRows:
    if not table.values:
        raise DataError(f"data.path: {table.path} holds no examples")
    return table


def _read_table(
    path: Path, text: str, kind: str, header: bool | None, names: Sequence[str]
) -> TableRows:
    rows = list(_read_tsv(text) if kind == "tsv" else _read_csv(path, text))
    if not rows:
        return TableRows(path, (), [], [])
    first_line, first_cells = rows[0]
    first = [cell.strip() for cell in first_cells]
    if header is None:
        header = bool({cell.lower() for cell in first} & {name.lower() for name in names})
    columns = tuple(first) if header else tuple(str(i) for i in range(1, len(first) + 1))
    body = rows[1:] if header else rows
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise DataError(
            f"data.path: {path}:{first_line}: the column {repeated[0]!r} is there twice; rename one"
        )
    broken = [
        f"{path}:{line}: {len(cells)} columns, the first row has {len(columns)}"
        for line, cells in body
        if len(cells) != len(columns)
    ]
    if broken:
        raise DataError(
            *limit_listing(broken),
            f"data.path: {len(broken)} of {len(body)} rows are broken; {_repair_hint(kind)}",
        )
    return TableRows(path, columns, [tuple(cells) for _, cells in body], [line for line, _ in body])


def _repair_hint(kind: str) -> str:
    if kind == "tsv":
        return "a text must hold no tab and no line end; save the file as csv where texts do"
    return 'a text with commas or line ends goes in quotes ("), quotes within it doubled ("")'


def _read_tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row.

    Tab-separated values have no quotes (IANA, text/tab-separated-values): a quotation mark is a
    character of the text.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.split("\t")


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row, by RFC 4180.

    The delimiter is ; if the first line has a ; and no comma.
    """
    first = text.partition("\n")[0]
    delimiter = ";" if ";" in first and "," not in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begin = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"data.path: {path}:{begin}: the row that begins here cannot be read ({error}); "
            "is a quotation mark missing, or not doubled?"
        ) from None


def _read_jsonl(path: Path, text: str) -> TableRows:
    objects: list[tuple[int, dict[str, Any]]] = []
    broken = []
    if text.lstrip().startswith("["):
        raise DataError(
            f"data.path: {path} is one JSON list; write JSON lines: one object a line, "
            "without brackets and commas around them"
        )
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            broken.append(f"{path}:{number}: not JSON ({error})")
            continue
        if isinstance(value, dict):
            objects.append((number, value))
        else:
            broken.append(
                f'{path}:{number}: expected an object such as {{"text": "…", "label": "…"}}, '
                f"got {type(value).__name__}"
            )
    if broken:
        raise DataError(
            *limit_listing(broken), f"data.path: {len(broken)} lines of {path} are broken"
        )
    columns = tuple(dict.fromkeys(key for _, value in objects for key in value))
    cells = [tuple(_json_to_text(value.get(key)) for key in columns) for _, value in objects]
    return _require_rows(TableRows(path, columns, cells, [number for number, _ in objects]))


def _json_to_text(value: Any) -> str:
    """A JSON value as text; an absent value and null are empty."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _read_parquet(path: Path) -> TableRows:
    """The rows of a Parquet file, as JSON lines would have them."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"data.path: {path}: Parquet needs the package pyarrow: {pip_install('parquet')}; or "
            "save the table as csv"
        ) from None
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"data.path: {path} has more than {MAX_FILE_BYTES:,} bytes; split it")
        table = parquet.read_table(path)
        names = [str(name) for name in table.column_names]
        columns = [column.to_pylist() for column in table.columns]
    except OSError as error:
        raise DataError(f"data.path: {path}: {error.strerror or error}") from None
    except (ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"data.path: {path}: no Parquet file that can be read ({reason})") from None
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"data.path: {path}: the column {repeated[0]!r} is there twice; rename one")
    rows = list(
        zip(*([_json_to_text(value) for value in column] for column in columns), strict=True)
    )
    return TableRows(path, tuple(names), rows, list(range(1, len(rows) + 1)))
