"""Where an image lies on a model's square canvas, so that boxes and masks can be moved there and
back.
"""

from typing import NamedTuple

from tuner.core.input_spec import ImageInputSpec


class Placement(NamedTuple):
    """Where an image lies on the canvas, in pixels.

    The whole image is resized to `width` x `height`. Its top left corner is at (`left`, `top`) of
    the canvas; these are negative where the image is cropped.
    """

    width: int
    height: int
    left: int
    top: int


def place_on_canvas(width: int, height: int, image_spec: ImageInputSpec) -> Placement:
    """The placement of an image of `width` x `height` pixels on the canvas of `image_spec`."""
    size = image_spec.size
    if image_spec.fit == "letterbox":
        scale = size / max(width, height)
        new_width, new_height = (min(size, max(1, round(side * scale))) for side in (width, height))
        return Placement(new_width, new_height, (size - new_width) // 2, (size - new_height) // 2)
    # as torchvision's Resize and CenterCrop do it
    shorter = image_spec.resize
    scale = shorter / min(width, height)
    new_width, new_height = (max(shorter, int(side * scale)) for side in (width, height))
    left, top = -round((new_width - size) / 2), -round((new_height - size) / 2)
    return Placement(new_width, new_height, left, top)
