"""A YAML file read strictly: plain values with their lines.

Aliases, tags, duplicate keys and bombs are refused.

YAML 1.1 as PyYAML reads it takes `1e-3` for text, `1:30` for 90, `010` for 8 and `no` for false;
here numbers are numbers, only `true` and `false` are booleans, and every other plain word is text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tuner.errors import SpaceError, nearest_path_hint

MAX_BYTES, MAX_DEPTH, MAX_NODES = 200_000, 50, 10_000
MAX_DIGITS = 300  # what a float can still hold
INTEGER_PATTERN = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
NUMBER_PATTERN = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
NAMED_VALUES = {"true": True, "false": False, "null": None, "~": None, "": None}
INFINITE_OR_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
SHELL_QUOTING_HINT = "text goes in quotes, inside the shell's own: KEY='\"some text\"'"
LINE_ENDS_BEFORE_INDENT = (
    ":",
    "|",
    ">",
    "[",
    "{",
    ",",
)  # how a line ends whose next one is indented further
FORBIDDEN_CHARACTERS = re.compile(
    r"[\x00\ud800-\udfff]"
)  # no file name, database or terminal takes these
COMMAND_LINE = "command line"  # the place of a key that an override sets
KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """`tree` is dicts, lists and scalars; `lines` maps a key's path in it to where it was written.

    `problems` are those that leave a tree to look into: they are reported together with what is
    wrong in it.
    """

    file: str
    content: dict[str, Any]
    lines: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def location(self, path: Sequence[str | int]) -> str:
        """`file:line` of the key or its nearest written parent."""
        for end in range(len(path), -1, -1):
            if tuple(path[:end]) in self.lines:
                return self.lines[tuple(path[:end])]
        return f"{self.file}:1"

    def format_problem(self, path: Sequence[str | int], what: str) -> str:
        return f"{self.location(path)}: {format_key_path(path) or 'file'}: {what}"


def format_key_path(path: Sequence[str | int]) -> str:
    """A key as messages name it, on one line whatever the key holds."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in ".".join(map(str, path)))


def read_document(path: Path) -> Document:
    """Raises SpaceError with file and line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise SpaceError(
                f"{path}:1: the file is too large; a space file has at most {MAX_BYTES:,} bytes"
            )
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise SpaceError(f"{path}: no such file{nearest_path_hint(path)}") from None
    except IsADirectoryError:
        raise SpaceError(f"{path}: is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}:1: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise SpaceError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_document(text, str(path))


def parse_document(text: str, file: str) -> Document:
    """Raises SpaceError on what cannot be read at all.

    Duplicate keys become the document's problems.
    """
    document = Document(file, {})
    try:
        tree = _Reader(document).read_document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = _tab_hint(text, error.problem_mark) or error.problem or error.context
        raise SpaceError(f"{file}:{line}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise SpaceError(
            f"{file}:{line}: not valid YAML: the character U+{int(error.character):04X} is not "
            "allowed"
        ) from None
    except (ValueError, OverflowError):  # PyYAML's chr() and int() on absurd escapes and directives
        raise SpaceError(
            f"{file}:1: not valid YAML: an escape or directive holds a number that is too large"
        ) from None
    if tree is None:
        raise SpaceError(f"{file}:1: the file is empty; `tuner init` lists examples to begin with")
    if not isinstance(tree, dict):
        raise SpaceError(
            f"{file}:1: expected a mapping (task:, data:, model:, …) at the top, got "
            f"{describe_value(tree)}"
        )
    document.content = tree
    return document


def parse_override_value(text: str) -> Any:
    """What stands after the `=` of an override. Raises SpaceError, without a place.

    A plain word is taken whole: `#` begins no comment on a command line.
    """
    try:
        document = parse_document(f"value: {text}", "")
        if _has_comment(f"value: {text}"):
            if text.lstrip()[0] in "[{'\"":
                raise SpaceError(f":1: a value holds no comment (#); {SHELL_QUOTING_HINT}")
            return text
    except SpaceError as error:
        problems = [problem.partition(": ")[2] for problem in error.problems]
        raise SpaceError(
            *(
                f"{p}; {SHELL_QUOTING_HINT}" if p.startswith("not valid YAML") else p
                for p in problems
            )
        ) from None
    if set(document.content) != {"value"}:
        raise SpaceError("expected one value; a mapping goes as {key: value, …}")
    if document.problems:
        raise SpaceError(*(problem.partition(": value.")[2] for problem in document.problems))
    return document.content["value"]


def _has_comment(text: str) -> bool:
    """Whether YAML leaves a part of this text out. The text is valid YAML."""
    outside = list(text)
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent):
            start, end = (mark.index if mark else 0 for mark in (event.start_mark, event.end_mark))
            outside[start:end] = " " * (end - start)
    return "#" in outside


def _tab_hint(text: str, mark: yaml.Mark | None) -> str:
    """What is wrong with the tab at this place, and what goes there instead.

    '' where there is none.
    """
    if mark is None or text[mark.index : mark.index + 1] != "\t":
        return ""
    lines = text.splitlines()
    before, line = lines[: mark.line], lines[mark.line]
    if line[: mark.column].strip():
        return f"a tab after {line[: mark.column].strip()!r}; write a space instead"
    if not line.strip():
        return "a tab on an empty line; remove it"
    indents = [len(other) - len(other.lstrip()) for other in before]
    step = next((indent for indent in indents if indent), 2)
    written = [i for i, other in enumerate(before) if other.partition("#")[0].strip()]
    spaces = 0
    if written:
        opens = before[written[-1]].partition("#")[0].rstrip().endswith(LINE_ENDS_BEFORE_INDENT)
        spaces = indents[written[-1]] + step * opens
    what = f"{spaces} spaces" if spaces else "nothing"
    return f"a tab before {line.strip()[:40]!r}; lines are indented by spaces: write {what} instead"


def parse_scalar(text: str) -> Any:
    """A plain (unquoted) scalar's value."""
    if text in NAMED_VALUES:
        return NAMED_VALUES[text]
    if INTEGER_PATTERN.fullmatch(text):
        return int(text.replace("_", "")) if len(text) <= MAX_DIGITS else text
    if NUMBER_PATTERN.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text.replace("_", ""))
    if INFINITE_OR_NAN.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


