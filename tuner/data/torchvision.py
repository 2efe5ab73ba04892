"""Data sets of torchvision by their names there, for classification.

They are read from `path`, or downloaded to there by torchvision, which checks each file by its MD5.
"""

import inspect
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torchvision import datasets as library

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, suggest_names
from tuner.files.atomic import disk_errors, file_lock
from tuner.files.downloads import DOWNLOADS_FORBIDDEN
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.image_decoding import PathOrPixels
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID, Items

TASKS = ("classification",)
# how each is asked for one of its parts, by the split that it is. A data set with one part alone is
# split by the seed
BY_TRAIN = {TRAIN: {"train": True}, TEST: {"train": False}}
TRAIN_TEST = {TRAIN: {"split": "train"}, TEST: {"split": "test"}}
TRAIN_VAL = {TRAIN: {"split": "train"}, VALID: {"split": "val"}}
ALL_THREE = {TRAIN: {"split": "train"}, VALID: {"split": "val"}, TEST: {"split": "test"}}
TRAINVAL_TEST = {TRAIN: {"split": "trainval"}, TEST: {"split": "test"}}
WHOLE: dict[int, dict[str, Any]] = {UNSPLIT: {}}
PARTS: dict[str, dict[int, dict[str, Any]]] = {
    "CIFAR10": BY_TRAIN,
    "CIFAR100": BY_TRAIN,
    "Country211": {
        TRAIN: {"split": "train"},
        VALID: {"split": "valid"},
        TEST: {"split": "test"},
    },
    "DTD": ALL_THREE,
    "EuroSAT": WHOLE,
    "FGVCAircraft": ALL_THREE,
    "FashionMNIST": BY_TRAIN,
    "Flowers102": ALL_THREE,
    "Food101": TRAIN_TEST,
    "GTSRB": TRAIN_TEST,
    "Imagenette": TRAIN_VAL,
    "KMNIST": BY_TRAIN,
    "MNIST": BY_TRAIN,
    "OxfordIIITPet": TRAINVAL_TEST,
    "RenderedSST2": ALL_THREE,
    "STL10": TRAIN_TEST,
    "SUN397": WHOLE,
    "SVHN": TRAIN_TEST,
    "USPS": BY_TRAIN,
}
LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
FILE_ATTRIBUTES = ("_images", "_image_files")


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    dataset: Annotated[
        str, Field(description="its name in torchvision.datasets, such as Flowers102")
    ],
    path: Annotated[
        str | None,
        Field(description="the folder that has it, or where it is downloaded to; null: the cache"),
    ] = None,
    image: ImageOptions,
) -> Dataset:
    """Load one of torchvision's data sets.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `classification`.
        dataset: its name, a key of PARTS.
        path: torchvision's `root`; None: a folder in tuner's cache.
        image: the image keys of the `data:` section.

    Raises:
        DataError: the name is unknown, `path` is a file, or the download fails.
    """
    known = {name.lower(): name for name in PARTS}
    name = known.get(dataset.lower())
    if name is None:
        raise DataError(
            f"data.dataset: {dataset!r} is not known{suggest_names(dataset, list(PARTS))}"
        )
    root = Path(path).expanduser() if path else home / "data" / name
    if root.exists() and not root.is_dir():
        raise DataError(f"data.path: {path} is a file; expected the folder that holds {name}")
    parts = {split: _open_part(name, root, keys) for split, keys in PARTS[name].items()}
    examples: list[PathOrPixels] = []
    labels: list[int] = []
    splits: list[int] = []
    for split, part in parts.items():
        pictures, part_labels = _read_part(part)
        examples += pictures
        labels += part_labels
        splits += [split] * len(part_labels)
    classes = _class_names(next(iter(parts.values())), max(labels, default=-1) + 1)
    items = Items(examples, np.array(labels, np.int64), classes, np.array(splits, np.int64))
    return classification_dataset(home, items, image, input_spec)


def _open_part(name: str, root: Path, keys: dict[str, Any]) -> Any:
    """One part of a data set; downloaded where it is not there. Raises DataError."""
    kind = getattr(library, name)
    if "loader" in inspect.signature(kind).parameters:
        keys = {**keys, "loader": Path}  # the files are decoded with all others
    try:
        return kind(str(root), **keys)
    except (RuntimeError, OSError, ValueError):  # missing or damaged
        pass
    if DOWNLOADS_FORBIDDEN.get():
        raise DataError(
            f"data.path: {root} does not hold torchvision's {name} yet; `tuner run` downloads it"
        )
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with file_lock(root / f".{name}.lock"):
            try:
                return kind(str(root), **keys, download=True)
            except (
                RuntimeError,
                ValueError,
                OSError,
                zipfile.BadZipFile,
                tarfile.TarError,
                ImportError,
            ) as error:
                first_line = str(error).strip().partition("\n")[0][:300]
                raise DataError(
                    f"data.dataset: {name} cannot be downloaded to {root} "
                    f"({type(error).__name__}: {first_line}); fetch it elsewhere by "
                    f'torchvision.datasets.{name}("FOLDER", download=True), copy the folder, and '
                    "write data: {path: FOLDER}"
                ) from None


def _read_part(part: Any) -> tuple[list[PathOrPixels], list[int]]:
    """The images of a part, files or arrays, and their labels."""
    pictures = list(_pictures(part))
    labels = next((getattr(part, name) for name in LABEL_ATTRIBUTES if hasattr(part, name)), None)
    if labels is None:
        labels = [label for _, label in _samples(part)]
    return pictures, [int(label) for label in labels]


def _pictures(part: Any) -> Iterator[PathOrPixels]:
    if hasattr(part, "data"):
        yield from _arrays(np.asarray(part.data))
        return
    for name in FILE_ATTRIBUTES:
        if hasattr(part, name):
            yield from map(Path, getattr(part, name))
            return
    for file, _ in _samples(part):
        yield Path(file)


def _samples(part: Any) -> Sequence[tuple[Any, int]]:
    samples: Sequence[tuple[Any, int]] = part.samples if hasattr(part, "samples") else part._samples
    return samples


def _arrays(pixels: Any) -> Iterator[Any]:
    """uint8 (h, w) or (h, w, 3) of (n, h, w), (n, h, w, 3) or (n, 3, h, w)."""
    if pixels.ndim == 4 and pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    yield from (np.ascontiguousarray(image) for image in pixels)


def _class_names(part: Any, count: int) -> tuple[str, ...]:
    """The names of the classes; numbers where torchvision has none."""
    names = getattr(part, "classes", None)
    if names is None or len(names) != count:
        return tuple(map(str, range(count)))
    return tuple(" ".join(name) if isinstance(name, tuple) else str(name) for name in names)
