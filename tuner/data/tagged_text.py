"""Your own texts with a tag for each word, or a label for spans of characters, such as names.

CoNLL files (a word and its tag a line, an empty line behind each sentence), JSON lines or Parquet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from tuner.config.data_options import SplitOptions
from tuner.core.input_spec import InputSpec, TextInputSpec
from tuner.core.targets import IGNORED_TAG, Labels
from tuner.core.types import Dataset
from tuner.data._encoded_texts import make_dataset, warn_shared_texts
from tuner.data._labelled_rows import find_split_files
from tuner.data._tagged_files import SUFFIXES, TaggedFile, TaggedText, read_tagged_file
from tuner.errors import DataError, SpaceError
from tuner.preprocessing import tokenization
from tuner.preprocessing.example_groups import with_groups
from tuner.preprocessing.splits import TRAIN, Items, assign_and_limit_splits
from tuner.preprocessing.word_alignment import align_words

TASKS = ("token_classification",)
MAX_TYPES = 10_000  # so that the tags fit 16 bits


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="a CoNLL file, or JSON lines or Parquet with tokens and tags or with text "
            "and spans; or a folder with train, valid and test files"
        ),
    ],
    group: Annotated[
        str | None,
        Field(
            description="the column of JSON lines or Parquet whose equal values are never in "
            "different splits, such as author; of a CoNLL file document, which is what is between "
            "two lines of -DOCSTART-"
        ),
    ] = None,
    options: SplitOptions,
) -> Dataset:
    """Load texts whose words have tags.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: one of TASKS.
        path: a file, or a folder with train, valid and test files.
        group: what keeps texts in one split: a column, or `document` in a CoNLL file.
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
    files = {
        split: read_tagged_file(file, group)
        for split, file in find_split_files(path, home, SUFFIXES).items()
    }
    items = assign_and_limit_splits(make_items(files), options)
    texts: Sequence[TaggedText] = items.examples
    encoded = tokenization.open_token_store(
        home, input_spec, [text.text for text in texts], None, locate=True
    )
    assert encoded.token_starts is not None
    tags, unseen = align_tags(texts, encoded.token_starts.numpy(), items.outputs)
    items = items.with_examples([text.text for text in texts])
    warnings = (
        *(warning for file in files.values() for warning in file.warnings),
        *warn_shared_texts(items),
        *_warn_truncated(encoded.truncated_count, unseen, texts, input_spec),
    )
    return make_dataset(encoded, items, input_spec, Labels(torch.from_numpy(tags)), warnings)


def make_items(files: Mapping[int, TaggedFile]) -> Items:
    """The texts of all files as items, which are split so that each split has its share of each
    type.

    Raises:
        DataError: no text has an entity, or a type is missing from the training file.
    """
    texts = [text for file in files.values() for text in file.texts]
    types = tuple(sorted(set().union(*(file.types() for file in files.values()))))
    if not types:
        named = ", ".join(str(file.path) for file in files.values())
        raise DataError(
            f"data.path: {named}: every word has the tag O, so there is nothing to learn; tag some "
            "words, or remove the file"
        )
    if len(types) > MAX_TYPES:
        raise DataError(
            f"data.path: {len(types):,} types of entities, more than {MAX_TYPES:,}; is the last "
            "column that of the tags?"
        )
    if TRAIN in files:
        _check_types(files)
    index = {name: number for number, name in enumerate(types)}
    memberships = np.zeros((len(texts), len(types)), np.bool_)
    for row, text in enumerate(texts):
        memberships[row, [index[tag[2:]] for tag in text.tags if tag != "O"]] = True
    counts = memberships.sum(0)
    rarest = np.where(memberships, counts, counts.max() + 1).argmin(1)
    groups = [name for file in files.values() for name in file.groups]
    items = Items(
        texts,
        rarest.astype(np.int64),
        types,
        np.array([split for split, file in files.items() for _ in file.texts], np.int64),
        memberships,
        output_names=("O", *(f"{prefix}-{name}" for name in types for prefix in "BI")),
    )
    return with_groups(items, groups)


def _check_types(files: Mapping[int, TaggedFile]) -> None:
    """Raises DataError where no training text has a type that others have."""
    known = files[TRAIN].types()
    for file in files.values():
        for text, line in zip(file.texts, file.lines, strict=True):
            for tag in text.tags:
                if tag != "O" and tag[2:] not in known:
                    raise DataError(
                        f"data.path: {file.path}:{line}: the type {tag[2:]!r} does not occur in "
                        f"{files[TRAIN].path.name}; add texts with it there, or rename it"
                    )


def align_tags(
    texts: Sequence[TaggedText], token_starts: NDArray[np.int32], tags: Sequence[str]
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The tag of each token, int16 (n, length), IGNORED_TAG for those that are not the first of a
    word; and the number of words of each text that have no token, int64 (n,).
    """
    index = {name: number for number, name in enumerate(tags)}
    aligned = np.full(token_starts.shape, IGNORED_TAG, np.int16)
    unseen = np.zeros(len(texts), np.int64)
    for row, (text, starts) in enumerate(zip(texts, token_starts, strict=True)):
        numbers, positions = align_words(text.words, starts)
        aligned[row, positions] = [index[text.tags[number]] for number in numbers]
        unseen[row] = len(text.words) - len(numbers)
    return aligned, unseen


def _warn_truncated(
    truncated_count: int,
    unseen: NDArray[np.int64],
    texts: Sequence[Any],
    input_spec: TextInputSpec,
) -> list[str]:
    if truncated_count == 0:
        return []
    word_count = sum(len(text.words) for text in texts)
    return [
        f"data: {truncated_count} of {len(texts)} texts ({truncated_count / len(texts):.1%}) are "
        f"longer than {input_spec.length} tokens and are cut; {int(unseen.sum()):,} of "
        f"{word_count:,} words are neither learnt nor scored; raise model.length to keep more"
    ]
