"""Masks: of every kind, on the canvas exactly as their images are, and checked; the folders they lie in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CommandResult
from tests.helpers.mask_files import (
    CLASS_COLOURS,
    SPACE,
    draw_image_and_mask,
    paint_mask,
    write_images_and_masks,
)
from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import Dataset
from tuner.data.masks import load
from tuner.data.voc import load as load_voc
from tuner.errors import DataError, SpaceError
from tuner.preprocessing.mask_decoding import decode_mask
from tuner.preprocessing.segmentation_dataset import (
    MaskLegend,
    resolve_classes,
    voc_segmentation_dataset,
)

CANVAS = ImageInputSpec(32, 32, "nearest", (0.0,) * 3, (1.0,) * 3, "letterbox", 32)


def loaded(
    folder: Path,
    home: Path,
    wanted: ImageInputSpec = CANVAS,
    keys: dict[str, Any] | None = None,
    **options: Any,
) -> Dataset:
    return load(
        home,
        wanted,
        "segmentation",
        path=str(folder),
        image=ImageOptions(**options),
        **(keys or {}),
    )


def everything(data: Dataset, view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data.train.take(torch.arange(len(data.train)), view)
    assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return x, y


@pytest.mark.parametrize("fit", ["letterbox", "crop"])
@pytest.mark.parametrize("view", [0, 1])
def test_a_mask_lies_where_its_image_lies_whatever_its_shape_and_mirrored_too(
    fit: str, view: int, tmp_path: Path
) -> None:
    wanted = ImageInputSpec(32, 36, "nearest", (0.0,) * 3, (1.0,) * 3, fit)
    data = loaded(
        write_images_and_masks(tmp_path / "s", 12, 3),
        tmp_path / "home",
        wanted,
        augment="flip",
        views=2,
    )
    assert data.classes == ("0", "1", "2")
    x, y = everything(data, view)
    assert x.shape[1:] == (3, 32, 32) and y.shape[1:] == (32, 32) and y.dtype == torch.uint8
    inks = torch.tensor(CLASS_COLOURS, dtype=torch.uint8)
    inside = y != 255
    assert torch.equal(x.permute(0, 2, 3, 1)[inside], inks[y[inside].long()])
    assert (
        torch.equal(inside, ~(x == 114).all(1)) if fit == "letterbox" else inside.all()
    )  # around it the border of letterboxes
    assert not torch.equal(y, everything(data, 1 - view)[1])


def test_a_mask_follows_the_way_its_image_is_turned_by_its_camera(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 12)
    _, mask = draw_image_and_mask(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    paint_mask(mask.transpose(Image.Transpose.ROTATE_90)).save(
        folder / "images" / "000.png", exif=exif
    )
    for part in range(3):
        data = loaded(folder, tmp_path / f"home{part}", seed=part)
        x, y = everything(data)
        assert torch.equal(
            x.permute(0, 2, 3, 1)[y == 1].unique(dim=0),
            torch.tensor([CLASS_COLOURS[1]], dtype=torch.uint8),
        )


def as_kind(mask: Image.Image, kind: str) -> tuple[Image.Image, str]:
    values = np.asarray(mask)
    if kind == "palette":
        image = Image.fromarray(values)
        image.putpalette([v for ink in CLASS_COLOURS for v in ink])
        return image, "png"
    if kind == "sixteen":
        return Image.fromarray(values.astype(np.uint16)), "png"
    if kind == "binary":
        return Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8)), "png"
    if kind == "one bit":
        return Image.fromarray(values > 0), "png"
    if kind == "grey in rgb":
        return Image.fromarray(
            np.repeat(np.where(values > 0, 255, 0).astype(np.uint8)[..., None], 3, 2)
        ), "png"
    return Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8)), "jpg"


@pytest.mark.parametrize("kind", ["palette", "sixteen", "binary", "one bit", "grey in rgb", "jpeg"])
def test_masks_of_every_kind_say_the_same(kind: str, tmp_path: Path) -> None:
    expected = loaded(write_images_and_masks(tmp_path / "plain"), tmp_path / "home")
    folder = write_images_and_masks(tmp_path / "other")
    for number in range(12):
        image, ending = as_kind(draw_image_and_mask(number)[1], kind)
        (folder / "masks" / f"{number:03d}.png").unlink()
        image.save(
            folder / "masks" / f"{number:03d}.{ending}",
            **({"quality": 95} if ending == "jpg" else {}),
        )
    data = loaded(folder, tmp_path / "home")
    assert torch.equal(everything(data)[1], everything(expected)[1])
    assert data.classes == (
        ("background", "foreground") if kind in ("binary", "grey in rgb", "jpeg") else ("0", "1")
    )
    assert [w for w in data.warnings if "are JPEG, which blurs edges" in w] == (
        list(data.warnings) if kind == "jpeg" else []
    )


def test_painted_masks_are_read_by_their_colours(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 12, 3)
    expected = everything(loaded(folder, tmp_path / "home"))[1]
    for number in range(12):
        paint_mask(draw_image_and_mask(number, 3)[1]).save(folder / "masks" / f"{number:03d}.png")
    with pytest.raises(
        DataError, match=r"000.png: painted in colours, not in class ids; write data.colours"
    ):
        loaded(folder, tmp_path / "home")
    colours = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in CLASS_COLOURS]
    data = loaded(folder, tmp_path / "home", keys={"colours": colours, "classes": ["a", "b", "c"]})
    assert data.classes == ("a", "b", "c")
    assert torch.equal(everything(data)[1], expected)
    with pytest.raises(
        DataError, match=r"have colours such as #28c85a that data.colours does not name"
    ):
        loaded(folder, tmp_path / "home", keys={"colours": colours[:2]})
    with pytest.raises(DataError, match=r"data.colours: unknown color specifier: 'reddish'"):
        loaded(folder, tmp_path / "home", keys={"colours": ["reddish"]})


def test_a_value_can_be_ignored(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 12, 3)
    y = everything(loaded(folder, tmp_path / "home"))[1]
    ignoring = loaded(folder, tmp_path / "home", keys={"ignore": 2})
    assert ignoring.classes == ("0", "1")
    assert torch.equal(everything(ignoring)[1], y.masked_fill(y == 2, 255))


@pytest.mark.parametrize(
    ("ignore", "problem"),
    [
        (0, r"all 1 masks hold only '2' \(id 2\) beside the ignored 0 \(data.ignore\)"),
        (2, r"all 1 masks hold only '0' \(id 0\) beside the ignored 2 \(data.ignore\)"),
    ],
)
def test_an_ignored_value_is_no_background_of_masks_with_two_values(
    ignore: int, problem: str
) -> None:
    flags = np.isin(np.arange(256), (0, 2))[None]
    assert resolve_classes(flags, [Path("a.png")], MaskLegend())[0] == ("background", "foreground")
    with pytest.raises(DataError, match=problem):
        resolve_classes(flags, [Path("a.png")], MaskLegend(ignore=ignore))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_whose_pixels_are_all_ignored_is_refused(split: str, tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        write_images_and_masks(tmp_path / part, 2)
    for file in (tmp_path / split / "masks").iterdir():
        with Image.open(file) as mask:
            Image.new("L", mask.size, 255).save(file)
    name = {"train": "training", "valid": "validation", "test": "test"}[split]
    with pytest.raises(DataError, match=f"all pixels of the 2 {name} masks are ignored"):
        loaded(tmp_path, tmp_path / "home")


def test_ids_beyond_the_named_classes_are_refused_with_the_files(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 12, 3)
    with pytest.raises(DataError) as error:
        loaded(folder, tmp_path / "home", keys={"classes": ["sky", "sea"]})
    *files, why = error.value.problems
    assert (
        files[0].endswith("masks/000.png: class id 2")
        and len(files) == 11
        and files[10] == "… and 2 more"
    )
    assert why.startswith(
        "data: 12 masks have ids beyond the 2 classes sky, sea (0 to 1); name all of them in data.classes"
    )


def test_masks_of_one_class_are_refused(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 6)
    for number in range(6):
        Image.new("L", draw_image_and_mask(number)[1].size, 0).save(
            folder / "masks" / f"{number:03d}.png"
        )
    with pytest.raises(
        DataError,
        match=r"all 6 masks hold only 'sky' \(id 0\); segmentation needs pixels of at least 2 classes",
    ):
        loaded(folder, tmp_path / "home", keys={"classes": ["sky", "sea"]})


def test_a_mask_of_another_size_is_resized_and_of_another_shape_refused(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 12)
    expected = everything(loaded(folder, tmp_path / "home"))[1]
    for number in (0, 5):
        mask = draw_image_and_mask(number)[1]
        mask.resize((mask.width * 3, mask.height * 3), Image.Resampling.NEAREST).save(
            folder / "masks" / f"{number:03d}.png"
        )
    data = loaded(folder, tmp_path / "home")
    assert torch.equal(everything(data)[1], expected)
    assert data.warnings[0].startswith(
        "data: 2 of 12 masks have another size than their image, and are resized to it: "
    )
    Image.new("L", (9, 50)).save(folder / "masks" / "001.png")
    with pytest.raises(DataError) as error:
        loaded(folder, tmp_path / "home")
    assert error.value.problems[0].endswith(
        f"masks/001.png: 9 x 50 pixels, but {folder}/images/001.png has 31 x 47"
    )
    assert error.value.problems[1].startswith("data: 1 masks have another shape than their image")


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 30)
    for number in range(12):
        (folder / "masks" / f"{number:03d}.png").unlink()
    (folder / "images" / "020.png").unlink()
    (folder / "masks" / ".DS_Store").write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        loaded(folder, tmp_path / "home")
    *files, why = error.value.problems
    assert files[0] == f"{folder}/images/000.png: no mask {folder}/masks/000.png"
    assert len(files) == 11 and files[10] == "… and 3 more"
    assert why.startswith("data: 13 images and masks have no partner of the same name")


def test_unreadable_masks_are_named_and_few_may_be_left_out(tmp_path: Path) -> None:
    folder = write_images_and_masks(tmp_path / "s", 12)
    (folder / "masks" / "003.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"masks/003.png: cannot identify image file"):
        loaded(folder, tmp_path / "home")
    data = loaded(folder, tmp_path / "home", on_bad_image="skip")
    assert sum(map(len, (data.train, data.valid, data.test))) == 11
    assert "003.png" in data.warnings[1]


def test_a_jpeg_of_class_ids_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.arange(100, 164, dtype=np.uint8), (64, 1))).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="a JPEG, which blurs class ids, and not black and white"):
        decode_mask(tmp_path / "a.jpg")


@pytest.mark.parametrize(("name", "parts"), [("train/images", False), ("images/train", True)])
def test_the_parts_may_be_given(name: str, parts: bool, tmp_path: Path) -> None:
    for n, part in enumerate(("train", "valid", "test")):
        made = write_images_and_masks(tmp_path / part, 12 + n)
        for kind in ("images", "masks"):
            place = tmp_path / "s" / (f"{kind}/{part}" if parts else f"{part}/{kind}")
            place.parent.mkdir(parents=True, exist_ok=True)
            (made / kind).rename(place)
    data = loaded(tmp_path / "s", tmp_path / "home")
    assert [len(source) for source in (data.train, data.valid, data.test)] == [12, 13, 14]
    assert data.warnings[0].startswith("data: 25 images lie in two parts with the same content")


def test_a_missing_folder_gets_the_nearest_name(tmp_path: Path) -> None:
    write_images_and_masks(tmp_path / "s")
    with pytest.raises(DataError, match=r"s/mask is not a folder .*; did you mean 'masks'\?"):
        loaded(tmp_path / "s", tmp_path / "home", keys={"masks": "mask"})
    with pytest.raises(DataError, match=r"data.path: .*/scene does not exist"):
        loaded(tmp_path / "scene", tmp_path / "home")


def test_a_size_that_the_model_cannot_take_is_told_with_those_it_can(tmp_path: Path) -> None:
    with pytest.raises(
        SpaceError, match=r"data.size: 100, but the model wants a multiple of 32: 96 or 128"
    ):
        loaded(write_images_and_masks(tmp_path / "s"), tmp_path / "home", size=100)
    with pytest.raises(
        SpaceError, match=r"data.size: 20, but the model wants a multiple of 32: 32$"
    ):
        loaded(write_images_and_masks(tmp_path / "s"), tmp_path / "home", size=20)


def test_bad_data_ends_with_3_and_a_bad_size_with_2(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(SPACE)
    said = tuner(
        "check", "s.yaml", f"data.path={write_images_and_masks(tmp_path / 's')}", "data.classes=[a]"
    )
    assert (said.code, "have ids beyond the 1 classes a" in said.err) == (3, True)
    said = tuner("check", "s.yaml", f"data.path={tmp_path / 's'}", "data.size=50")
    assert (
        said.code == 2
        and "data.size: 50, but the model wants a multiple of 32: 32 or 64" in said.err
    )


# -- Pascal VOC


def voc(folder: Path, lists: dict[str, list[int]]) -> Path:
    made = write_images_and_masks(folder, 12, 3)
    (made / "images").rename(made / "JPEGImages")
    (made / "masks").rename(made / "SegmentationClass")
    (made / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, numbers in lists.items():
        (made / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(
            "".join(f"{n:03d}\n" for n in numbers)
        )
    return made


def test_vocs_folders_and_lists(tmp_path: Path) -> None:
    root = voc(tmp_path / "v", {"train": [0, 1, 2, 3, 4], "val": [5, 6, 7], "test": [8, 9]})
    data = load_voc(tmp_path / "home", CANVAS, "segmentation", path=str(root), image=ImageOptions())
    assert [len(source) for source in (data.train, data.valid, data.test)] == [5, 3, 2]
    assert len(data.classes) == 21 and data.classes[:2] == ("background", "aeroplane")
    names, other = ["none", "one", "two"], voc(tmp_path / "w", {})
    data = load_voc(
        tmp_path / "home",
        CANVAS,
        "segmentation",
        path=str(other),
        classes=names,
        image=ImageOptions(),
    )
    assert [len(source) for source in (data.train, data.valid, data.test)] == [8, 2, 2]
    assert data.classes == ("none", "one", "two")


def test_vocs_lists_name_what_is_missing(tmp_path: Path) -> None:
    root = voc(tmp_path / "v", {"train": [0, 1, 77], "val": [5]})
    with pytest.raises(DataError, match=r"train.txt: 077 has no image in JPEGImages"):
        voc_segmentation_dataset(tmp_path / "home", root, CANVAS, ImageOptions())
