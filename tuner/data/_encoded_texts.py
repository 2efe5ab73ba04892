"""Datasets of encoded texts, from whatever files they come."""

from typing import Any

import numpy as np
import torch

from tuner.core.input_spec import TextInputSpec
from tuner.core.subset import subset_of
from tuner.core.targets import Labels
from tuner.core.types import Dataset
from tuner.errors import DataError
from tuner.preprocessing import tokenization
from tuner.preprocessing.image_dataset import content_digest
from tuner.preprocessing.splits import (
    SPLIT_NAMES,
    TEST,
    TRAIN,
    VALID,
    Items,
    examined_data,
    rows_of,
)


def make_dataset(
    encoded: tokenization.EncodedTexts,
    items: Items,
    input_spec: TextInputSpec,
    labels: Labels,
    warnings: tuple[str, ...],
) -> Dataset:
    """The dataset of encoded texts with a label for each item. Raises DataError."""
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


def warn_shared_texts(items: Items) -> list[str]:
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
