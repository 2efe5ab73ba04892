"""Your own texts: csv, tsv or JSON lines with a column of texts and a column of labels.

For text generation also a plain text file with one text per line.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tuner.config.data_options import SplitOptions
from tuner.core.input_spec import InputSpec, TextInputSpec
from tuner.core.targets import Labels, labels_of
from tuner.core.types import Dataset
from tuner.data._encoded_texts import make_dataset, warn_shared_texts
from tuner.data._labelled_rows import ColumnKeys, read_files
from tuner.data._row_targets import TARGET_KINDS, make_items
from tuner.errors import SpaceError
from tuner.preprocessing import tokenization
from tuner.preprocessing.packed_texts import check_packing, number_streams, open_packed_store
from tuner.preprocessing.splits import assign_and_limit_splits, check_classes

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
    pack: Annotated[
        bool,
        Field(
            description="text_generation: join the texts, each with its end-of-text token, and cut "
            "them into blocks of model.length, so that no token is cut off"
        ),
    ] = False,
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
        pack: whether texts to be continued are joined and cut into blocks.
        options: the keys of the `data:` section that say how examples are split.

    Raises:
        DataError: files are missing, unreadable or wrong.
        SpaceError: the model takes no texts, or the task does not pack them.
    """
    if not isinstance(input_spec, TextInputSpec):
        raise SpaceError(
            "data.name: these are texts, but the model wants images; "
            "use a model of texts, such as bert"
        )
    if pack:
        check_packing(task, second)
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
    file_warnings = [warning for file in files.values() for warning in file.warnings]
    warnings = (*file_warnings, *warn_shared_texts(items))
    first_texts = [texts[0] for texts in items.examples]
    second_texts = [texts[1] for texts in items.examples] if second is not None else None
    if kind == "none":
        first_texts = tokenization.append_eos(input_spec, first_texts)
    if pack:
        streams = number_streams(items, options)
        encoded, items = open_packed_store(home, input_spec, first_texts, items, streams)
    else:
        encoded = tokenization.open_token_store(home, input_spec, first_texts, second_texts)
    warnings += _warn_truncated(encoded.truncated_count, len(first_texts), input_spec, task)
    # texts that are continued have their numbers of tokens instead of labels
    labels = (
        Labels(encoded.lengths)
        if kind == "none"
        else labels_of(items.labels, items.targets, items.weights)
    )
    return make_dataset(encoded, items, input_spec, labels, warnings)


def _warn_truncated(
    truncated_count: int, total: int, input_spec: TextInputSpec, task: str
) -> tuple[str, ...]:
    if truncated_count == 0:
        return ()
    or_pack = ", or write data: {pack: true}" if task == "text_generation" else ""
    return (
        f"data: {truncated_count} of {total} texts ({truncated_count / total:.1%}) are longer "
        f"than {input_spec.length} tokens and are cut; raise model.length to keep more{or_pack}",
    )
