"""Decodes one image to RGB pixels of the canvas, or says why it cannot be read.

Images may have any mode; of several frames the first is taken; EXIF's orientation is applied.
"""

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, features

from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec

MAX_PIXELS = 50_000_000
GREY_BITS = (8, 10, 12, 14, 16)  # that cameras and scanners give
LETTERBOX_GREY = 114  # grey of the borders of a letterboxed image, as in YOLO
# Pillow chooses a decoder by content, not by the file's name, and other formats may start
# programs, as EPS does
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jpe",
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
if "avif" in features.modules and features.check("avif"):  # Pillow 11.3 and later, mostly
    FORMATS, SUFFIXES = (*FORMATS, "AVIF"), SUFFIXES | {".avif"}
RESAMPLING_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Pixels = NDArray[np.uint8]
PathOrPixels = Path | Pixels
"""A file, or an array (h, w) or (h, w, 3) of uint8."""
Picture = PathOrPixels | Image.Image
"""An image in any of the forms that `tuner.load` takes."""

# what Pillow raises for damaged files, beside its own OSError
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


def try_decode(
    picture: Picture, image_spec: ImageInputSpec, name: str | None = None
) -> Pixels | str:
    """The decoded image, or one line that names it and says what is wrong with it."""
    try:
        return decode(picture, image_spec)
    except DECODE_ERRORS as error:
        return f"{name or _name_of(picture)}: {describe_decode_error(error, picture)}"


def _name_of(picture: Picture) -> str:
    if isinstance(picture, Path):
        return str(picture)
    if isinstance(picture, Image.Image):
        return f"image of {picture.width} x {picture.height} pixels"
    return f"array of shape {picture.shape}"


def describe_decode_error(error: BaseException, picture: Picture) -> str:
    """Why an image cannot be read, without its name."""
    if isinstance(error, OSError):
        return error.strerror or str(error).replace(repr(str(picture)), "its content")
    return str(error) or type(error).__name__


@contextlib.contextmanager
def silence_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about odd but readable files, in the whole process.

    So it must not be entered in several threads at once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(picture: Picture, image_spec: ImageInputSpec) -> Pixels:
    """Decode an image to its canvas: uint8 (3, size, size). Raises one of DECODE_ERRORS."""
    with _open_image(picture) as image:
        size = image.size
        # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time;
        # twice the side that is needed keeps the detail
        image.draft("RGB", (2 * image_spec.resize, 2 * image_spec.resize))
        # boxes and masks are placed by the size of the whole image, of which it is a rounded part
        whole_size = _upright(image, size) if image.size != size else None
        upright = _to_rgb(ImageOps.exif_transpose(image), image_spec.grey_bits)
        on_canvas = fit_to_canvas(upright, image_spec, whole_size=whole_size)
        return np.asarray(on_canvas).transpose(2, 0, 1)


def _open_image(picture: Picture) -> Image.Image:
    """The image with its pixels not decoded yet. Raises ValueError if they are too many."""
    image: Image.Image
    if isinstance(picture, Image.Image):
        image = picture
    elif isinstance(picture, Path):
        image = Image.open(picture, formats=FORMATS)
    else:
        image = Image.fromarray(picture)
    # the size is from the header, and no memory for the pixels is allocated yet
    if image.width * image.height > MAX_PIXELS:
        if image is not picture:
            image.close()
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    # what is opened here is closed, and the caller's own image stays open
    return image.copy() if image is picture else image


def _to_rgb(image: Image.Image, grey_bits: int | None) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_eight_bits(np.asarray(image).astype(np.int64), grey_bits)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(grey: NDArray[np.int64], grey_bits: int | None) -> Image.Image:
    """Grey of `grey_bits` bits as 8 bits; Pillow would clip it at 255.

    None: 16 bits, or 8 where the values of this image fit into them.
    """
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65_535:
        raise ValueError(f"its grey values reach from {low} to {high}; save it with 8 or 16 bits")
    if grey_bits is None:
        grey_bits = 16 if high > 255 else 8
    return Image.fromarray((grey >> (grey_bits - 8)).clip(max=255).astype(np.uint8))


def highest_grey(picture: PathOrPixels) -> int:
    """The highest grey value of an image with more than 8 bits of grey; 0 for any other image, and
    for one that cannot be read.
    """
    if not isinstance(picture, Path):
        return 0
    try:
        with _open_image(picture) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I") else 0
    except DECODE_ERRORS:
        return 0


def bits_of_grey(highest: int) -> int:
    """The least of GREY_BITS that hold a grey value; the most where none does."""
    return next((bits for bits in GREY_BITS if highest < 1 << bits), GREY_BITS[-1])


def fit_to_canvas(
    image: Image.Image,
    image_spec: ImageInputSpec,
    interpolation: str | None = None,
    border: int = LETTERBOX_GREY,
    whole_size: tuple[int, int] | None = None,
) -> Image.Image:
    """Resize an image and place it on the model's canvas.

    Args:
        image: an image of mode RGB or L.
        image_spec: the canvas.
        interpolation: a key of `RESAMPLING_FILTERS`; None: that of `image_spec`.
        border: the value of pixels that the image does not cover.
        whole_size: width and height by which it is placed, where it was decoded at a part of its
            size; None: its own.

    Raises:
        ValueError: the resized image would have too many pixels.
    """
    size = image_spec.size
    placement = place_on_canvas(*(whole_size or image.size), image_spec)
    resized_size = (placement.width, placement.height)
    if placement.width * placement.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels, too long and narrow to be enlarged "
            f"to {placement.width} x {placement.height}"
        )
    if resized_size != image.size:
        resampling = RESAMPLING_FILTERS[interpolation or image_spec.interpolation]
        image = image.resize(resized_size, resampling)
    left, top = placement.left, placement.top
    if image_spec.fit == "stretch":
        return image
    if image_spec.fit == "crop":
        return image.crop((-left, -top, size - left, size - top))
    canvas = Image.new(image.mode, (size, size), border if image.mode == "L" else (border,) * 3)
    canvas.paste(image, (left, top))
    return canvas


def load_upright(picture: Picture, grey_bits: int | None = None) -> Image.Image:
    """The whole image in RGB; `grey_bits` as in ImageInputSpec. Raises one of DECODE_ERRORS."""
    with _open_image(picture) as image:
        return _to_rgb(ImageOps.exif_transpose(image), grey_bits)


def upright_size(picture: PathOrPixels) -> tuple[int, int]:
    """Width and height in pixels of an upright image, from its header; (0, 0) if unreadable."""
    if not isinstance(picture, Path):
        return picture.shape[1], picture.shape[0]
    try:
        with Image.open(picture, formats=FORMATS) as image:
            return _upright(image, _stored_size(image))
    except DECODE_ERRORS:
        return 0, 0


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as they are stored; Pillow says those of a TIFF after the orientation."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def _upright(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height after EXIF's orientation is applied."""
    is_quarter_turn = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return size[::-1] if is_quarter_turn else size
