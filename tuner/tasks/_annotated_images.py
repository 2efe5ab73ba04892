"""Draws true and predicted boxes and masks onto images, for people to look at."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

CLASS_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#808000",
    "#000075",
    "#f032e6",
)
TILE_SIDE = 240  # pixels of a contact sheet's tile


def class_colour(label: int) -> str:
    return CLASS_COLOURS[label % len(CLASS_COLOURS)]


def encode_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def image_of_pixels(pixels: NDArray[np.uint8]) -> Image.Image:
    """(3, h, w) uint8 as an image."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    labels: Sequence[int],
    *,
    dashed: bool = False,
) -> Image.Image:
    """Draw boxes with a caption above each.

    Args:
        image: the image; it is not changed.
        boxes: left, top, right, bottom of each box in pixels.
        captions: the text above each box.
        labels: the class of each box, which decides its colour.
        dashed: draw thin white boxes instead, for the truth.
    """
    annotated = image.convert("RGB")
    draw = ImageDraw.Draw(annotated)
    width = 1 if dashed else max(2, round(max(image.size) / 250))
    font = ImageFont.load_default(max(10, max(image.size) // 45))
    for (left, top, right, bottom), caption, label in zip(boxes, captions, labels, strict=True):
        colour = "white" if dashed else class_colour(label)
        draw.rectangle(
            (min(left, right), min(top, bottom), max(left, right), max(top, bottom)),
            outline=colour,
            width=width,
        )
        if caption:
            box = draw.textbbox((left, top), caption, font=font)
            up = min(top, box[3] - box[1] + 4)
            draw.rectangle(
                (left, top - up, left + box[2] - box[0] + 6, top - up + box[3] - box[1] + 4),
                fill=colour,
            )
            draw.text((left + 3, top - up - (box[1] - top) + 2), caption, fill="white", font=font)
    return annotated


def draw_mask(
    image: Image.Image,
    mask: NDArray[np.uint8],
    *,
    background: int | None = 0,
    ignored: int = 255,
    opacity: float = 0.5,
) -> Image.Image:
    """Colour the pixels of an image by their class ids, uint8 (h, w).

    Pixels of the classes `background` and `ignored` stay as they are.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    for label in np.unique(mask):
        if label not in (background, ignored):
            colour = np.array(ImageColor.getrgb(class_colour(int(label) - 1)), np.float32)
            of_class = mask == label
            pixels[of_class] = (1 - opacity) * pixels[of_class] + opacity * colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def make_contact_sheet(
    rows: Sequence[Sequence[Image.Image]], column_titles: Sequence[str]
) -> bytes:
    """A contact sheet as PNG: one row per example, one column per view of it, under its title."""
    size = (len(column_titles) * TILE_SIDE, 20 + len(rows) * TILE_SIDE)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for column, title in enumerate(column_titles):
        draw.text((column * TILE_SIDE + 4, 3), title, fill="black", font=font)
        for row, views in enumerate(rows):
            tile = views[column].copy()
            tile.thumbnail((TILE_SIDE - 4, TILE_SIDE - 4))
            sheet.paste(tile, (column * TILE_SIDE + 2, 20 + row * TILE_SIDE + 2))
    return encode_png(sheet)
