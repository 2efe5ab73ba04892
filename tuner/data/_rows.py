"""A file of examples as rows with their line numbers: csv, tsv, JSON lines, or one text a line."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import DataError

KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}
MOST_BYTES = 2_000_000_000  # of a file, which is held in memory while it is read
LISTED = 10  # broken rows that a message names


@dataclass(frozen=True)
class Rows:
    """`columns` in the file's order, `rows` their values, `lines` where each row begins in the file, from 1."""

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    lines: list[int]


def rows(path: Path, header: bool | None, names: Sequence[str]) -> Rows:
    """What a file holds. `header`: whether its first row names the columns; None: it does if it says one of `names`.

    Columns without names are called 1, 2, … Raises DataError on what cannot be read, with line numbers.
    """
    text = _text(path)
    kind = KINDS.get(path.suffix.lower()) or _looks(text)
    if kind == "jsonl":
        return _objects(path, text)
    if kind == "txt":
        found = [(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return _some(
            Rows(path, ("text",), [(line,) for line, _ in found], [number for _, number in found])
        )
    return _some(_table(path, text, kind, header, names))


def _text(path: Path) -> str:
    """The file's characters, line ends as \\n."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(
                f"data.path: {path} has {size:,} bytes, more than {MOST_BYTES:,}; split it or take a part of it"
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


def _looks(text: str) -> str:
    """The kind of a file whose name does not tell."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if "\t" in first else "csv" if "," in first else "txt"


def _some(found: Rows) -> Rows:
    if not found.rows:
        raise DataError(f"data.path: {found.path} holds no examples")
    return found


def _table(path: Path, text: str, kind: str, header: bool | None, names: Sequence[str]) -> Rows:
    read = list(_tabbed(text) if kind == "tsv" else _comma(path, text))
    if not read:
        return Rows(path, (), [], [])
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
            *_listed(broken),
            f"data.path: {len(broken)} of {len(body)} rows are broken; {_mend(kind)}",
        )
    return Rows(path, columns, [tuple(cells) for _, cells in body], [line for line, _ in body])


def _mend(kind: str) -> str:
    if kind == "tsv":
        return "a text must hold no tab and no line end; save the file as csv where texts do"
    return 'a text with commas or line ends goes in quotes ("), quotes within it doubled ("")'


def _listed(problems: Sequence[str]) -> list[str]:
    more = [f"… and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return [*problems[:LISTED], *more]


def _tabbed(text: str) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated values have no quotes (IANA, text/tab-separated-values): a quotation mark is a character of the text."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.split("\t")


def _comma(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
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


def _objects(path: Path, text: str) -> Rows:
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
        raise DataError(*_listed(broken), f"data.path: {len(broken)} lines of {path} are broken")
    columns = tuple(dict.fromkeys(key for _, value in found for key in value))
    return _some(
        Rows(
            path,
            columns,
            [tuple(_plain(value.get(key)) for key in columns) for _, value in found],
            [n for n, _ in found],
        )
    )


def _plain(value: Any) -> str:
    """A JSON value as text; what is absent or null is empty."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
