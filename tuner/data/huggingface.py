"""Hugging Face datasets: a name on the hub, or a folder that `save_to_disk` wrote (extra
`datasets`).

Images, masks and texts are read from columns, whose names are guessed where the file does not say
them. Images are written to the cache as they are encoded, once. The columns:

    classification                image, label
    segmentation                  image, mask
    detection                     image, objects: a mapping of lists called bbox and category
    text_classification           text, maybe a second text, label
    text_generation               text
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tuner.config import plugins
from tuner.config.data_options import ImageOptions, SplitOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.data._huggingface_columns import HuggingFaceReader, Rows, import_library, write_texts
from tuner.errors import DataError
from tuner.files.downloads import DOWNLOADS_FORBIDDEN
from tuner.preprocessing.packed_texts import check_packing
from tuner.preprocessing.segmentation_dataset import MaskLegend
from tuner.preprocessing.splits import SPLIT_BY_NAME, TRAIN, UNSPLIT
from tuner.preprocessing.unpacked_data import unpack_once

TASKS = (
    "classification",
    "segmentation",
    "detection",
    "text_classification",
    "text_generation",
)
SAVED_MARKS = ("dataset_dict.json", "state.json")  # of a folder that save_to_disk wrote


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(description="the name on the hub, such as beans, or a folder of save_to_disk"),
    ],
    config: Annotated[
        str | None, Field(description="which configuration of the hub's dataset, such as en")
    ] = None,
    revision: Annotated[
        str | None, Field(description="a commit, tag or branch of the hub's dataset")
    ] = None,
    column: Annotated[
        str | None, Field(description="the column of images or texts; null: guessed from its name")
    ] = None,
    second: Annotated[
        str | None, Field(description="the column of second texts, where a label belongs to a pair")
    ] = None,
    label: Annotated[
        str | None,
        Field(description="the column of labels, masks or objects; null: guessed from its name"),
    ] = None,
    group: Annotated[
        str | None,
        Field(
            description="the column whose equal values are never in different splits, such as "
            "patient"
        ),
    ] = None,
    box_format: Annotated[
        Literal["coco", "voc"],
        Field(description="coco: left, top, width, height; voc: left, top, right, bottom; pixels"),
    ] = "coco",
    classes: Annotated[
        list[str] | None,
        Field(description="names of the classes, where the columns do not name them"),
    ] = None,
    ignore: Annotated[
        int, Field(ge=0, le=255, description="the value of mask pixels that count for nothing")
    ] = 255,
    pack: Annotated[
        bool,
        Field(
            description="text_generation: join the texts, each with its end-of-text token, and cut "
            "them into blocks of model.length"
        ),
    ] = False,
    image: ImageOptions,
) -> Dataset:
    """Load a dataset of the Hugging Face hub, or one saved to the disk.

    Args:
        home: the folder with the caches. A dataset of the hub is kept there, so that it is
            downloaded once and stays the same.
        input_spec: how the examples must look for the model's weights.
        task: one of TASKS.
        path: the name on the hub, or the folder.
        config: the configuration of the hub's dataset.
        revision: the commit, tag or branch of the hub's dataset.
        column: the column of images or texts.
        second: the column of second texts.
        label: the column of labels, masks or objects.
        group: the column whose equal values stay together.
        box_format: what the four numbers of a box are.
        classes: the names of the classes, for detection and segmentation.
        ignore: the value of mask pixels that belong to no class.
        pack: whether texts to be continued are joined and cut into blocks.
        image: the image keys of the `data:` section; of texts only those of the split.

    Raises:
        DataError: the dataset is neither on the disk nor can be downloaded, lacks columns, or is
            wrong.
        SpaceError: the library is not installed, or the task packs no texts.
    """
    if pack:
        check_packing(task, second)
    splits = _rows_by_split(_open(home, path, config, revision), path)
    if task.startswith("text_"):
        texts = write_texts(home, path, splits)
        load_texts = plugins.load_plugin("data", "text")
        split = SplitOptions(**{key: getattr(image, key) for key in SplitOptions.model_fields})
        keys: dict[str, Any] = {"text": column, "second": second, "label": label}
        keys |= {"group": group, "pack": pack, "options": split}
        dataset: Dataset = load_texts(home, input_spec, task, path=str(texts), **keys)
        return dataset
    reader = HuggingFaceReader(home, input_spec, image, path, splits, column, label, group)
    if task == "classification":
        return reader.read_classes()
    if task == "segmentation":
        return reader.read_masks(MaskLegend(tuple(classes) if classes else None, ignore))
    return reader.read_boxes(box_format, classes)


def _open(home: Path, path: str, config: str | None, revision: str | None) -> Any:
    """The dataset, as the library gives it: one, or a mapping of them by split."""
    library = import_library()
    folder = Path(path).expanduser()
    if folder.exists() or path.startswith(("/", "./", "../", "~")):
        return _open_saved(library, folder, path)
    key = f"huggingface {path} {config} {revision}"
    saved = unpack_once(home, key, lambda target: _download(path, config, revision, target))
    return library.load_from_disk(str(saved))


def _open_saved(library: Any, folder: Path, path: str) -> Any:
    if not folder.is_dir() or not any((folder / mark).is_file() for mark in SAVED_MARKS):
        state = "does not exist" if not folder.exists() else "is no such folder"
        raise DataError(
            f"data.path: {path} {state} (looked in {Path.cwd()}); expected a folder that "
            "`dataset.save_to_disk` wrote, or a dataset's name on the hub"
        )
    try:
        return library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.path: {path}: cannot be read ({_first_line(error)}); save it anew with "
            "`dataset.save_to_disk`"
        ) from None


def _download(path: str, config: str | None, revision: str | None, target: Path) -> None:
    """Download a dataset of the hub and save it to a folder. Raises DataError."""
    by_hand = (
        f'where there is a network: datasets.load_dataset("{path}").save_to_disk("FOLDER"); then '
        "copy the folder and write data: {path: FOLDER}"
    )
    if DOWNLOADS_FORBIDDEN.get():
        raise DataError(
            f"data.path: {path} is not a folder, and not downloaded from the hub yet; `tuner run` "
            f"does it; or, {by_hand}"
        )
    library = import_library()
    try:
        dataset = library.load_dataset(path, name=config, revision=revision)
        dataset.save_to_disk(str(target))
    except Exception as error:  # network, server, hub and dataset raise what they like
        raise DataError(
            f"data.path: {path}: no such folder, and cannot be downloaded from the hub "
            f"({type(error).__name__}: {_first_line(error)}); {by_hand}"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _rows_by_split(dataset: Any, path: str) -> dict[int, Rows]:
    """The rows of each split; UNSPLIT alone where the dataset is not split. Raises DataError."""
    if not isinstance(dataset, Mapping):
        return {UNSPLIT: dataset}
    splits: dict[int, Rows] = {}
    for name, rows in dataset.items():
        number = SPLIT_BY_NAME.get(str(name).lower())
        if number is not None and number not in splits:
            splits[number] = rows
    if TRAIN not in splits:
        names = ", ".join(map(str, dataset)) or "none"
        raise DataError(f"data.path: {path} has the splits {names}, but no train")
    return splits
