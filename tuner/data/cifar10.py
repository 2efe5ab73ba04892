"""CIFAR-10 (Krizhevsky, 2009) through torchvision: found in `path`, or downloaded there (170 MB) and checked by its MD5."""

from pathlib import Path

import numpy as np

from tuner.core import Data, Preprocess
from tuner.errors import DataError
from tuner.images import TEST, UNSPLIT, Items, dataset
from tuner.run import ImageOptions


def load(home: Path, wanted: Preprocess, *, path: str | None = None, image: ImageOptions) -> Data:
    """`path` is the folder that holds or shall hold `cifar-10-batches-py`; by default it lies in tuner's cache."""
    from torchvision.datasets import CIFAR10

    root = Path(path).expanduser() if path else home / "data"
    root.mkdir(parents=True, exist_ok=True)
    try:
        train, test = (CIFAR10(str(root), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:  # OSError covers urllib's URLError
        archive = root / CIFAR10.filename
        raise DataError(
            f"data: cannot download {CIFAR10.url}: {error}; fetch it elsewhere (MD5 {CIFAR10.tgz_md5}) and place it at {archive}"
        ) from None
    pictures = [*train.data, *test.data]
    labels = np.array([*train.targets, *test.targets], np.int64)
    part = np.array([UNSPLIT] * len(train.data) + [TEST] * len(test.data))
    return dataset(home, Items(pictures, labels, tuple(train.classes), part), image, wanted)
