"""Any picture becomes RGB as torchvision's own transform would make it, or says in one line why not."""

import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from tests.helpers.png_headers import png_header
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec
from tuner.preprocessing.image_decoding import (
    decode,
    load_upright,
    silence_pillow,
    try_decode,
    upright_size,
)

EIGHT = ImageInputSpec(8, 8, "bilinear", (0.0,) * 3, (1.0,) * 3)


def colour(path: Path) -> tuple[int, ...]:
    """The middle pixel, decoded."""
    return tuple(int(v) for v in decode(path, EIGHT)[:, 4, 4])


def flat(mode: str, value: object, **options: object) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, (8, 8), value).save(path, **options)


def grey16(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x8040, np.uint16)).save(path)


def see_through_palette(path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(path, transparency=1)


def animated(path: Path) -> None:
    frames = [Image.new("P", (8, 8), 0) for _ in range(3)]
    for frame, shade in zip(frames, (10, 200, 250), strict=True):
        frame.putpalette([shade] * 3)
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("grey.png", flat("L", 77), (77, 77, 77)),
        ("bits.png", flat("1", 1), (255, 255, 255)),
        ("grey16.png", grey16, (128, 128, 128)),
        ("grey16.tif", grey16, (128, 128, 128)),
        ("dark16.png", flat("I;16", 200), (200, 200, 200)),
        ("cmyk.jpg", flat("CMYK", (255, 0, 0, 0), quality=100), (0, 255, 255)),
        ("ycbcr.jpg", flat("YCbCr", (90, 128, 128), quality=100), (90, 90, 90)),
        ("lab.tif", flat("LAB", (255, 128, 128)), None),
        ("rgba.png", flat("RGBA", (200, 0, 0, 0)), (255, 255, 255)),
        ("half.png", flat("RGBA", (0, 0, 0, 128)), (127, 127, 127)),
        ("la.png", flat("LA", (10, 255)), (10, 10, 10)),
        ("palette.png", see_through_palette, (255, 255, 255)),
        ("animated.gif", animated, (10, 10, 10)),
        (
            "animated.webp",
            lambda p: Image.new("RGB", (8, 8), (9, 9, 9)).save(p, save_all=True, lossless=True),
            (9, 9, 9),
        ),
        ("b.bmp", flat("RGB", (1, 2, 3)), (1, 2, 3)),
        ("p.ppm", flat("RGB", (1, 2, 3)), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, name: str, write: Callable[[Path], None], expected: tuple[int, ...] | None
) -> None:
    write(tmp_path / name)
    found = colour(tmp_path / name)
    assert len(found) == 3
    if expected is not None:
        assert found == expected


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # left half white
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    image.save(tmp_path / "a.png", exif=exif)
    upright = decode(tmp_path / "a.png", EIGHT)
    assert upright[0, 0].tolist() == [255] * 8  # the left half is now the upper one
    assert upright[0, 7].tolist() == [0] * 8


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (32, 32), (17, 90)])
def test_resize_and_crop_are_torchvisions(shape: tuple[int, int], interpolation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose(
        [transforms.Resize(32, mode), transforms.CenterCrop(28), transforms.PILToTensor()]
    )
    ours = decode(pixels, ImageInputSpec(28, 32, interpolation, (0.0,) * 3, (1.0,) * 3))
    assert torch.equal(torch.from_numpy(ours.copy()), theirs(Image.fromarray(pixels)))


def bmp_header(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 154, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        + b"\0" * 100
    )


def float_tiff(path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(path)


def grey32_tiff(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 1_000_000, np.int32)).save(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "cannot identify image file its content"),
        ("text.jpg", b"not an image at all\n", "cannot identify image file its content"),
        ("bomb.png", png_header(50_000, 50_000), "2500000000 pixels"),
        ("bomb.bmp", bmp_header(50_000, 50_000), "2500000000 pixels"),
        ("large.png", png_header(10_000, 8_000), "10000 x 8000 pixels, more than 50,000,000"),
        (
            "program.jpg",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
            "cannot identify image file its content",
        ),
        ("missing.jpg", None, "No such file or directory"),
        ("float.tif", float_tiff, "floating-point"),
        ("grey32.tif", grey32_tiff, "grey values reach from 1000000 to 1000000"),
    ],
)
def test_what_cannot_be_read_says_why(
    tmp_path: Path, name: str, content: object, reason: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content):
        content(path)
    start = time.process_time()
    with silence_pillow():
        found = try_decode(path, EIGHT)
    assert isinstance(found, str)
    assert found.startswith(f"{path}: ") and reason in found and "\n" not in found
    assert time.process_time() - start < 1


def test_a_thin_strip_is_not_blown_up() -> None:
    found = try_decode(
        np.zeros((1, 60_000), np.uint8),
        ImageInputSpec(224, 256, "bilinear", (0.0,) * 3, (1.0,) * 3),
    )
    assert (
        found
        == "array of shape (1, 60000): 60000 x 1 pixels, too long and narrow to be enlarged to 15360000 x 256"
    )


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack"),
        TypeError(),
        KeyError("tag"),
        zlib.error("data"),
        Image.DecompressionBombError("bomb"),
    ],
)
def test_whatever_pillow_raises_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def raising(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", raising)
    assert (
        try_decode(tmp_path / "a.png", EIGHT)
        == f"{tmp_path / 'a.png'}: {str(error) or type(error).__name__}"
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp"])
def test_no_cut_or_flipped_byte_raises_anything_else(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    whole = path.read_bytes()
    with silence_pillow():
        for length in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            assert isinstance(try_decode(path, EIGHT), (str, np.ndarray))
        for _ in range(60):
            damaged = bytearray(whole)
            damaged[rng.integers(0, min(300, len(whole)))] = rng.integers(0, 256)
            path.write_bytes(damaged)
            assert isinstance(try_decode(path, EIGHT), (str, np.ndarray))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_photograph_lies_where_its_boxes_and_masks_are_placed(
    tmp_path: Path, orientation: int
) -> None:
    """It is decoded at half of its size, 65 x 35, which would have a row more on the canvas."""
    photograph = Image.new("RGB", (130, 69), "white")
    if orientation == 6:
        photograph = photograph.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph.save(tmp_path / "a.jpg", exif=exif)
    canvas = ImageInputSpec(16, 16, "bilinear", (0.0,) * 3, (1.0,) * 3, "letterbox")
    assert upright_size(tmp_path / "a.jpg") == (130, 69)
    placement = place_on_canvas(130, 69, canvas)
    is_white = decode(tmp_path / "a.jpg", canvas)[0] > 200
    assert is_white.any(1).nonzero()[0].tolist() == list(
        range(placement.top, placement.top + placement.height)
    )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_size_in_the_header_is_that_of_the_upright_image(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    Image.new("RGB", (30, 20)).save(file, exif=exif)
    assert upright_size(file) == load_upright(file).size
