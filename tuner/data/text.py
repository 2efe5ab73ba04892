"""Your own texts: csv, tsv or JSON lines with a column of texts and one of labels; or one text a line, to be continued."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from tuner.config.run import SplitOptions
from tuner.core.input_spec import InputSpec, TextInputSpec
from tuner.core.types import Dataset
from tuner.data._rows import KIND_BY_SUFFIX, MAX_LISTED, TableRows, read_rows
from tuner.errors import DataError, SpaceError, nearest_hint
from tuner.preprocessing import tokenization
from tuner.preprocessing.image_dataset import content_digest
from tuner.preprocessing.splits import (
    SPLIT_NAMES,
    TEST,
    TRAIN,
    UNSPLIT,
    VALID,
    Items,
    assign_and_limit_splits,
    check_classes,
)

TASKS = ("text_classification", "text_generation")
USUAL_TEXT_COLUMNS = (
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
SPLIT_FILES = {
    "train": TRAIN,
    "valid": VALID,
    "val": VALID,
    "validation": VALID,
    "dev": VALID,
    "test": TEST,
}
MAX_EMPTY_ONE_IN = 100  # one in so many texts may be empty


def load(
    home: Path,
    input_spec: InputSpec,
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
) -> Dataset:
    """`path`: a file, or a folder with train, valid and test files. `text`, `second` and `label` name columns; null is guessed."""
    if not isinstance(input_spec, TextInputSpec):
        raise SpaceError(
            "data.name: these are texts, but the model wants images; use a model of texts, such as bert"
        )
    labelled = task == "text_classification"
    names = [name for name in (text, second, label) if name is not None]
    found = {
        part: _read_examples(
            read_rows(file, header, (*names, *USUAL_TEXT_COLUMNS, *USUAL_LABEL_COLUMNS)),
            text,
            second,
            label,
            labelled,
        )
        for part, file in _find_split_files(path).items()
    }
    items, warnings = _make_items(found, labelled)
    if labelled:
        check_classes(items)
    items = assign_and_limit_splits(items, split)
    if second is not None:
        firsts, seconds = ([pair[i] for pair in items.examples] for i in (0, 1))
    else:
        firsts, seconds = [one for (one,) in items.examples], None
    if not labelled:
        firsts = tokenization.append_eos(input_spec, firsts)
    encoded = tokenization.open_token_store(home, input_spec, firsts, seconds)
    warnings += [
        *_warn_shared_texts(items),
        *_warn_truncated(encoded.truncated_count, len(firsts), input_spec),
    ]
    return _make_dataset(encoded, items, input_spec, labelled, tuple(warnings))


def _make_dataset(
    encoded: tokenization.EncodedTexts,
    items: Items,
    input_spec: TextInputSpec,
    labelled: bool,
    warnings: tuple[str, ...],
) -> Dataset:
    labels = torch.from_numpy(items.labels) if labelled else encoded.lengths
    classes = items.strata if labelled else ()
    content = content_digest(encoded.digest, labels.numpy().tobytes(), *classes)

    def source(*parts: int) -> tokenization.TextSource:
        at = np.flatnonzero(np.isin(items.split, parts))
        if len(at) == 0:
            raise DataError(f"data: no {SPLIT_NAMES[parts[0]]} texts")
        return tokenization.TextSource(
            encoded, labels, torch.from_numpy(at), content_digest(content, at.tobytes())
        )

    train, valid, test, full = source(TRAIN), source(VALID), source(TEST), source(TRAIN, VALID)
    all_of_it = content_digest(content, train.digest, valid.digest, test.digest)
    return Dataset(train, valid, test, full, classes, input_spec, all_of_it, warnings)


def _find_split_files(path: str) -> dict[int, Path]:
    """Which file holds which part; a single file is split by us."""
    root = Path(path).expanduser()
    if not root.exists():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"data.path: {path} does not exist (looked in {Path.cwd()}){nearest_hint(root.name, beside)}"
        )
    if not root.is_dir():
        return {UNSPLIT: root}
    named: dict[int, list[Path]] = {}
    for file in sorted(root.iterdir()):
        if (
            file.is_file()
            and file.stem.lower() in SPLIT_FILES
            and file.suffix.lower() in ("", *KIND_BY_SUFFIX)
        ):
            named.setdefault(SPLIT_FILES[file.stem.lower()], []).append(file)
    if TRAIN not in named:
        seen = ", ".join(sorted(p.name for p in root.iterdir())[:MAX_LISTED]) or "nothing"
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
class FileExamples:
    """One file's: texts (or pairs), their labels where there are any, and the lines they begin at."""

    path: Path
    texts: list[tuple[str, ...]]
    labels: list[str]
    lines: list[int]
    warnings: tuple[str, ...]


