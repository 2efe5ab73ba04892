"""CIFAR-10 (Krizhevsky, 2009) through torchvision.

It is read from `path`, or downloaded to there (170 MB) and checked by its MD5.
"""

import tarfile
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError
from tuner.files.atomic import disk_errors, file_lock
from tuner.files.downloads import download
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.splits import TEST, UNSPLIT, Items

TASKS = ("classification",)


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str | None,
        Field(
            description="the folder with CIFAR-10, or where it is downloaded to; null: the cache"
        ),
    ] = None,
    image: ImageOptions,
) -> Dataset:
    """Load CIFAR-10.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `classification`.
        path: the folder that has `cifar-10-batches-py`, or to which it is downloaded; None: a
            folder in tuner's cache.
        image: the image keys of the `data:` section.

    Raises:
        DataError: `path` is a file, or the download fails.
    """
    root = Path(path).expanduser() if path else home / "data"
    if root.name == CIFAR10.base_folder:
        root = root.parent
    if root.exists() and not root.is_dir():
        raise DataError(
            f"data.path: {path} is a file; "
            f"expected the folder that holds or shall hold {CIFAR10.base_folder}"
        )
    try:
        train, test = _read_both(root)
    except RuntimeError:  # missing or damaged
        _download_and_unpack(root)
        train, test = _read_both(root)
    labels = np.array([*train.targets, *test.targets], np.int64)
    split = np.array([UNSPLIT] * len(train.data) + [TEST] * len(test.data))
    items = Items([*train.data, *test.data], labels, tuple(train.classes), split)
    return classification_dataset(home, items, image, input_spec)


def _read_both(root: Path) -> tuple[CIFAR10, CIFAR10]:
    """Training and test images. Raises RuntimeError unless every file is there and has its MD5."""
    return CIFAR10(str(root), train=True), CIFAR10(str(root), train=False)


def _download_and_unpack(root: Path) -> None:
    """Unpack the archive, after downloading it if it is not there."""
    archive = root / CIFAR10.filename
    with disk_errors(archive):
        root.mkdir(parents=True, exist_ok=True)
        with file_lock(root / f".{CIFAR10.filename}.lock"):
            if not check_integrity(str(archive), CIFAR10.tgz_md5):
                download(CIFAR10.url, archive, "data", "md5", CIFAR10.tgz_md5)
            with tarfile.open(archive) as tar:
                tar.extractall(root, filter="data")
