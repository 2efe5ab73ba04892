"""Where an image lies on a model's square canvas, so that boxes and masks can follow it there and back."""

from typing import NamedTuple

from tuner.core.input_spec import Preprocess


class Placement(NamedTuple):
    """The whole image is resized to `width` x `height` pixels; its corner lies at (`left`, `top`) of the canvas, below 0 where it is cropped."""

    width: int
    height: int
    left: int
    top: int


def placed(width: int, height: int, preprocess: Preprocess) -> Placement:
    """An image of width x height pixels on the canvas."""
    size = preprocess.size
    if preprocess.fit == "letterbox":
        scale = size / max(width, height)
        wide, high = (min(size, max(1, round(side * scale))) for side in (width, height))
        return Placement(wide, high, (size - wide) // 2, (size - high) // 2)
    short = preprocess.resize
    scale = short / min(width, height)
    wide, high = (
        max(short, int(side * scale)) for side in (width, height)
    )  # torchvision's Resize and CenterCrop
    return Placement(wide, high, -round((wide - size) / 2), -round((high - size) / 2))
