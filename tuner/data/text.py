"""Your own texts: csv, tsv or JSON lines with a column of texts and one of labels; or one text a line, to be continued."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from tuner.config.run import SplitOptions
from tuner.core.input_spec import Tokens, Wanted
from tuner.core.types import Data
from tuner.data._rows import KINDS, LISTED, Rows, rows
from tuner.errors import DataError, SpaceError, nearest
from tuner.preprocessing import tokenization
from tuner.preprocessing.image_dataset import digest
from tuner.preprocessing.splits import PARTS, TEST, TRAIN, UNSPLIT, VALID, Items, checked, divided

TASKS = ("text_classification", "text_generation")
TEXT = (
    "text",
    "sentence",
    "message",
    "sms",
    "content",
    "review",
    "body",
    "comment",
    "tweet",
    "sentence1",
    "premise",
    "question",
    "v2",
)
LABEL = ("label", "labels", "class", "category", "target", "sentiment", "intent", "y", "v1")
FILES = {
    "train": TRAIN,
    "valid": VALID,
    "val": VALID,
    "validation": VALID,
    "dev": VALID,
    "test": TEST,
}
MOST_EMPTY = 100  # one in so many texts may be empty


def load(
    home: Path,
    wanted: Wanted,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="a csv, tsv, JSON lines or text file, or a folder with train, valid and test files"
        ),
    ],
    text: Annotated[
        str | None, Field(description="the column of the texts; null: guessed from its name")
    ] = None,
    second: Annotated[
        str | None, Field(description="the column of second texts, where a label belongs to a pair")
    ] = None,
    label: Annotated[
        str | None, Field(description="the column of the labels; null: guessed from its name")
    ] = None,
    header: Annotated[
        bool | None, Field(description="whether the first row names the columns; null: guessed")
    ] = None,
    split: SplitOptions,
) -> Data:
    """`path`: a file, or a folder with train, valid and test files. `text`, `second` and `label` name columns; null is guessed."""
    if not isinstance(wanted, Tokens):
        raise SpaceError(
            "data.name: these are texts, but the model wants images; use a model of texts, such as bert"
        )
    labelled = task == "text_classification"
    names = [name for name in (text, second, label) if name is not None]
    found = {
        part: _examples(rows(file, header, (*names, *TEXT, *LABEL)), text, second, label, labelled)
        for part, file in _files(path).items()
    }
    items, warnings = _items(found, labelled)
    if labelled:
        checked(items)
    items = divided(items, split)
    if second is not None:
        firsts, seconds = ([pair[i] for pair in items.pictures] for i in (0, 1))
    else:
        firsts, seconds = [one for (one,) in items.pictures], None
    if not labelled:
        firsts = tokenization.ended(wanted, firsts)
    encoded = tokenization.store(home, wanted, firsts, seconds)
    warnings += [*_shared(items), *_cut(encoded.cut, len(firsts), wanted)]
    return _data(encoded, items, wanted, labelled, tuple(warnings))


def _data(
    encoded: tokenization.Encoded,
    items: Items,
    wanted: Tokens,
    labelled: bool,
    warnings: tuple[str, ...],
) -> Data:
    labels = torch.from_numpy(items.labels) if labelled else encoded.lengths
    classes = items.strata if labelled else ()
    content = digest(encoded.digest, labels.numpy().tobytes(), *classes)

    def source(*parts: int) -> tokenization.Texts:
        at = np.flatnonzero(np.isin(items.part, parts))
        if len(at) == 0:
            raise DataError(f"data: no {PARTS[parts[0]]} texts")
        return tokenization.Texts(
            encoded, labels, torch.from_numpy(at), digest(content, at.tobytes())
        )

    train, valid, test, full = source(TRAIN), source(VALID), source(TEST), source(TRAIN, VALID)
    all_of_it = digest(content, train.digest, valid.digest, test.digest)
    return Data(train, valid, test, full, classes, wanted, all_of_it, warnings)


def _files(path: str) -> dict[int, Path]:
    """Which file holds which part; a single file is split by us."""
    root = Path(path).expanduser()
    if not root.exists():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"data.path: {path} does not exist (looked in {Path.cwd()}){nearest(root.name, beside)}"
        )
    if not root.is_dir():
        return {UNSPLIT: root}
    named: dict[int, list[Path]] = {}
    for file in sorted(root.iterdir()):
        if file.is_file() and file.stem.lower() in FILES and file.suffix.lower() in ("", *KINDS):
            named.setdefault(FILES[file.stem.lower()], []).append(file)
    if TRAIN not in named:
        seen = ", ".join(sorted(p.name for p in root.iterdir())[:LISTED]) or "nothing"
        raise DataError(
            f"data.path: {path} has no train file, such as train.csv (it holds {seen}); name the file itself where there is one"
        )
    for twins in named.values():
        if len(twins) > 1:
            raise DataError(
                f"data.path: {path} has {' and '.join(p.name for p in twins)}, which mean the same part; keep one"
            )
    return {part: named[part][0] for part in sorted(named)}


@dataclass(frozen=True)
class Examples:
    """One file's: texts (or pairs), their labels where there are any, and the lines they begin at."""

    path: Path
    texts: list[tuple[str, ...]]
    labels: list[str]
    lines: list[int]
    warnings: tuple[str, ...]


