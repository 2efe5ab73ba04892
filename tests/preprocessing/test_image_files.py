"""Files with other endings: what Pillow can read is read, and the rest is named and not dropped in silence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from tests.helpers.box_files import write_voc, write_yolo
from tests.helpers.mask_files import write_images_and_masks
from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import Dataset
from tuner.data import folder, masks, voc, yolo
from tuner.errors import DataError
from tuner.preprocessing.image_decoding import SUFFIXES, load_upright
from tuner.preprocessing.image_files import warn_about_unread_files

CANVAS = ImageInputSpec(32, 32, "nearest", (0.0,) * 3, (1.0,) * 3, "letterbox", 32)
UNREAD = (
    "data: {} left out, since no image is read by this ending: {}; convert what is an image, such "
    "as to .png or .jpg"
)


def write_classes(root: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 40), (40 * i, 90 * label, 7)).save(root / name / f"{i}.png")
    return root


def load_classes(root: Path) -> Dataset:
    return folder.load(
        root.parent / "home", CANVAS, "classification", path=str(root), image=ImageOptions()
    )


def load_masks(root: Path) -> Dataset:
    return masks.load(
        root.parent / "home", CANVAS, "segmentation", path=str(root), image=ImageOptions()
    )


def load_voc(root: Path) -> Dataset:
    return voc.load(root.parent / "home", CANVAS, "detection", path=str(root), image=ImageOptions())


def load_yolo(root: Path) -> Dataset:
    return yolo.load(
        root.parent / "home", CANVAS, "detection", path=str(root), image=ImageOptions()
    )


def write_split_yolo(root: Path) -> Path:
    write_yolo(root)
    (root / "data.yaml").write_text("train: images/\nnames: [blue, red]\n")
    return root


@pytest.mark.parametrize(
    ("write", "load", "place"),
    [
        (write_classes, load_classes, "cat"),
        (lambda root: write_images_and_masks(root, 12), load_masks, "images"),
        (lambda root: write_images_and_masks(root, 12), load_masks, "masks"),
        (write_voc, load_voc, "images"),
        (write_yolo, load_yolo, "images"),
        (write_split_yolo, load_yolo, "images"),
    ],
)
def test_files_of_other_endings_are_counted_in_one_warning(
    write: Callable[[Path], Path], load: Callable[[Path], Dataset], place: str, tmp_path: Path
) -> None:
    root = write(tmp_path / "data")
    before = load(root)
    (root / place / "inner").mkdir()
    for name in ("a.HEIC", "b.heic", "inner/c.heic", "d.svg", "e", ".hidden.heic", "f.txt"):
        (root / place / name).write_bytes(b"x")
    after = load(root)
    said = UNREAD.format("5 files are", "3 .heic, 1 .svg, 1 without an ending")
    assert sorted(after.warnings) == sorted([*before.warnings, said])
    assert after.digest == before.digest


def test_a_class_of_which_nothing_is_read_says_what_is_there(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data")
    for path in (root / "cat").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError) as error:
        load_classes(root)
    assert error.value.problems[0] == UNREAD.format("6 files are", "6 .heic")
    assert "classes with 0 images: 'cat'" in error.value.problems[1]


def test_a_missing_image_is_told_with_what_lies_in_its_place(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data")
    (root / "images" / "03.png").rename(root / "images" / "03.heic")
    with pytest.raises(DataError) as error:
        load_voc(root)
    assert error.value.problems == (
        f"{root}/images/03.jpg: there is no such image",
        UNREAD.format("1 file is", "1 .heic"),
        "data: 1 image is missing",
    )


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JFIF"])
def test_other_names_of_jpeg_are_read(ending: str, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data")
    for path in [*(root / "cat").iterdir(), *(root / "dog").iterdir()]:
        load_upright(path).save(path.with_suffix(".jpg"))
        path.unlink()
    expected = load_classes(root)
    for path in [*(root / "cat").iterdir(), *(root / "dog").iterdir()]:
        path.rename(path.with_suffix(ending))
    data = load_classes(root)
    assert (data.digest, data.warnings) == (expected.digest, ())


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_reads_it(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data")
    Image.new("RGB", (40, 40), (250, 10, 10)).save(root / "dog" / "red.avif", quality=95)
    data = load_classes(root)
    assert ".avif" in SUFFIXES and data.warnings == ()
    x = torch.cat(
        [s.take(torch.arange(len(s)), 0).x for s in (data.full, data.test)]  # type: ignore[misc]
    )
    assert len(x) == 13
    centre = x[:, :, 16, 16].float()
    assert ((centre - torch.tensor([250.0, 10, 10])).abs().amax(1) < 8).any()


def test_many_endings_are_shortened_and_nested_folders_count_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"x.e{i:02d}").touch()
    (warning,) = warn_about_unread_files([tmp_path, tmp_path / "in"])
    assert warning.startswith("data: 12 files are left out") and "… and 2 more" in warning
    assert warn_about_unread_files([tmp_path / "none"]) == []
