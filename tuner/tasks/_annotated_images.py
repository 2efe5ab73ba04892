"""Images with what is true or predicted drawn onto them, for people to look at."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

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
    """Boxes (left, top, right, bottom) with a word above each, in the colour of their label; thin ones for truth (`dashed`)."""
    shown = image.convert("RGB")
    draw = ImageDraw.Draw(shown)
    width = 1 if dashed else max(2, round(max(image.size) / 250))
    font = ImageFont.load_default(max(10, max(image.size) // 45))
    for (left, top, right, bottom), word, label in zip(boxes, captions, labels, strict=True):
        ink = "white" if dashed else class_colour(label)
        draw.rectangle(
            (min(left, right), min(top, bottom), max(left, right), max(top, bottom)),
            outline=ink,
            width=width,
        )
        if word:
            box = draw.textbbox((left, top), word, font=font)
            up = min(top, box[3] - box[1] + 4)
            draw.rectangle(
                (left, top - up, left + box[2] - box[0] + 6, top - up + box[3] - box[1] + 4),
                fill=ink,
            )
            draw.text((left + 3, top - up - (box[1] - top) + 2), word, fill="white", font=font)
    return shown


def draw_mask(
    image: Image.Image,
    mask: NDArray[np.uint8],
    *,
    background: int | None = 0,
    ignored: int = 255,
    opacity: float = 0.5,
) -> Image.Image:
    """Class ids (h, w) laid over an image of that size, each in its colour; background and ignored pixels stay as they are."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    for label in np.unique(mask):
        if label not in (background, ignored):
            ink = np.array(
                Image.new("RGB", (1, 1), class_colour(int(label) - 1)).getpixel((0, 0)), np.float32
            )
            where = mask == label
            pixels[where] = (1 - opacity) * pixels[where] + opacity * ink
    return Image.fromarray(pixels.round().astype(np.uint8))


def make_contact_sheet(
    rows: Sequence[Sequence[Image.Image]], column_titles: Sequence[str]
) -> bytes:
    """A contact sheet as PNG: a row an example, a column a view of it, under its head."""
    across = len(column_titles)
    whole = Image.new("RGB", (across * TILE_SIDE, 20 + len(rows) * TILE_SIDE), "white")
    draw = ImageDraw.Draw(whole)
    for column, head in enumerate(column_titles):
        draw.text((column * TILE_SIDE + 4, 3), head, fill="black", font=ImageFont.load_default(12))
        for row, views in enumerate(rows):
            tile = views[column].copy()
            tile.thumbnail((TILE_SIDE - 4, TILE_SIDE - 4))
            whole.paste(tile, (column * TILE_SIDE + 2, 20 + row * TILE_SIDE + 2))
    return encode_png(whole)
