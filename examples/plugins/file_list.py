"""A data source: a CSV file with the columns file and label, and split where you choose the splits.

    file,label,split
    photos/001.png,good,train
    photos/002.png,bad,test

In a space file: `data: {name: 'file_list:load', path: photos.csv}`.
"""

import csv
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tuner.api import (
    TEST,
    TRAIN,
    UNSPLIT,
    VALID,
    DataError,
    Dataset,
    ImageOptions,
    InputSpec,
    Items,
    classification_dataset,
    suggest_names,
)

# An example whose cell is empty, or every one without a column `split`, is put into a split by
# tuner: see data.valid, data.test and data.seed.
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST, "": UNSPLIT}


def load(
    home: Path,  # the folder for caches
    input_spec: InputSpec,  # how the model's weights want their examples
    task: str,
    *,
    path: Annotated[str, Field(description="the CSV file; names in it are relative to its folder")],
    classes: Annotated[
        list[str] | None,
        Field(description="the labels in their order; null: all labels, in alphabetical order"),
    ] = None,
    # This one argument stands for all keys of image data: size, augment, valid, test, folds, …
    image: ImageOptions,
) -> Dataset:
    """Reads the list. tuner decodes, splits, augments and caches the images."""
    file = Path(path).expanduser()
    rows = read_rows(file)
    names = tuple(classes or sorted({row["label"] for row in rows}))
    splits = []
    for line, row in enumerate(rows, 2):
        if row["label"] not in names:
            known = suggest_names(row["label"], names)
            raise DataError(f"{file}:{line}: label {row['label']!r} is not a class{known}")
        split = row.get("split") or ""
        if split not in SPLITS:
            raise DataError(f"{file}:{line}: split {split!r}{suggest_names(split, SPLITS)}")
        splits.append(SPLITS[split])
    items = Items(
        examples=[file.parent / row["file"] for row in rows],
        labels=np.array([names.index(row["label"]) for row in rows], np.int64),
        strata=names,  # every split gets the same share of each class
        split=np.array(splits, np.int64),
    )
    return classification_dataset(home, items, image, input_spec)


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of the file by column. Raises DataError, which ends the command with exit code 3."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"data.path: {file}: {error}") from None
    missing = {"file", "label"} - set(columns)
    if missing:
        raise DataError(f"{file}:1: no column {' and no column '.join(sorted(missing))}")
    for line, row in enumerate(rows, 2):
        if not row["file"] or not row["label"]:
            raise DataError(f"{file}:{line}: file and label are needed in every row")
    return rows
