"""One picture as RGB pixels: any mode, first frame, upright, resized and cropped; or the reason why it cannot be read."""

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec

MAX_PIXELS = 50_000_000
LETTERBOX_GREY = 114  # grey of what a letterboxed image leaves free, as YOLO has it
FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "GIF",
    "TIFF",
    "WEBP",
    "PPM",
)  # others may start programs, as EPS does, whatever the file's name
SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".pbm",
}
RESAMPLING_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Pixels = NDArray[np.uint8]
PathOrPixels = Path | Pixels
"""A file, or an array (h, w) or (h, w, 3) of uint8."""

# what Pillow raises on damaged files, beside its own OSError
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def try_decode(picture: PathOrPixels, image_spec: ImageInputSpec) -> Pixels | str:
    """The decoded picture, or one line that names it and says what is wrong with it."""
    try:
        return decode(picture, image_spec)
    except OSError as error:
        reason = error.strerror or str(error).replace(repr(str(picture)), "its content")
    except DECODE_ERRORS as error:
        reason = str(error) or type(error).__name__
    name = str(picture) if isinstance(picture, Path) else f"array of shape {picture.shape}"
    return f"{name}: {reason}"


@contextlib.contextmanager
def silence_pillow() -> Iterator[None]:
    """Pillow's warnings about odd but readable files are silenced. Not for threads: it changes the whole process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(picture: PathOrPixels, image_spec: ImageInputSpec) -> Pixels:
    """(3, size, size) uint8. Raises one of DAMAGED."""
    image: Image.Image = (
        Image.open(picture, formats=FORMATS)
        if isinstance(picture, Path)
        else Image.fromarray(picture)
    )
    with image:
        if image.width * image.height > MAX_PIXELS:  # the header's word: nothing was allocated yet
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        # a JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time; twice the wanted side keeps the detail
        image.draft("RGB", (2 * image_spec.resize, 2 * image_spec.resize))
        return np.asarray(
            fit_to_canvas(_to_rgb(ImageOps.exif_transpose(image)), image_spec)
        ).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_eight_bits(np.asarray(image).astype(np.int64))
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(grey: NDArray[np.int64]) -> Image.Image:
    """16 bits of grey, which Pillow would clip at 255. Values that fit 8 bits are taken as they are."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65_535:
        raise ValueError(f"its grey values reach from {low} to {high}; save it with 8 or 16 bits")
    return Image.fromarray((grey >> 8 if high > 255 else grey).astype(np.uint8))


def fit_to_canvas(
    image: Image.Image,
    image_spec: ImageInputSpec,
    interpolation: str | None = None,
    border: int = LETTERBOX_GREY,
) -> Image.Image:
    """The image on the model's canvas. What it does not cover is `border`."""
    size = image_spec.size
    at = place_on_canvas(*image.size, image_spec)
    if at.width * at.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels, too long and narrow to be enlarged to {at.width} x {at.height}"
        )
    if (at.width, at.height) != image.size:
        image = image.resize(
            (at.width, at.height), RESAMPLING_FILTERS[interpolation or image_spec.interpolation]
        )
    if image_spec.fit == "crop":
        return image.crop((-at.left, -at.top, size - at.left, size - at.top))
    canvas = Image.new(image.mode, (size, size), border if image.mode == "L" else (border,) * 3)
    canvas.paste(image, (at.left, at.top))
    return canvas


def load_upright(picture: PathOrPixels) -> Image.Image:
    """The whole image in RGB. Raises one of DAMAGED."""
    image: Image.Image = (
        Image.open(picture, formats=FORMATS)
        if isinstance(picture, Path)
        else Image.fromarray(picture)
    )
    with image:
        if image.width * image.height > MAX_PIXELS:  # the header's word: nothing was allocated yet
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        return _to_rgb(ImageOps.exif_transpose(image))


def upright_size(picture: PathOrPixels) -> tuple[int, int]:
    """Width and height of an image as it is seen upright, from its header; (0, 0) where it cannot be read."""
    if not isinstance(picture, Path):
        return picture.shape[1], picture.shape[0]
    try:
        with Image.open(picture, formats=FORMATS) as image:
            turned = image.getexif().get(0x0112, 1) in (
                5,
                6,
                7,
                8,
            )  # EXIF's orientation: a quarter turn
            return (image.height, image.width) if turned else image.size
    except DECODE_ERRORS:
        return 0, 0
