"""Small images with a mask each, drawn: every pixel's colour tells its class, so that what follows an image can be checked."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASS_COLOURS = ((20, 40, 60), (230, 60, 20), (40, 200, 90))  # of classes 0, 1, 2
SIZES = ((40, 30), (31, 47), (32, 32), (64, 20))


def draw_image_and_mask(number: int, classes: int = 2) -> tuple[Image.Image, Image.Image]:
    """An image in RGB and its mask of class ids (mode L); no two numbers give the same."""
    rng = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for label in range(1, classes):
        left, top = rng.integers(0, width // 2), rng.integers(0, height // 2)
        draw.rectangle(
            (
                left,
                top,
                left + rng.integers(8, width // 2 + 4),
                top + rng.integers(6, height // 2 + 2),
            ),
            fill=label,
        )
    return paint_mask(mask), mask


def paint_mask(mask: Image.Image) -> Image.Image:
    return Image.fromarray(np.array(CLASS_COLOURS, np.uint8)[np.asarray(mask)])


def write_images_and_masks(folder: Path, count: int = 12, classes: int = 2) -> Path:
    """`folder` with images/ and masks/ of class ids."""
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, mask = draw_image_and_mask(number, classes)
        image.save(folder / "images" / f"{number:03d}.png")
        mask.save(folder / "masks" / f"{number:03d}.png")
    return folder


SPACE = """
task: segmentation
data: {name: masks, path: x, size: 32, valid: 0.2, test: 0.2}
model: {name: unet/tu-mobilenetv3_small_050, weights: none}
recipe: {lr: 0.003, batch_size: 4, epochs: 2}
search: {trials: 2}
engine: {name: inline, device: cpu}
export: [safetensors]
"""
