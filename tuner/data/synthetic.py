"""Made-up images for trying things out.

Each class has stripes of its own direction and colour, under noise.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.splits import UNSPLIT, Items

TASKS = ("classification",)


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    examples: Annotated[
        int, Field(ge=12, le=1_000_000, description="how many images are made")
    ] = 300,
    classes: Annotated[int, Field(ge=2, le=100, description="how many classes they have")] = 3,
    noise: Annotated[
        float,
        Field(ge=0, le=10, description="standard deviation of the noise over the stripes"),
    ] = 0.5,
    image: ImageOptions,
) -> Dataset:
    """Make the images; the same seed gives the same images."""
    rng = np.random.default_rng(image.seed)
    side = image.size or 32
    labels = np.arange(examples) % classes
    y, x = np.mgrid[0:side, 0:side] / side
    angle = np.pi * labels / classes
    phase = rng.uniform(0, 2 * np.pi, examples)
    wave = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    stripes = np.sin(2 * np.pi * 4 * wave + phase[:, None, None])[..., None]
    colour = 0.5 + 0.5 * np.cos(angle[:, None] * 2 + np.array([0.0, 2.0, 4.0]))
    pixels = (
        0.5
        + 0.25 * stripes * colour[:, None, None, :]
        + noise * 0.25 * rng.standard_normal((examples, side, side, 3))
    )
    images = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    names = tuple(f"class{i}" for i in range(classes))
    items = Items(list(images), labels.astype(np.int64), names, np.full(examples, UNSPLIT))
    return classification_dataset(home, items, image, input_spec)