def _examples(
    read: Rows, text: str | None, second: str | None, label: str | None, labelled: bool
) -> Examples:
    at_label = (
        _column(read, "label", label, LABEL, _written(read, "text", text)) if labelled else None
    )
    at_text = [_column(read, "text", text, TEXT, [at_label] if at_label is not None else [])]
    if second is not None:
        at_text.append(_column(read, "second", second, (), []))
    texts = [tuple(row[i].strip() for i in at_text) for row in read.rows]
    keep = [i for i, parts in enumerate(texts) if parts[0]]
    warnings = _empty(read, [read.lines[i] for i, parts in enumerate(texts) if not parts[0]])
    labels = [read.rows[i][at_label].strip() for i in keep] if at_label is not None else []
    bare = (
        [read.lines[i] for i, name in zip(keep, labels, strict=True) if not name] if labels else []
    )
    if bare:
        raise DataError(
            f"data.path: {read.path}: {len(bare)} rows without a label, at {_lines(bare)}; label or remove them"
        )
    return Examples(
        read.path, [texts[i] for i in keep], labels, [read.lines[i] for i in keep], warnings
    )


def _written(read: Rows, key: str, name: str | None) -> list[int]:
    return [] if name is None else [_column(read, key, name, (), [])]


def _column(
    read: Rows, key: str, name: str | None, usual: Sequence[str], taken: Sequence[int]
) -> int:
    """Where a column is: as the file says, or by the names that are usual, or as the only one left of two."""
    if name is not None:
        if name not in read.columns:
            raise DataError(
                f"data.{key}: {read.path} has no column {name!r}{nearest(name, read.columns)} (it has {', '.join(map(repr, read.columns))})"
            )
        return read.columns.index(name)
    free = [i for i in range(len(read.columns)) if i not in taken]
    likely = [i for word in usual for i in free if read.columns[i].lower() == word]
    if len(likely) == 1 or (likely and key == "text" and len(free) > 1 and len(set(likely)) == 1):
        return likely[0]
    if len(free) == 1 and not likely:
        return free[0]
    which = "several columns may be it" if likely else "no column has a usual name"
    listed = ", ".join(repr(read.columns[i]) for i in (likely or free))
    raise DataError(
        f"data.{key}: which column of {read.path} holds the {key}s? {which}: {listed}; write data: {{{key}: …}}"
    )


def _empty(read: Rows, lines: list[int]) -> tuple[str, ...]:
    """A warning about empty texts, which are left out. Raises DataError where they are many."""
    if not lines:
        return ()
    said = f"data.path: {read.path}: {len(lines)} of {len(read.rows)} texts are empty, at {_lines(lines)}"
    if len(lines) > max(1, len(read.rows) // MOST_EMPTY):
        raise DataError(
            f"{said}; fill or remove them (one in {MOST_EMPTY} is left out with a warning)"
        )
    return (f"{said}; left out",)


def _lines(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:LISTED]))}{more}"


def _items(found: dict[int, Examples], labelled: bool) -> tuple[Items, list[str]]:
    """All files' examples with the classes that occur, in order: of numbers by value, otherwise of the alphabet."""
    names = {name for examples in found.values() for name in examples.labels}
    classes = tuple(sorted(names, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n)))
    total = sum(len(examples.texts) for examples in found.values())
    if labelled and len(classes) > max(20, total // 2):
        raise DataError(
            f"data.label: {len(classes)} different labels of {total} texts; is it the right column? write data: {{label: …}}"
        )
    learnt = set(found[TRAIN].labels) if TRAIN in found else names
    for examples in found.values():
        strange = sorted(set(examples.labels) - learnt)
        if strange:
            line = examples.lines[examples.labels.index(strange[0])]
            raise DataError(
                f"data.path: {examples.path}:{line}: the label {strange[0]!r} does not occur in {found[TRAIN].path.name}"
            )
    texts: list[Any] = [text for examples in found.values() for text in examples.texts]
    index = {name: i for i, name in enumerate(classes)}
    labels = (
        [index[name] for examples in found.values() for name in examples.labels]
        if labelled
        else [0] * total
    )
    part = np.concatenate(
        [np.full(len(examples.texts), at, np.int64) for at, examples in found.items()]
    )
    if TRAIN in found and {VALID, TEST} - set(
        found
    ):  # what is missing is taken from the training texts
        part[part == TRAIN] = UNSPLIT
    warnings = [warning for examples in found.values() for warning in examples.warnings]
    return Items(
        texts, np.array(labels, np.int64), classes if labelled else ("texts",), part
    ), warnings


def _shared(items: Items) -> list[str]:
    """Warnings about texts that stand in two parts, where a model has seen what it is asked."""

    def of(part: int) -> list[Any]:
        return [items.pictures[int(i)] for i in np.flatnonzero(items.part == part)]

    warnings, seen = [], set(of(TRAIN))
    for part in (VALID, TEST):
        texts = of(part)
        again = sum(text in seen for text in texts)
        if again:
            warnings.append(
                f"data: {again} of {len(texts)} {PARTS[part]} texts are also training texts, so scores flatter; remove duplicates"
            )
    return warnings


def _cut(cut: int, total: int, wanted: Tokens) -> list[str]:
    if cut == 0:
        return []
    return [
        f"data: {cut} of {total} texts ({cut / total:.1%}) are longer than {wanted.length} tokens and are cut; raise model.length to keep more"
    ]