def describe_value(value: Any) -> str:
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


def _line_of(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


class _Reader:
    """Builds values from PyYAML's events, so that limits hold while reading and not after."""

    def __init__(self, document: Document) -> None:
        self.result = document
        self.node_count = 0

    def read_document(self, events: Iterator[yaml.Event]) -> Any:
        tree, documents = None, 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._refuse(event, "only one document per file")
            elif isinstance(event, yaml.NodeEvent):
                tree = self._read_value(event, events, ())
        return tree

    def _refuse(self, event: yaml.Event, what: str) -> SpaceError:
        return SpaceError(f"{self._location(event)}: {what}")

    def _location(self, event: yaml.Event) -> str:
        return f"{self.result.file}:{_line_of(event)}"

    def _check_event(self, event: yaml.Event, path: KeyPath) -> None:
        """Refuses, for keys and values alike, what makes a small file large or a value code."""
        self.node_count += 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self._refuse(
                event, "anchors (&) and aliases (*) are not allowed; write the value out"
            )
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._refuse(
                event,
                f"tags such as {getattr(event, 'tag', None)!r} are not allowed; write the plain "
                "value",
            )
        if self.node_count > MAX_NODES:
            raise self._refuse(event, f"more than {MAX_NODES:,} values")
        if len(path) > MAX_DEPTH:
            raise self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        unspeakable = (
            FORBIDDEN_CHARACTERS.search(event.value)
            if isinstance(event, yaml.ScalarEvent)
            else None
        )
        if unspeakable:
            raise self._refuse(event, f"the character U+{ord(unspeakable[0]):04X} is not allowed")

    def _read_value(self, event: yaml.Event, events: Iterator[yaml.Event], path: KeyPath) -> Any:
        self._check_event(event, path)
        self.result.lines[path] = self._location(event)
        if isinstance(event, yaml.ScalarEvent):
            return (
                parse_scalar(event.value)
                if event.implicit[0] and event.style is None
                else event.value
            )
        if isinstance(event, yaml.SequenceStartEvent):
            return self._read_sequence(events, path)
        return self._read_mapping(events, path)

    def _read_sequence(self, events: Iterator[yaml.Event], path: KeyPath) -> list[Any]:
        values: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            values.append(self._read_value(event, events, (*path, len(values))))
        return values

    def _read_mapping(self, events: Iterator[yaml.Event], path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            self._check_event(event, path)
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refuse(event, "a key must be a word")
            if event.value == "<<":
                raise self._refuse(event, "merge keys (<<) are not allowed; write the values out")
            key = (*path, event.value)
            if event.value in values:
                first = self.result.lines[key].rpartition(":")[2]
                self.result.problems.append(
                    f"{self._location(event)}: {format_key_path(key)}: duplicate key, first "
                    f"written in line {first}; keep one"
                )
            values[event.value] = self._read_value(next(events), events, key)
            self.result.lines[key] = self._location(event)
        return values