def _read_examples(
    read: TableRows, text: str | None, second: str | None, label: str | None, labelled: bool
) -> FileExamples:
    at_label = (
        _find_column(read, "label", label, USUAL_LABEL_COLUMNS, _named_column(read, "text", text))
        if labelled
        else None
    )
    at_text = [
        _find_column(
            read, "text", text, USUAL_TEXT_COLUMNS, [at_label] if at_label is not None else []
        )
    ]
    if second is not None:
        at_text.append(_find_column(read, "second", second, (), []))
    texts = [tuple(row[i].strip() for i in at_text) for row in read.values]
    keep = [i for i, parts in enumerate(texts) if parts[0]]
    warnings = _check_empty_texts(
        read, [read.lines[i] for i, parts in enumerate(texts) if not parts[0]]
    )
    labels = [read.values[i][at_label].strip() for i in keep] if at_label is not None else []
    bare = (
        [read.lines[i] for i, name in zip(keep, labels, strict=True) if not name] if labels else []
    )
    if bare:
        raise DataError(
            f"data.path: {read.path}: {len(bare)} rows without a label, at {_format_lines(bare)}; label or remove them"
        )
    return FileExamples(
        read.path, [texts[i] for i in keep], labels, [read.lines[i] for i in keep], warnings
    )


def _named_column(read: TableRows, key: str, name: str | None) -> list[int]:
    return [] if name is None else [_find_column(read, key, name, (), [])]


def _find_column(
    read: TableRows, key: str, name: str | None, usual: Sequence[str], taken: Sequence[int]
) -> int:
    """Where a column is: as the file says, or by the names that are usual, or as the only one left of two."""
    if name is not None:
        if name not in read.columns:
            raise DataError(
                f"data.{key}: {read.path} has no column {name!r}{nearest_hint(name, read.columns)} (it has {', '.join(map(repr, read.columns))})"
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


def _check_empty_texts(read: TableRows, lines: list[int]) -> tuple[str, ...]:
    """A warning about empty texts, which are left out. Raises DataError where they are many."""
    if not lines:
        return ()
    said = f"data.path: {read.path}: {len(lines)} of {len(read.values)} texts are empty, at {_format_lines(lines)}"
    if len(lines) > max(1, len(read.values) // MAX_EMPTY_ONE_IN):
        raise DataError(
            f"{said}; fill or remove them (one in {MAX_EMPTY_ONE_IN} is left out with a warning)"
        )
    return (f"{said}; left out",)


def _format_lines(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:MAX_LISTED]))}{more}"


def _make_items(found: dict[int, FileExamples], labelled: bool) -> tuple[Items, list[str]]:
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


def _warn_shared_texts(items: Items) -> list[str]:
    """Warnings about texts that stand in two parts, where a model has seen what it is asked."""

    def of(part: int) -> list[Any]:
        return [items.examples[int(i)] for i in np.flatnonzero(items.split == part)]

    warnings, seen = [], set(of(TRAIN))
    for part in (VALID, TEST):
        texts = of(part)
        again = sum(text in seen for text in texts)
        if again:
            warnings.append(
                f"data: {again} of {len(texts)} {SPLIT_NAMES[part]} texts are also training texts, so scores flatter; remove duplicates"
            )
    return warnings


def _warn_truncated(cut: int, total: int, input_spec: TextInputSpec) -> list[str]:
    if cut == 0:
        return []
    return [
        f"data: {cut} of {total} texts ({cut / total:.1%}) are longer than {input_spec.length} tokens and are cut; raise model.length to keep more"
    ]
