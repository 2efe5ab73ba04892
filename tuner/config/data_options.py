"""The keys that data sources share: how examples are split, and how images are prepared."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tuner.config.augmentation import Augment
from tuner.config.section import Section

Fraction = Annotated[float, Field(gt=0, lt=0.5)]
RgbTriple = tuple[float, float, float]


class SplitOptions(Section):
    """The keys every data source shares: what trains, what validates, what tests."""

    valid: Fraction = Field(
        0.15, description="share for validation, where the data has no such part"
    )
    test: Fraction = Field(
        0.15, description="share for the final test, where the data has no such part"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the split")
    limit: int | None = Field(
        None, ge=10, description="use so many examples of each part, classes in proportion"
    )
    folds: int = Field(
        1,
        ge=1,
        le=20,
        description="cross-validation: a trial is trained so often, "
        "each time with another part of train and valid held out",
    )
    fold: int = Field(
        0, ge=0, le=19, description="which of the folds validates, where one is trained alone"
    )


class ImageOptions(SplitOptions):
    """The keys every source of images shares.

    What is null is taken from the weights' own transform.
    """

    size: int | None = Field(None, ge=8, le=2048, description="side of the square input, pixels")
    resize: int | None = Field(
        None, ge=8, le=4096, description="shorter side before the centre crop, pixels"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        None, description="for resizing"
    )
    mean: RgbTriple | None = Field(None, description="subtracted from RGB in 0..1")
    std: RgbTriple | None = Field(
        None, description="divides RGB in 0..1 after the mean is subtracted"
    )
    augment: Augment = Field(
        "none",
        description="how training images are changed: the name of a policy, or a mapping of its "
        "keys",
    )
    views: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] | None = Field(
        "auto",
        description="augmented versions of each image, seen in turn; auto: 1 without augmentation, "
        "2 with flip, otherwise 4 behind frozen stages and endless where nothing is frozen; null: "
        "drawn anew in each epoch, not cached",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="skip leaves out unreadable images, up to 1 %"
    )


def _check_expression(value: str | None) -> str | None:
    try:
        re.compile(value or "")
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}; such as 'person_(\\d+)_'") from None
    return value


class ImageFileOptions(ImageOptions):
    """The keys of sources whose images are files with names."""

    group: Annotated[str | None, AfterValidator(_check_expression)] = Field(
        None,
        description="a regular expression that finds in a file's name what it shows, such as "
        "'person_(\\d+)_': images of the same are never in different splits; with a slash in it, "
        "it is looked for in the whole path",
    )
