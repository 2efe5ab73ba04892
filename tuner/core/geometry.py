"""Where an image lies on a model's square canvas, so that boxes and masks can follow it there and back."""

from typing import NamedTuple

from tuner.core.input_spec import ImageInputSpec


class Placement(NamedTuple):
    """The whole image is resized to `width` x `height` pixels; its corner lies at (`left`, `top`) of the canvas, below 0 where it is cropped."""

    width: int
    height: int
    left: int
    top: int


def place_on_canvas(width: int, height: int, image_spec: ImageInputSpec) -> Placement:
    """An image of width x height pixels on the canvas."""
    size = image_spec.size
    if image_spec.fit == "letterbox":
        scale = size / max(width, height)
        wide, high = (min(size, max(1, round(side * scale))) for side in (width, height))
        return Placement(wide, high, (size - wide) // 2, (size - high) // 2)
    short = image_spec.resize
    scale = short / min(width, height)
    wide, high = (
        max(short, int(side * scale)) for side in (width, height)
    )  # torchvision's Resize and CenterCrop
    return Placement(wide, high, -round((wide - size) / 2), -round((high - size) / 2))
