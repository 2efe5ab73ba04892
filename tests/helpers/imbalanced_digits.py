"""scikit-learn's real digits of which some are rare in training, as a data source of one's own."""

from pathlib import Path

import numpy as np

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.splits import TEST, TRAIN, VALID, Items

COMMON, RARE = 60, 6  # training examples of each digit from 0 to 4, and from 5 to 9


def load(home: Path, input_spec: InputSpec, task: str, *, image: ImageOptions) -> Dataset:
    """Validation and test examples are as common of each digit."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows, split = [], []
    for digit in range(10):
        of_digit = np.flatnonzero(labels == digit)[:120]
        count = COMMON if digit < 5 else RARE
        rows += [*of_digit[:count], *of_digit[60:]]
        split += [TRAIN] * count + [VALID] * 30 + [TEST] * 30
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    items = Items(
        [images[row] for row in rows],
        labels[rows].astype(np.int64),
        tuple("0123456789"),
        np.array(split),
    )
    return classification_dataset(home, items, image, input_spec)
