"""scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels, enlarged (Alpaydin and Kaynak, UCI, 1998). Needs no download."""

from pathlib import Path

import numpy as np

from tuner.config.run import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.splits import UNSPLIT, Items

TASKS = ("classification",)


def load(home: Path, input_spec: InputSpec, task: str, *, image: ImageOptions) -> Dataset:
    from sklearn.datasets import load_digits  # here, so that listing the sources stays cheap

    pixels, labels = load_digits(return_X_y=True)
    pictures = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    part = np.full(len(labels), UNSPLIT)
    return classification_dataset(
        home,
        Items(list(pictures), labels.astype(np.int64), tuple("0123456789"), part),
        image,
        input_spec,
    )
