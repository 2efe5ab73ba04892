"""Your own texts: csv, tsv or JSON lines with a column of texts and a column of labels.

For text generation also a plain text file with one text per line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from tuner.config.run import SplitOptions
from tuner.core.input_spec import InputSpec, TextInputSpec
from tuner.core.subset import subset_of
from tuner.core.types import Dataset
from tuner.data._rows import KIND_BY_SUFFIX, TableRows, read_rows
from tuner.errors import DataError, SpaceError, limit_listing, nearest_hint
from tuner.preprocessing import tokenization
from tuner.preprocessing.data_paths import resolve_path
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
    group_by_split,
    require_one_per_split,
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
MAX_EMPTY_ONE_IN = 100  # one in so many texts may be empty


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="a csv, tsv, JSON lines or text file, "
            "or a folder with train, valid and test files"
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
    """Load texts with labels, or texts to be continued.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `text_classification` or `text_generation`.
        path: a file, or a folder with train, valid and test files.
        text: the column of the texts; None: guessed from its name.
        second: the column of second texts, if a label belongs to a pair of texts.
        label: the column of the labels; None: guessed from its name.
        header: whether the first row names the columns; None: guessed.
        split: the keys of the `data:` section that say how examples are split.

    Raises:
        DataError: files are missing, unreadable or wrong.
        SpaceError: the model takes no texts.
    """
    if not isinstance(input_spec, TextInputSpec):
        raise SpaceError(
            "data.name: these are texts, but the model wants images; "
            "use a model of texts, such as bert"
        )
    is_labelled = task == "text_classification"
    names = [name for name in (text, second, label) if name is not None]
    expected_columns = (*names, *USUAL_TEXT_COLUMNS, *USUAL_LABEL_COLUMNS)
    examples = {
        number: _read_examples(
            read_rows(file, header, expected_columns), text, second, label, is_labelled
        )
        for number, file in _find_split_files(path).items()
    }
    items = _make_items(examples, is_labelled)
    if is_labelled:
        check_classes(items)
    items = assign_and_limit_splits(items, split)
    first_texts = [texts[0] for texts in items.examples]
    second_texts = [texts[1] for texts in items.examples] if second is not None else None
    if not is_labelled:
        first_texts = tokenization.append_eos(input_spec, first_texts)
    encoded = tokenization.open_token_store(home, input_spec, first_texts, second_texts)
    warnings = (
        *(warning for file_examples in examples.values() for warning in file_examples.warnings),
        *_warn_shared_texts(items),
        *_warn_truncated(encoded.truncated_count, len(first_texts), input_spec),
    )
    return _make_dataset(encoded, items, input_spec, is_labelled, warnings)


def _make_dataset(
    encoded: tokenization.EncodedTexts,
    items: Items,
    input_spec: TextInputSpec,
    is_labelled: bool,
    warnings: tuple[str, ...],
) -> Dataset:
    labels = torch.from_numpy(items.labels) if is_labelled else encoded.lengths
    classes = items.strata if is_labelled else ()
    content = content_digest(encoded.digest, labels.numpy().tobytes(), *classes)

    def make_source(*splits: int) -> tokenization.TextSource:
        rows = np.flatnonzero(np.isin(items.split, splits))
        if len(rows) == 0:
            raise DataError(f"data: no {SPLIT_NAMES[splits[0]]} texts")
        return tokenization.TextSource(
            encoded, labels, torch.from_numpy(rows), content_digest(content, rows.tobytes())
        )

    train, valid, test = make_source(TRAIN), make_source(VALID), make_source(TEST)
    full = make_source(TRAIN, VALID)
    digest = content_digest(content, train.digest, valid.digest, test.digest)
    return Dataset(
        train=subset_of(full, train),
        valid=subset_of(full, valid),
        test=test,
        full=full,
        classes=classes,
        input_spec=input_spec,
        digest=digest,
        warnings=warnings,
    )


def _find_split_files(path: str) -> dict[int, Path]:
    """The file of each split; UNSPLIT alone where `path` is a file."""
    root = resolve_path(path)
    if not root.is_dir():
        return {UNSPLIT: root}
    names = sorted(root.iterdir())
    groups = group_by_split(
        file for file in names if file.is_file() and file.suffix.lower() in ("", *KIND_BY_SUFFIX)
    )
    if TRAIN not in groups:
        listed = ", ".join(limit_listing([file.name for file in names])) or "nothing"
        raise DataError(
            f"data.path: {path} has no train file, such as train.csv (it holds {listed}); "
            "name the file itself where there is one"
        )
    return require_one_per_split(groups, path)


@dataclass(frozen=True)
class FileExamples:
    """The examples of one file.

    Args:
        path: the file.
        texts: one text or a pair of texts per example.
        labels: the label of each example; empty if the examples have no labels.
        lines: the number of the line at which each example begins.
        warnings: what is odd about the file.
    """

    path: Path
    texts: list[tuple[str, ...]]
    labels: list[str]
    lines: list[int]
    warnings: tuple[str, ...]


def _read_examples(
    table: TableRows, text: str | None, second: str | None, label: str | None, is_labelled: bool
) -> FileExamples:
    """The rows of a file whose text is not empty. Raises DataError."""
    text_columns, label_column = _find_columns(table, text, second, label, is_labelled)
    texts = [tuple(row[i].strip() for i in text_columns) for row in table.values]
    rows = [i for i, row_texts in enumerate(texts) if row_texts[0]]
    empty_lines = [table.lines[i] for i, row_texts in enumerate(texts) if not row_texts[0]]
    warnings = _check_empty_texts(table, empty_lines)
    lines = [table.lines[i] for i in rows]
    labels: list[str] = []
    if label_column is not None:
        labels = [table.values[i][label_column].strip() for i in rows]
        _check_labels_present(table, labels, lines)
    return FileExamples(table.path, [texts[i] for i in rows], labels, lines, warnings)


def _find_columns(
    table: TableRows, text: str | None, second: str | None, label: str | None, is_labelled: bool
) -> tuple[list[int], int | None]:
    """The columns of the texts, one or two, and the column of the labels, if there are labels."""
    label_column = None
    if is_labelled:
        named = [] if text is None else [_find_column(table, "text", text, (), [])]
        label_column = _find_column(table, "label", label, USUAL_LABEL_COLUMNS, named)
    taken = [] if label_column is None else [label_column]
    text_columns = [_find_column(table, "text", text, USUAL_TEXT_COLUMNS, taken)]
    if second is not None:
        text_columns.append(_find_column(table, "second", second, (), []))
    return text_columns, label_column


def _find_column(
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
    if len(likely) == 1 or (likely and key == "text" and len(free) > 1 and len(set(likely)) == 1):
        return likely[0]
    if len(free) == 1 and not likely:
        return free[0]
    problem = "several columns may be it" if likely else "no column has a usual name"
    listed = ", ".join(repr(table.columns[i]) for i in (likely or free))
    raise DataError(
        f"data.{key}: which column of {table.path} holds the {key}s? {problem}: {listed}; "
        f"write data: {{{key}: …}}"
    )


def _check_empty_texts(table: TableRows, lines: list[int]) -> tuple[str, ...]:
    """A warning about empty texts, which are left out. Raises DataError if they are many."""
    if not lines:
        return ()
    summary = (
        f"data.path: {table.path}: {len(lines)} of {len(table.values)} texts are empty, "
        f"at {_format_lines(lines)}"
    )
    if len(lines) > max(1, len(table.values) // MAX_EMPTY_ONE_IN):
        raise DataError(
            f"{summary}; fill or remove them (one in {MAX_EMPTY_ONE_IN} is left out with a warning)"
        )
    return (f"{summary}; left out",)


def _check_labels_present(table: TableRows, labels: Sequence[str], lines: Sequence[int]) -> None:
    missing = [line for line, label in zip(lines, labels, strict=True) if not label]
    if missing:
        raise DataError(
            f"data.path: {table.path}: {len(missing)} rows without a label, "
            f"at {_format_lines(missing)}; label or remove them"
        )


def _format_lines(lines: Sequence[int]) -> str:
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(limit_listing(list(map(str, lines))))}"


def _make_items(examples: dict[int, FileExamples], is_labelled: bool) -> Items:
    """The examples of all splits as items.

    The classes are the labels that occur: numbers in the order of their values, before other
    labels in the order of the alphabet.
    """
    texts = [text for file_examples in examples.values() for text in file_examples.texts]
    split = np.concatenate(
        [
            np.full(len(file_examples.texts), number, np.int64)
            for number, file_examples in examples.items()
        ]
    )
    if not is_labelled:
        return Items(texts, np.zeros(len(texts), np.int64), ("texts",), split)
    names = [name for file_examples in examples.values() for name in file_examples.labels]
    classes = tuple(
        sorted(set(names), key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
    )
    _check_labels(examples, len(classes), len(texts))
    index = {name: i for i, name in enumerate(classes)}
    return Items(texts, np.array([index[name] for name in names], np.int64), classes, split)


def _check_labels(examples: dict[int, FileExamples], class_count: int, total: int) -> None:
    """Raise DataError if there are too many labels, or labels that no training text has."""
    if class_count > max(20, total // 2):
        raise DataError(
            f"data.label: {class_count} different labels of {total} texts; "
            "is it the right column? write data: {label: …}"
        )
    if TRAIN not in examples:
        return
    train = examples[TRAIN]
    for file_examples in examples.values():
        unknown = sorted(set(file_examples.labels) - set(train.labels))
        if unknown:
            line = file_examples.lines[file_examples.labels.index(unknown[0])]
            raise DataError(
                f"data.path: {file_examples.path}:{line}: the label {unknown[0]!r} "
                f"does not occur in {train.path.name}"
            )


def _warn_shared_texts(items: Items) -> list[str]:
    """Warnings about validation and test texts that are also training texts."""

    def texts_of(split: int) -> list[Any]:
        return [items.examples[int(i)] for i in np.flatnonzero(items.split == split)]

    train_texts = set(texts_of(TRAIN))
    warnings = []
    for split in (VALID, TEST):
        texts = texts_of(split)
        shared_count = sum(text in train_texts for text in texts)
        if shared_count:
            warnings.append(
                f"data: {shared_count} of {len(texts)} {SPLIT_NAMES[split]} texts are also "
                "training texts, so scores flatter; remove duplicates"
            )
    return warnings


def _warn_truncated(truncated_count: int, total: int, input_spec: TextInputSpec) -> list[str]:
    if truncated_count == 0:
        return []
    return [
        f"data: {truncated_count} of {total} texts ({truncated_count / total:.1%}) are longer "
        f"than {input_spec.length} tokens and are cut; raise model.length to keep more"
    ]
