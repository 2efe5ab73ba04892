"""One mask as a class per pixel: from palette, grey, index or painted files, or the reason why not."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from tuner.core.input_spec import ImageInputSpec
from tuner.core.targets import IGNORED
from tuner.errors import DataError
from tuner.preprocessing import image_decoding
from tuner.preprocessing.image_decoding import DECODE_ERRORS, FORMATS, MAX_PIXELS, PathOrPixels
from tuner.preprocessing.image_store import ImageDecoder

MAX_BLURRED_SHARE = 0.05  # share of a JPEG mask's pixels that may lie between black and white

MaskArray = NDArray[np.uint8]
ColourMap = Mapping[tuple[int, ...], int] | None
"""The id of each colour, where masks are painted in RGB."""


def make_colour_map(colours: Sequence[str] | None, classes: Sequence[str] | None) -> ColourMap:
    """The id of each colour. Raises DataError on what is no colour."""
    if colours is None:
        return None
    if classes is not None and len(classes) != len(colours):
        raise DataError(
            f"data.colours: {len(colours)}, but data.classes names {len(classes)}; give one for each"
        )
    try:
        found: dict[tuple[int, ...], int] = {
            ImageColor.getrgb(colour)[:3]: i for i, colour in enumerate(colours)
        }
    except ValueError as error:
        raise DataError(f"data.colours: {error}; write colours such as '#ff0000' or red") from None
    if len(found) < len(colours):
        raise DataError("data.colours: two classes have the same colour; give each its own")
    return found


def make_mask_decoder(
    name: str,
    colour_map: ColourMap,
    transform: Callable[[Path, MaskArray, ImageInputSpec], MaskArray],
) -> ImageDecoder:
    """A mask's values, and what `then` makes of them to be kept."""

    def attempt(picture: PathOrPixels, preprocess: ImageInputSpec) -> MaskArray | str:
        assert isinstance(picture, Path)
        try:
            return transform(picture, decode_mask(picture, colour_map), preprocess)
        except OSError as error:
            reason = error.strerror or str(error).replace(repr(str(picture)), "its content")
        except DECODE_ERRORS as error:
            reason = str(error) or type(error).__name__
        return f"{picture}: {reason}"

    return ImageDecoder(f"{name} {colour_map}", 1, attempt)


def value_flags(_: Path, values: MaskArray, __: ImageInputSpec) -> MaskArray:
    """Which of 256 values a mask has, as an image of 16 x 16 pixels."""
    found = np.zeros(256, np.uint8)
    found[np.unique(values)] = 1
    return found.reshape(1, 16, 16)


def place_mask(ids: MaskArray, size: tuple[int, int], image_spec: ImageInputSpec) -> MaskArray:
    """A mask on the canvas, (1, size, size), as its image of `size` (width, height) lies there; IGNORED around it."""
    mask = Image.fromarray(ids)
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.NEAREST)
    return np.asarray(image_decoding.fit_to_canvas(mask, image_spec, "nearest", IGNORED))[None]


def decode_mask(path: Path, colour_map: ColourMap = None) -> MaskArray:
    """A mask's values, uint8 (h, w), upright: indices of a palette, grey values, or ids of colours. Raises one of DAMAGED."""
    with Image.open(path, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels, more than {MAX_PIXELS:,}")
        lossy = opened.format == "JPEG"
        image = ImageOps.exif_transpose(opened)
        if colour_map is not None:
            return _ids_of_colours(np.asarray(image.convert("RGB")), colour_map)
        values = _grey_values(image)
    return _binarize_jpeg(values) if lossy else values


def _grey_values(image: Image.Image) -> MaskArray:
    values = np.asarray(image)
    if image.mode in ("P", "L", "1"):
        return values.astype(np.uint8)
    if image.mode.startswith("I"):
        if values.min() < 0 or values.max() > 255:
            raise ValueError(
                f"its values reach from {values.min()} to {values.max()}; class ids are 0 to 254, and 255 is ignored"
            )
        return values.astype(np.uint8)
    if image.mode in ("RGB", "RGBA", "LA"):
        shown = values[..., : 1 if image.mode == "LA" else 3]
        if (shown == shown[..., :1]).all():
            return np.ascontiguousarray(shown[..., 0])
        raise ValueError(
            "painted in colours, not in class ids; write data.colours with each class's colour, such as ['#000000', '#ff0000'], "
            "or save it with one value per class"
        )
    raise ValueError(
        f"its pixels are of mode {image.mode}, which holds no class ids; save it as an 8-bit PNG"
    )


def _ids_of_colours(pixels: NDArray[np.uint8], inks: Mapping[tuple[int, ...], int]) -> MaskArray:
    found = np.full(pixels.shape[:2], IGNORED, np.uint8)
    known = np.zeros(pixels.shape[:2], bool)
    for ink, value in inks.items():
        where = (pixels == np.array(ink, np.uint8)).all(-1)
        found[where] = value
        known |= where
    if not known.all():
        other = "#" + "".join(f"{int(v):02x}" for v in pixels[~known][0])
        raise ValueError(
            f"{int((~known).sum())} pixels have colours such as {other} that data.colours does not name"
        )
    return found


def _binarize_jpeg(values: MaskArray) -> MaskArray:
    """A JPEG's blurred black and white as 0 and 255."""
    if ((values > 63) & (values < 192)).mean() > MAX_BLURRED_SHARE:
        raise ValueError("a JPEG, which blurs class ids, and not black and white; save it as PNG")
    return np.where(values > 127, 255, 0).astype(np.uint8)
