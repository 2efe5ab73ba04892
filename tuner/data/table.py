"""Your own images: a csv, tsv, JSON lines or Parquet file with a column of paths and one of labels.

A label is a class, a set of labels, or one or several numbers, as the task needs it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.data._labelled_rows import ColumnKeys, FileExamples, read_files
from tuner.data._row_targets import TARGET_KINDS, make_items
from tuner.errors import DataError, limit_listing, nearest_hint
from tuner.preprocessing.data_paths import resolve_folder, resolve_path
from tuner.preprocessing.image_dataset import classification_dataset, labelled_dataset
from tuner.preprocessing.image_decoding import SUFFIXES

TASKS = ("classification", "multilabel", "regression")
USUAL_IMAGE_COLUMNS = (
    "image",
    "file",
    "path",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "image_file",
    "image_name",
    "image_id",
    "img",
    "photo",
    "id",
)
MAX_NAMES_COMPARED = 2000  # files of a folder among which the nearest name is looked for


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="a csv, tsv, JSON lines or Parquet file with a row for each image, or a "
            "folder with train, valid and test files"
        ),
    ],
    image: Annotated[
        str | None,
        Field(description="the column of the images' paths; null: guessed from its name"),
    ] = None,
    folder: Annotated[
        str | None,
        Field(description="the folder that the paths begin in; null: that of the file"),
    ] = None,
    label: Annotated[
        str | tuple[str, ...] | None,
        Field(
            description="the column of the labels; null: guessed from its name; a list: several "
            "columns, for multilabel of 1 and 0, for regression of numbers"
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
    options: ImageOptions,
) -> Dataset:
    """Load images that a table lists.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: one of TASKS.
        path: a file, or a folder with train, valid and test files.
        image: the column of the images' paths; None: guessed from its name.
        folder: the folder that the paths begin in; None: that of the file.
        label: the column of the labels, or several of them; None: guessed from its name.
        separator: what is between several labels in one cell; None: guessed.
        split: the column that names the split of each row.
        group: the column whose equal values stay together.
        weight: the column that says how much a row counts in the loss.
        header: whether the first row names the columns; None: guessed.
        options: the image keys of the `data:` section.

    Raises:
        DataError: files are missing, unreadable or wrong.
        SpaceError: the model takes no images.
    """
    keys = ColumnKeys(
        "image",
        image,
        USUAL_IMAGE_COLUMNS,
        label=label,
        split=split,
        group=group,
        weight=weight,
        header=header,
    )
    files = read_files(path, keys, home)
    images = find_images(files, _base_folder(home, path, folder), folder is not None)
    kind = TARGET_KINDS.get(task, "class")
    items = make_items(files, kind, images, separator)
    warnings = [warning for file in files.values() for warning in file.warnings]
    make_dataset = classification_dataset if kind == "class" else labelled_dataset
    return make_dataset(home, items, options, input_spec, warnings)


def _base_folder(home: Path, path: str, folder: str | None) -> Path:
    if folder is not None:
        return resolve_folder(folder, home=home, key="data.folder")
    root = resolve_path(path, home)
    return root if root.is_dir() else root.parent


def find_images(files: dict[int, FileExamples], base: Path, is_stated: bool) -> list[Path]:
    """The path of each image, of all files.

    A path may lack the ending of the image's name.

    Args:
        files: the rows of each split's file.
        base: the folder that relative paths begin in.
        is_stated: whether the file of the user says that folder.

    Raises:
        DataError: images are not there, or an image has two rows.
    """
    names_in: dict[Path, list[str]] = {}
    images: list[Path] = []
    missing: list[str] = []
    first_row: dict[Path, str] = {}
    repeated: list[str] = []
    for file in files.values():
        for index, (cell,) in enumerate(file.examples):
            given = base / Path(cell).expanduser()
            image = given if os.path.isfile(given) else _with_ending(given, names_in)
            location = file.location(index)
            if image is None:
                missing.append(f"{location}: {_describe_missing(cell, given, names_in)}")
                continue
            if image in first_row:
                repeated.append(f"{location}: {cell} is also in the row at {first_row[image]}")
            first_row[image] = location
            images.append(image)
    if missing:
        total = sum(len(file.examples) for file in files.values())
        where = "" if is_stated else "; write data: {folder: …} where they begin in another folder"
        raise DataError(
            *limit_listing(missing),
            f"data.image: {len(missing)} of {total} images are not there (looked in {base}){where}",
        )
    if repeated:
        raise DataError(
            *limit_listing(repeated),
            f"data.image: {len(repeated)} images have more than one row; keep one row of each, "
            "with several labels in one cell, and how much it counts in a column for data.weight",
        )
    return images


def _with_ending(given: Path, names_in: dict[Path, list[str]]) -> Path | None:
    """The one image whose name without ending is this; None where there is none, or several."""
    if given.suffix.lower() in SUFFIXES:
        return None
    names = [n for n in _names(given.parent, names_in) if os.path.splitext(n)[0] == given.name]
    images = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return given.parent / images[0] if len(images) == 1 else None


def _names(folder: Path, names_in: dict[Path, list[str]]) -> list[str]:
    """The names in a folder, read once."""
    if folder not in names_in:
        names_in[folder] = sorted(_list_names(folder))
    return names_in[folder]


def _list_names(folder: Path) -> Iterator[str]:
    try:
        yield from os.listdir(folder)
    except (OSError, ValueError):
        return


def _describe_missing(cell: str, given: Path, names_in: dict[Path, list[str]]) -> str:
    if "://" in cell:
        return f"{cell[:200]} is an address; download the images and write their paths"
    names = _names(given.parent, names_in)
    hint = nearest_hint(given.name, names[:MAX_NAMES_COMPARED])
    return f"{cell[:200]} does not exist{hint}"
