"""A YAML file read strictly: plain values with their lines. Aliases, tags, duplicate keys and bombs are refused.

YAML 1.1 as PyYAML reads it takes `1e-3` for text, `1:30` for 90, `010` for 8 and `no` for false; here numbers are numbers,
only `true` and `false` are booleans, and every other plain word is text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tuner.errors import SpaceError

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1_000_000, 50, 20_000
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """`tree` is dicts, lists and scalars; `lines` maps a key's path in it to where it was written."""

    file: str
    tree: dict[str, Any]
    lines: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: Sequence[str | int]) -> str:
        """`file:line` of the key or its nearest written parent."""
        for end in range(len(path), -1, -1):
            if tuple(path[:end]) in self.lines:
                return self.lines[tuple(path[:end])]
        return f"{self.file}:1"

    def problem(self, path: Sequence[str | int], what: str) -> str:
        return f"{self.where(path)}: {'.'.join(map(str, path)) or 'file'}: {what}"


def read(path: Path) -> Document:
    """Raises SpaceError with file and line."""
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise SpaceError(f"{path}:1: the file has {path.stat().st_size:,} bytes; a space file has at most {MAX_BYTES:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SpaceError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise SpaceError(f"{path}: is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}:1: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise SpaceError(f"{path}: cannot be read ({error.strerror})") from None
    return parse(text, str(path))


def parse(text: str, file: str) -> Document:
    """Raises SpaceError; duplicate keys are collected and named together."""
    document = Document(file, {})
    reader = _Reader(document)
    try:
        tree = reader.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpaceError(f"{file}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise SpaceError(f"{file}:1: not valid YAML: {' '.join(str(error).split())}") from None
    if reader.problems:
        raise SpaceError(*reader.problems)
    if tree is None:
        raise SpaceError(f"{file}:1: the file is empty; see the examples in search_spaces/")
    if not isinstance(tree, dict):
        raise SpaceError(f"{file}:1: expected a mapping (task:, data:, model:, …) at the top, got {kind(tree)}")
    document.tree = tree
    return document


def scalar(text: str) -> Any:
    """A plain (unquoted) scalar's value."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text.replace("_", "")) if len(text) < 400 else text
    if NUMBER.fullmatch(text) and not re.match(r"[-+]?0\d", text):
        return float(text.replace("_", ""))
    if SPECIAL.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


def kind(value: Any) -> str:
    """A value as an error names it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{value!r}".lower()
    if isinstance(value, str):
        return f"the string {value if len(value) < 60 else value[:57] + '...'!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"{value!r}"


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


class _Reader:
    """Builds values from PyYAML's events, so that limits hold while reading and not after."""

    def __init__(self, document: Document) -> None:
        self.document_ = document
        self.problems: list[str] = []
        self.nodes = 0

    def document(self, events: Iterator[yaml.Event]) -> Any:
        tree, documents = None, 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._refuse(event, "only one document per file")
            elif isinstance(event, yaml.NodeEvent):
                tree = self._value(event, events, ())
        return tree

    def _refuse(self, event: yaml.Event, what: str) -> SpaceError:
        return SpaceError(f"{self.document_.file}:{_line(event)}: {what}")

    def _value(self, event: yaml.Event, events: Iterator[yaml.Event], path: KeyPath) -> Any:
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self._refuse(event, "anchors (&) and aliases (*) are not allowed; write the value out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._refuse(event, f"tags such as {getattr(event, 'tag', None)} are not allowed")
        if self.nodes > MAX_NODES:
            raise self._refuse(event, f"more than {MAX_NODES:,} values")
        if len(path) > MAX_DEPTH:
            raise self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        self.document_.lines[path] = f"{self.document_.file}:{_line(event)}"
        if isinstance(event, yaml.ScalarEvent):
            return scalar(event.value) if event.implicit[0] and event.style is None else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, path)
        return self._mapping(events, path)

    def _sequence(self, events: Iterator[yaml.Event], path: KeyPath) -> list[Any]:
        values: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            values.append(self._value(event, events, (*path, len(values))))
        return values

    def _mapping(self, events: Iterator[yaml.Event], path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refuse(event, "a key must be a word")
            if event.value == "<<":
                raise self._refuse(event, "merge keys (<<) are not allowed; write the values out")
            key, place = event.value, f"{self.document_.file}:{_line(event)}"
            first = self.document_.lines.get((*path, key)) if key in values else None
            value = self._value(next(events), events, (*path, key))
            if first is not None:
                dotted = ".".join(map(str, (*path, key)))
                line = first.rsplit(":", 1)[-1]
                self.problems.append(f"{place}: {dotted}: duplicate key, first written in line {line}; keep one")
            values[key] = value
            self.document_.lines[(*path, key)] = place
        return values
