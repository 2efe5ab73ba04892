"""A file of examples as rows with their line numbers: csv, tsv, JSON lines, or one text a line."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import DataError

KIND_BY_SUFFIX = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}
MAX_FILE_BYTES = 2_000_000_000  # of a file, which is held in memory while it is read
MAX_LISTED = 10  # broken rows that a message names


@dataclass(frozen=True)
class TableRows:
    """`columns` in the file's order, `rows` their values, `lines` where each row begins in the file, from 1."""

    path: Path
    columns: tuple[str, ...]
    values: list[tuple[str, ...]]
    lines: list[int]


def read_rows(path: Path, header: bool | None, expected_columns: Sequence[str]) -> TableRows:
    """What a file holds. `header`: whether its first row names the columns; None: it does if it says one of `names`.

    Columns without names are called 1, 2, … Raises DataError on what cannot be read, with line numbers.
    """
    text = _read_text(path)
    kind = KIND_BY_SUFFIX.get(path.suffix.lower()) or _guess_kind(text)
    if kind == "jsonl":
        return _read_jsonl(path, text)
    if kind == "txt":
        found = [(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return _require_rows(
            TableRows(
                path, ("text",), [(line,) for line, _ in found], [number for _, number in found]
            )
        )
    return _require_rows(_read_table(path, text, kind, header, expected_columns))


def _read_text(path: Path) -> str:
    """The file's characters, line ends as \\n."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"data.path: {path} has {size:,} bytes, more than {MAX_FILE_BYTES:,}; split it or take a part of it"
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.path: {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"data.path: {path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file in UTF-8, "
            f"such as by iconv -f latin1 -t utf-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(
            f"data.path: {path}:{line}: holds a NUL character, so it is no text file, or a damaged one"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _guess_kind(text: str) -> str:
    """The kind of a file whose name does not tell."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if "\t" in first else "csv" if "," in first else "txt"


def _require_rows(found: TableRows) -> TableRows:
    if not found.values:
        raise DataError(f"data.path: {found.path} holds no examples")
    return found


def _read_table(
    path: Path, text: str, kind: str, header: bool | None, names: Sequence[str]
) -> TableRows:
    read = list(_read_tsv(text) if kind == "tsv" else _read_csv(path, text))
    if not read:
        return TableRows(path, (), [], [])
    first = [cell.strip() for cell in read[0][1]]
    if header is None:
        header = bool({cell.lower() for cell in first} & {name.lower() for name in names})
    columns = tuple(first) if header else tuple(str(i) for i in range(1, len(first) + 1))
    body = read[1:] if header else read
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(
            f"data.path: {path}:{read[0][0]}: the column {twice[0]!r} is there twice; rename one"
        )
    broken = [
        f"{path}:{line}: {len(cells)} columns, the first row has {len(columns)}"
        for line, cells in body
        if len(cells) != len(columns)
    ]
    if broken:
        raise DataError(
            *_limit_listing(broken),
            f"data.path: {len(broken)} of {len(body)} rows are broken; {_repair_hint(kind)}",
        )
    return TableRows(path, columns, [tuple(cells) for _, cells in body], [line for line, _ in body])


def _repair_hint(kind: str) -> str:
    if kind == "tsv":
        return "a text must hold no tab and no line end; save the file as csv where texts do"
    return 'a text with commas or line ends goes in quotes ("), quotes within it doubled ("")'


def _limit_listing(problems: Sequence[str]) -> list[str]:
    more = [f"… and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return [*problems[:MAX_LISTED], *more]


def _read_tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated values have no quotes (IANA, text/tab-separated-values): a quotation mark is a character of the text."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.split("\t")


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """RFC 4180, with ; where the first line has that and no comma."""
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
            f"data.path: {path}:{begin}: the row that begins here cannot be read ({error}); is a quotation mark missing, or not doubled?"
        ) from None


def _read_jsonl(path: Path, text: str) -> TableRows:
    found: list[tuple[int, dict[str, Any]]] = []
    broken = []
    if text.lstrip().startswith("["):
        raise DataError(
            f"data.path: {path} is one JSON list; write JSON lines: one object a line, without brackets and commas around them"
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
            found.append((number, value))
        else:
            broken.append(
                f'{path}:{number}: expected an object such as {{"text": "…", "label": "…"}}, got {type(value).__name__}'
            )
    if broken:
        raise DataError(
            *_limit_listing(broken), f"data.path: {len(broken)} lines of {path} are broken"
        )
    columns = tuple(dict.fromkeys(key for _, value in found for key in value))
    return _require_rows(
        TableRows(
            path,
            columns,
            [tuple(_json_to_text(value.get(key)) for key in columns) for _, value in found],
            [n for n, _ in found],
        )
    )


def _json_to_text(value: Any) -> str:
    """A JSON value as text; what is absent or null is empty."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
