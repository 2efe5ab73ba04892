"""Decodes one mask to a class per pixel: from palette, grey, index or painted files."""

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
    """The class id of each colour; None if masks are not painted in RGB.

    Raises:
        DataError: a colour is unknown or is there twice, or colours and classes differ in number.
    """
    if colours is None:
        return None
    if classes is not None and len(classes) != len(colours):
        raise DataError(
            f"data.colours: {len(colours)}, but data.classes names {len(classes)}; "
            "give one for each"
        )
    try:
        colour_map: dict[tuple[int, ...], int] = {
            ImageColor.getrgb(colour)[:3]: i for i, colour in enumerate(colours)
        }
    except ValueError as error:
        raise DataError(f"data.colours: {error}; write colours such as '#ff0000' or red") from None
    if len(colour_map) < len(colours):
        raise DataError("data.colours: two classes have the same colour; give each its own")
    return colour_map


def make_mask_decoder(
    name: str,
    colour_map: ColourMap,
    transform: Callable[[Path, MaskArray, ImageInputSpec], MaskArray],
) -> ImageDecoder:
    """A decoder that stores `transform(path, values, canvas)` of a mask's values.

    Args:
        name: names the transform: equal names, equal transforms.
        colour_map: the class id of each colour, if masks are painted.
        transform: makes uint8 (1, size, size) of uint8 (h, w).
    """

    def try_decode(picture: PathOrPixels, image_spec: ImageInputSpec) -> MaskArray | str:
        assert isinstance(picture, Path)
        try:
            return transform(picture, decode_mask(picture, colour_map), image_spec)
        except DECODE_ERRORS as error:
            return f"{picture}: {image_decoding.describe_decode_error(error, picture)}"

    return ImageDecoder(f"{name} {colour_map}", 1, try_decode)


def value_flags(_: Path, values: MaskArray, __: ImageInputSpec) -> MaskArray:
    """Which of 256 values a mask has, as an image of 16 x 16 pixels of 0 and 1."""
    flags = np.zeros(256, np.uint8)
    flags[np.unique(values)] = 1
    return flags.reshape(1, 16, 16)


def place_mask(ids: MaskArray, size: tuple[int, int], image_spec: ImageInputSpec) -> MaskArray:
    """A mask on the canvas, uint8 (1, size, size), exactly as its image lies there.

    Args:
        ids: uint8 (h, w), the class of each pixel.
        size: width and height of the image in pixels.
        image_spec: the canvas; what the mask does not cover is IGNORED.
    """
    mask = Image.fromarray(resize_mask(ids, size))
    return np.asarray(image_decoding.fit_to_canvas(mask, image_spec, "nearest", IGNORED))[None]


def resize_mask(ids: MaskArray, size: tuple[int, int]) -> MaskArray:
    """A mask, uint8 (h, w), at the width and height of its image in pixels."""
    if (ids.shape[1], ids.shape[0]) == size:
        return ids
    return np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST)).copy()


def decode_mask(path: Path, colour_map: ColourMap = None) -> MaskArray:
    """The values of an upright mask, uint8 (h, w). Raises one of DECODE_ERRORS.

    They are indices of a palette, grey values, or the ids of colours if there is a `colour_map`.
    """
    with Image.open(path, formats=FORMATS) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels, more than {MAX_PIXELS:,}")
        is_jpeg = file.format == "JPEG"
        image = ImageOps.exif_transpose(file)
        if colour_map is not None:
            return _ids_of_colours(np.asarray(image.convert("RGB")), colour_map)
        values = _grey_values(image)
    return _binarize_jpeg(values) if is_jpeg else values


def _grey_values(image: Image.Image) -> MaskArray:
    values = np.asarray(image)
    if image.mode in ("P", "L", "1"):
        return values.astype(np.uint8)
    if image.mode.startswith("I"):
        if values.min() < 0 or values.max() > 255:
            raise ValueError(
                f"its values reach from {values.min()} to {values.max()}; "
                "class ids are 0 to 254, and 255 is ignored"
            )
        return values.astype(np.uint8)
    if image.mode in ("RGB", "RGBA", "LA"):
        channels = values[..., : 1 if image.mode == "LA" else 3]
        if (channels == channels[..., :1]).all():
            return np.ascontiguousarray(channels[..., 0])
        raise ValueError(
            "painted in colours, not in class ids; write data.colours with each class's colour, "
            "such as ['#000000', '#ff0000'], or save it with one value per class"
        )
    raise ValueError(
        f"its pixels are of mode {image.mode}, which holds no class ids; save it as an 8-bit PNG"
    )


def _ids_of_colours(
    pixels: NDArray[np.uint8], colour_map: Mapping[tuple[int, ...], int]
) -> MaskArray:
    ids = np.full(pixels.shape[:2], IGNORED, np.uint8)
    is_known = np.zeros(pixels.shape[:2], bool)
    for colour, class_id in colour_map.items():
        of_class = (pixels == np.array(colour, np.uint8)).all(-1)
        ids[of_class] = class_id
        is_known |= of_class
    if not is_known.all():
        unknown = "#" + "".join(f"{int(v):02x}" for v in pixels[~is_known][0])
        raise ValueError(
            f"{int((~is_known).sum())} pixels have colours such as {unknown} "
            "that data.colours does not name"
        )
    return ids


def _binarize_jpeg(values: MaskArray) -> MaskArray:
    """The blurred black and white of a JPEG as 0 and 255."""
    if ((values > 63) & (values < 192)).mean() > MAX_BLURRED_SHARE:
        raise ValueError("a JPEG, which blurs class ids, and not black and white; save it as PNG")
    return np.where(values > 127, 255, 0).astype(np.uint8)
