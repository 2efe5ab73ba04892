"""scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels, enlarged. Needs no download.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from pathlib import Path

import numpy as np

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.splits import UNSPLIT, Items

TASKS = ("classification",)


def load(home: Path, input_spec: InputSpec, task: str, *, image: ImageOptions) -> Dataset:
    """Load scikit-learn's digits."""
    from sklearn.datasets import load_digits  # here, so that listing the sources stays cheap

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    split = np.full(len(labels), UNSPLIT)
    items = Items(list(images), labels.astype(np.int64), tuple("0123456789"), split)
    return classification_dataset(home, items, image, input_spec)
