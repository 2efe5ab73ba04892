"""Reads texts whose words have tags: CoNLL files, and JSON lines or Parquet with tags or spans.

Tags become O, B-X and I-X, where B-X begins each entity: an I-X that follows anything else than X
begins one, as in the files of CoNLL-2003, and E-, S-, L- and U- of other schemes say no more.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuner.data._labelled_rows import check_no_empty_cell, find_column
from tuner.data._rows import TableRows, read_rows, read_text
from tuner.errors import DataError, limit_listing, nearest_hint
from tuner.preprocessing.word_alignment import Span, find_words

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".txt", ".tsv", ".tab", *TABLE_SUFFIXES)
TOKEN_COLUMNS, TAG_COLUMNS = ("tokens", "words"), ("tags", "ner_tags", "labels")
TEXT_COLUMNS, SPAN_COLUMNS = ("text",), ("spans", "entities", "label", "labels")
TAGGED_SUFFIXES = (".conll", ".bio", ".iob", ".iob2")  # of files that hold nothing else
PREFIXES = {"B": "B", "I": "I", "E": "I", "L": "I", "S": "B", "U": "B"}
DOCUMENT_MARK = "-DOCSTART-"
DOCUMENT = "document"
"""The group of a CoNLL file: what is between two lines of DOCUMENT_MARK."""
TAG_RULE = "a tag is O (no entity), B-TYPE (an entity begins) or I-TYPE (it goes on)"
FORMS = (
    'JSON lines have "tokens" and "tags", or "text" and "spans": '
    '[{"start": 0, "end": 5, "label": "TYPE"}]'
)


@dataclass(frozen=True)
class TaggedText:
    """A text, the spans of its words, and the tag of each."""

    text: str
    words: tuple[Span, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class TaggedFile:
    """The texts of a file, the line of each, what is odd about the file, and the group of each
    text (empty without groups).
    """

    path: Path
    texts: list[TaggedText]
    lines: list[int]
    warnings: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def types(self) -> set[str]:
        """The types of the entities in the file."""
        return {tag[2:] for text in self.texts for tag in text.tags if tag != "O"}


def read_tagged_file(path: Path, group: str | None = None) -> TaggedFile:
    """The texts of a file that have words.

    Args:
        path: a CoNLL file, JSON lines or Parquet.
        group: the column of the groups; of a CoNLL file, DOCUMENT.

    Raises:
        DataError: with the lines of what is wrong.
    """
    suffix = path.suffix.lower()
    if suffix not in ("", *SUFFIXES):
        raise DataError(
            f"data.path: {path}: tagged words are in a CoNLL file (a word and its tag a line, an "
            f"empty line behind each sentence), or in JSON lines; {FORMS}"
        )
    file = _read_table(path, group) if suffix in TABLE_SUFFIXES else _read_conll(path, group)
    if not file.texts:
        raise DataError(f"data.path: {path} holds no texts with tags")
    return file


def has_tags(columns: Sequence[str]) -> bool:
    """Whether the rows of a table with these columns have words and tags, or texts and spans."""
    names = set(columns)
    has_words = not names.isdisjoint(TOKEN_COLUMNS) and not names.isdisjoint(TAG_COLUMNS)
    return has_words or ("text" in names and not names.isdisjoint(("spans", "entities")))


def normalise_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """The tags with B- at the beginning of each entity. Raises ValueError with one that is none."""
    result: list[str] = []
    for tag in tags:
        prefix, dash, kind = tag.partition("-")
        if tag == "O":
            result.append(tag)
        elif prefix in PREFIXES and dash and kind:
            follows = bool(result) and result[-1][2:] == kind and PREFIXES[prefix] == "I"
            result.append(f"{'I' if follows else 'B'}-{kind}")
        else:
            raise ValueError(tag)
    return tuple(result)


def join_words(words: Sequence[str], tags: Sequence[str]) -> TaggedText:
    """Words with a space between them as a text."""
    spans: list[Span] = []
    begin = 0
    for word in words:
        spans.append((begin, begin + len(word)))
        begin += len(word) + 1
    return TaggedText(" ".join(words), tuple(spans), tuple(tags))


def _raise_all(problems: Sequence[str], remedy: str) -> None:
    if problems:
        raise DataError(*limit_listing(problems), f"data.path: {remedy}")


# -- CoNLL


def _read_conll(path: Path, group: str | None) -> TaggedFile:
    """The sentences of a file with a word first and its tag last in each line."""
    texts: list[TaggedText] = []
    lines: list[int] = []
    problems: list[str] = []
    content = read_text(path)
    for sentence in _sentences(content):
        for number, cells in sentence:
            if not cells[0]:
                problems.append(
                    f"{path}:{number}: no word before the tag {cells[-1][:40]!r}; remove the line, "
                    "or leave it empty where a sentence ends"
                )
            elif len(cells) < 2:
                problems.append(f"{path}:{number}: {cells[0][:40]!r} has no tag behind it")
            elif (problem := _tag_problem(cells[-1])) is not None:
                problems.append(f"{path}:{number}: {problem}")
        if problems:
            continue
        words, tags = [cells[0] for _, cells in sentence], [cells[-1] for _, cells in sentence]
        texts.append(join_words(words, normalise_tags(tags)))
        lines.append(sentence[0][0])
    _raise_all(
        problems,
        f"{len(problems)} lines of {path} are wrong; a line has a word and its tag, with a tab or "
        f"a space between them, and {TAG_RULE}",
    )
    groups = () if group is None else _document_of_each(path, content, lines, group)
    return TaggedFile(path, texts, lines, groups=groups)


def _document_of_each(
    path: Path, content: str, lines: Sequence[int], group: str
) -> tuple[str, ...]:
    """The document of the sentences that begin in these lines. Raises DataError."""
    if group != DOCUMENT:
        raise DataError(
            f"data.group: {path} has no columns with names, so {group!r} is none of them"
            f"{nearest_hint(group, [DOCUMENT])}; in a CoNLL file write group: {DOCUMENT}, which "
            f"keeps together what is between two lines of {DOCUMENT_MARK}"
        )
    words = [line.split() for line in content.split("\n")]
    starts = [i for i, cells in enumerate(words, 1) if cells and cells[0] == DOCUMENT_MARK]
    if not starts:
        raise DataError(
            f"data.group: no line of {path} begins with {DOCUMENT_MARK}, so where its documents "
            "begin is unknown; add these lines, or drop the key"
        )
    return tuple(f"{path}, document {bisect_right(starts, line)}" for line in lines)


def _sentences(text: str) -> Iterator[list[tuple[int, list[str]]]]:
    """The numbers and cells of the lines of each sentence."""
    sentence: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
        if any(cells) and cells[0] != DOCUMENT_MARK:
            sentence.append((number, cells))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _tag_problem(tag: str) -> str | None:
    """What is wrong with a tag, in words; None: nothing."""
    try:
        normalise_tags([tag])
    except ValueError:
        return f"{tag[:40]!r} is no tag"
    return None


# -- JSON lines and Parquet


class _WrongRow(Exception):
    """A row cannot be used; the message says why, without its place."""


def _read_table(path: Path, group: str | None) -> TaggedFile:
    table = read_rows(path, None, ())
    token_column, tag_column = (_column(table, names) for names in (TOKEN_COLUMNS, TAG_COLUMNS))
    text_column, span_column = (_column(table, names) for names in (TEXT_COLUMNS, SPAN_COLUMNS))
    if token_column is not None and tag_column is not None:
        read: Callable[[str, str], TaggedText] = _read_tags
        first, second = token_column, tag_column
    elif text_column is not None and span_column is not None:
        read, first, second = _read_spans, text_column, span_column
    else:
        known = (*TOKEN_COLUMNS, *TAG_COLUMNS, *TEXT_COLUMNS, *SPAN_COLUMNS)
        odd = next((name for name in table.columns if name not in known), "")
        raise DataError(
            f"data.path: {path} has the keys {', '.join(map(repr, table.columns))}"
            f"{nearest_hint(odd, known)}; {FORMS}"
        )
    group_column = None if group is None else find_column(table, "group", group, (), [])
    texts: list[TaggedText] = []
    lines: list[int] = []
    groups: list[str] = []
    problems: list[str] = []
    empty: list[int] = []
    for line, row in zip(table.lines, table.values, strict=True):
        try:
            found = read(row[first], row[second])
        except _WrongRow as error:
            problems.append(f"{path}:{line}: {error}")
            continue
        if found.words:
            texts.append(found)
            lines.append(line)
            groups += [] if group_column is None else [row[group_column].strip()]
        else:
            empty.append(line)
    _raise_all(problems, f"{len(problems)} rows of {path} are wrong; mend or remove them; {FORMS}")
    if group_column is not None:
        check_no_empty_cell(path, "a group", groups, lines)
    warnings = []
    if empty:
        listed = ", ".join(limit_listing([str(line) for line in empty]))
        warnings.append(f"data.path: {path}: {len(empty)} rows have no words (lines {listed})")
    if read is _read_spans and (cut := [t.text for t in texts if _cuts_word(t)]):
        warnings.append(
            f"data.path: {path}: in {len(cut)} of {len(texts)} texts a span begins or ends inside "
            f"a word, such as in {cut[0][:60]!r}; predictions name whole words"
        )
    return TaggedFile(path, texts, lines, tuple(warnings), tuple(groups))


def _column(table: TableRows, names: Sequence[str]) -> int | None:
    return next((table.columns.index(name) for name in names if name in table.columns), None)


def _read_list(cell: str, what: str) -> list[Any]:
    try:
        values = json.loads(cell) if cell else []
    except ValueError:
        values = None
    if not isinstance(values, list):
        raise _WrongRow(f"{cell[:60]!r} is no list of {what}")
    return values


def _read_tags(token_cell: str, tag_cell: str) -> TaggedText:
    """The text of a list of words and a list of tags. Raises _WrongRow."""
    words, tags = _read_list(token_cell, "words"), _read_list(tag_cell, "tags")
    if len(words) != len(tags):
        raise _WrongRow(f"{len(words)} tokens, but {len(tags)} tags; each token has one tag")
    for word in words:
        if not isinstance(word, str):
            raise _WrongRow(f"the token {word!r} is no text; put it in quotes")
    for tag in tags:
        if not isinstance(tag, str):
            raise _WrongRow(f"the tag {tag!r} is no text; write its name: {TAG_RULE}")
        if (problem := _tag_problem(tag)) is not None:
            raise _WrongRow(f"{problem}; {TAG_RULE}")
    return join_words(words, normalise_tags(tags))


def _read_spans(text: str, span_cell: str) -> TaggedText:
    """The text whose spans of characters have labels. Raises _WrongRow."""
    spans = sorted(_to_span(value, text) for value in _read_list(span_cell, "spans"))
    for (begin, end, label), (next_begin, next_end, next_label) in pairwise(spans):
        if next_begin < end:
            raise _WrongRow(
                f"the spans {begin}-{end} ({label}) and {next_begin}-{next_end} ({next_label}) "
                "overlap; a word has one tag, so keep one of them"
            )
    words: list[Span] = []
    tags: list[str] = []
    position = 0
    for begin, end, label in spans:
        _append_words(text, position, begin, "", words, tags)
        _append_words(text, begin, end, label, words, tags)
        position = end
    _append_words(text, position, len(text), "", words, tags)
    return TaggedText(text, tuple(words), tuple(tags))


def _append_words(
    text: str, begin: int, end: int, label: str, words: list[Span], tags: list[str]
) -> None:
    """Appends the words between two characters, and their tags."""
    found = find_words(text[begin:end], "punctuation")
    words += [(begin + first, begin + last) for first, last in found]
    tags += [f"{'I' if i else 'B'}-{label}" if label else "O" for i in range(len(found))]


def _to_span(value: Any, text: str) -> tuple[int, int, str]:
    """First character, end and label of a span, without the spaces around it. Raises _WrongRow."""
    if isinstance(value, dict):
        given = [value.get(key) for key in ("start", "end", "label")]
    else:
        given = value if isinstance(value, list) and len(value) == 3 else [None] * 3
    begin, end, label = given
    if type(begin) is not int or type(end) is not int or not isinstance(label, str) or not label:
        raise _WrongRow(
            f'{json.dumps(value)[:80]} is no span; write {{"start": 0, "end": 5, "label": "TYPE"}}'
        )
    if not 0 <= begin < end <= len(text):
        raise _WrongRow(
            f"the span {begin}-{end} ({label}) is not inside the text, which has {len(text)} "
            "characters; start counts from 0, end is the character behind the last"
        )
    covered = text[begin:end]
    if not covered.strip():
        raise _WrongRow(f"the span {begin}-{end} ({label}) covers spaces alone; remove it")
    spaces_before = len(covered) - len(covered.lstrip())
    spaces_behind = len(covered) - len(covered.rstrip())
    return begin + spaces_before, end - spaces_behind, label


def _cuts_word(text: TaggedText) -> bool:
    return len(text.words) != len(find_words(text.text, "punctuation"))
