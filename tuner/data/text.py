"""Your own texts: csv, tsv or JSON lines with a column of texts and a column of labels.

For text generation also a plain text file with one text per line.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from tuner.config.run import SplitOptions
from tuner.core.input_spec import InputSpec, TextInputSpec
from tuner.core.subset import subset_of
from tuner.core.targets import Labels, labels_of
from tuner.core.types import Dataset
from tuner.data._labelled_rows import ColumnKeys, read_files
from tuner.data._row_targets import TARGET_KINDS, make_items
from tuner.errors import DataError, SpaceError
from tuner.preprocessing import tokenization
from tuner.preprocessing.image_dataset import content_digest
from tuner.preprocessing.splits import (
    SPLIT_NAMES,
    TEST,
    TRAIN,
    VALID,
    Items,
    assign_and_limit_splits,
    check_classes,
    examined_data,
    rows_of,
)

TASKS = ("text_classification", "text_multilabel", "text_regression", "text_generation")
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
        str | tuple[str, ...] | None,
        Field(
            description="the column of the labels; null: guessed from its name; a list: several "
            "columns, for text_multilabel of 1 and 0, for text_regression of numbers"
        ),
    ] = None,
    separator: Annotated[
        str | None,
        Field(
            min_length=1,
            description="what is between several labels in one cell; null: | ; or , whichever "
            "is there",
        ),
    ] = None,
    split: Annotated[
        str | None,
        Field(
            description="the column that says of each row whether it is train, valid or test; "
            "null: the splits are drawn"
        ),
    ] = None,
    group: Annotated[
        str | None,
        Field(
            description="the column whose equal values are never in different splits, such as "
            "patient"
        ),
    ] = None,
    weight: Annotated[
        str | None, Field(description="the column that says how much a row counts in the loss")
    ] = None,
    header: Annotated[
        bool | None, Field(description="whether the first row names the columns; null: guessed")
    ] = None,
    options: SplitOptions,
) -> Dataset:
    """Load texts with labels, or texts to be continued.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: one of TASKS.
        path: a file, or a folder with train, valid and test files.
        text: the column of the texts; None: guessed from its name.
        second: the column of second texts, if a label belongs to a pair of texts.
        label: the column of the labels, or several of them; None: guessed from its name.
        separator: what is between several labels in one cell; None: guessed.
        split: the column that names the split of each row.
        group: the column whose equal values stay together.
        weight: the column that says how much a row counts in the loss.
        header: whether the first row names the columns; None: guessed.
        options: the keys of the `data:` section that say how examples are split.

    Raises:
        DataError: files are missing, unreadable or wrong.
        SpaceError: the model takes no texts.
    """
    if not isinstance(input_spec, TextInputSpec):
        raise SpaceError(
            "data.name: these are texts, but the model wants images; "
            "use a model of texts, such as bert"
        )
    kind = TARGET_KINDS.get(task, "none")
    keys = ColumnKeys(
        "text",
        text,
        USUAL_TEXT_COLUMNS,
        second=second,
        label=label,
        is_labelled=kind != "none",
        split=split,
        group=group,
        weight=weight,
        header=header,
    )
    files = read_files(path, keys, home)
    texts = [cells for file in files.values() for cells in file.examples]
    items = make_items(files, kind, texts, separator)
    if kind == "class":
        check_classes(items)
    items = assign_and_limit_splits(items, options)
    first_texts = [texts[0] for texts in items.examples]
    second_texts = [texts[1] for texts in items.examples] if second is not None else None
    if kind == "none":
        first_texts = tokenization.append_eos(input_spec, first_texts)
    encoded = tokenization.open_token_store(home, input_spec, first_texts, second_texts)
    warnings = (
        *(warning for file in files.values() for warning in file.warnings),
        *_warn_shared_texts(items),
        *_warn_truncated(encoded.truncated_count, len(first_texts), input_spec),
    )
    # texts that are continued have their numbers of tokens instead of labels
    labels = (
        Labels(encoded.lengths)
        if kind == "none"
        else labels_of(items.labels, items.targets, items.weights)
    )
    return _make_dataset(encoded, items, input_spec, labels, warnings)


def _make_dataset(
    encoded: tokenization.EncodedTexts,
    items: Items,
    input_spec: TextInputSpec,
    labels: Labels,
    warnings: tuple[str, ...],
) -> Dataset:
    classes = items.outputs
    content = content_digest(encoded.digest, *labels.content, *classes)

    def make_source(*splits: int) -> tokenization.TextSource:
        rows = rows_of(items, *splits)
        if len(rows) == 0:
            raise DataError(f"data: no {SPLIT_NAMES[splits[0]]} texts")
        return tokenization.TextSource(
            encoded, labels.tree, torch.from_numpy(rows), content_digest(content, rows.tobytes())
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


def _warn_shared_texts(items: Items) -> list[str]:
    """Warnings about validation and test texts that are also training texts."""
    if examined_data() is not None:
        return []  # who examines the data tells all of them

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
