"""Every data source understands every name of a split, and refuses two names for one split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import box_files, small_transformers
from tests.helpers.mask_files import write_images_and_masks
from tuner.config.data_options import ImageOptions, SplitOptions
from tuner.core.input_spec import ImageInputSpec, InputSpec, TextInputSpec
from tuner.core.types import Dataset
from tuner.data import coco, folder, masks, text, voc, yolo
from tuner.errors import DataError
from tuner.preprocessing.splits import SPLIT_BY_NAME, VALID

CANVAS = ImageInputSpec(32, 32, "nearest", (0.0,) * 3, (1.0,) * 3, "letterbox", 32)
ROWS = {"train": range(6), "valid": range(6, 10), "test": range(10, 12)}
VALIDATION_NAMES = [name for name, split in SPLIT_BY_NAME.items() if split == VALID]


def test_the_names() -> None:
    assert sorted(SPLIT_BY_NAME) == ["dev", "test", "train", "val", "valid", "validation"]


def write_lists(folder: Path, name: str) -> None:
    """A text file per split with the stems of its images; the validation split is called `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in ROWS.items():
        stems = "".join(f"{i:02d}\n" for i in rows)
        (folder / f"{name if split == 'valid' else split}.txt").write_text(stems)


def write_folder(root: Path, name: str) -> None:
    for split, rows in ROWS.items():
        for i in rows:
            path = root / (name if split == "valid" else split) / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 9 * i).save(path)


def write_masks(root: Path, name: str, layout: str = "{split}/{kind}") -> None:
    for split, rows in ROWS.items():
        pair = write_images_and_masks(root / "made" / split, len(rows))
        for kind in ("images", "masks"):
            target = root / layout.format(split=name if split == "valid" else split, kind=kind)
            target.parent.mkdir(parents=True, exist_ok=True)
            (pair / kind).rename(target)


def write_masks_by_kind(root: Path, name: str) -> None:
    write_masks(root, name, "{kind}/{split}")


def write_coco(root: Path, name: str) -> None:
    content = json.loads((box_files.write_coco(root, 12) / "instances.json").read_text())
    (root / "instances.json").unlink()
    (root / "annotations").mkdir()
    for split, rows in ROWS.items():
        ids = {100 + i for i in rows}
        part = {
            "images": [image for image in content["images"] if image["id"] in ids],
            "annotations": [box for box in content["annotations"] if box["image_id"] in ids],
            "categories": content["categories"],
        }
        file = root / "annotations" / f"instances_{name if split == 'valid' else split}2017.json"
        file.write_text(json.dumps(part))


def write_yolo(root: Path, name: str) -> None:
    box_files.write_yolo(root, 12)
    for split, rows in ROWS.items():
        (root / f"{split}.txt").write_text("".join(f"images/{i:02d}.png\n" for i in rows))
    (root / "data.yaml").write_text(
        f"train: train.txt\n{name}: valid.txt\ntest: test.txt\nnames: [blue, red]\n"
    )


def write_text(root: Path, name: str) -> None:
    root.mkdir(parents=True)
    for split, rows in ROWS.items():
        file = root / f"{name if split == 'valid' else split}.csv"
        file.write_text("text,label\n" + "".join(f"fine film {i},l{i % 2}\n" for i in rows))


def write_voc(root: Path, name: str) -> None:
    write_lists(box_files.write_voc(root, 12) / "ImageSets" / "Main", name)


def write_voc_masks(root: Path, name: str) -> None:
    for kind, target in (("images", "JPEGImages"), ("masks", "SegmentationClass")):
        write_images_and_masks(root / "made", 12)
        (root / "made" / kind).rename(root / target)
        for path in sorted((root / target).iterdir()):
            path.rename(path.with_name(f"{int(path.stem):02d}.png"))
    write_lists(root / "ImageSets" / "Segmentation", name)


SOURCES: dict[str, tuple[Any, str, Callable[[Path, str], None]]] = {
    "folder": (folder, "classification", write_folder),
    "masks": (masks, "segmentation", write_masks),
    "masks by kind": (masks, "segmentation", write_masks_by_kind),
    "coco": (coco, "detection", write_coco),
    "yolo": (yolo, "detection", write_yolo),
    "voc": (voc, "detection", write_voc),
    "voc masks": (voc, "segmentation", write_voc_masks),
    "text": (text, "text_classification", write_text),
}


def load(source: str, root: Path, home: Path) -> Dataset:
    module, task, _ = SOURCES[source]
    spec: InputSpec = CANVAS
    keys: dict[str, Any] = {"image": ImageOptions()}
    if source == "text":
        pytest.importorskip("transformers")
        model = home / "bert"
        if not model.exists():
            small_transformers.write_model_folder(home, "bert", weights=False)
        spec = TextInputSpec(str(model), 16, ("input_ids", "attention_mask", "token_type_ids"))
        keys = {"options": SplitOptions()}
    loaded: Dataset = module.load(home, spec, task, path=str(root), **keys)
    return loaded


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_accepts_every_name(source: str, tmp_path: Path) -> None:
    for name in VALIDATION_NAMES:
        SOURCES[source][2](tmp_path / name, name)
        data = load(source, tmp_path / name, tmp_path / "home")
        assert (len(data.train), len(data.valid), len(data.test)) == (6, 4, 2), name


@pytest.mark.parametrize(
    ("source", "first", "second"),
    [
        ("folder", "dev", "valid"),
        ("masks", "dev", "valid"),
        ("masks by kind", "images/dev", "images/valid"),
        ("voc", "ImageSets/Main/dev.txt", "ImageSets/Main/valid.txt"),
        ("voc masks", "ImageSets/Segmentation/dev.txt", "ImageSets/Segmentation/valid.txt"),
        ("text", "dev.csv", "valid.csv"),
    ],
)
def test_two_names_for_one_split_are_refused(
    source: str, first: str, second: str, tmp_path: Path
) -> None:
    SOURCES[source][2](tmp_path / "data", "dev")
    path = tmp_path / "data" / second
    if path.suffix:
        path.write_bytes((tmp_path / "data" / first).read_bytes())
    else:
        path.mkdir()
    names = f"{Path(first).name} and {Path(second).name}"
    with pytest.raises(DataError, match=f"has {names}, which mean the same part; keep one"):
        load(source, tmp_path / "data", tmp_path / "home")


@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_folder_is_named_with_its_neighbour(source: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"photoz does not exist .*; did you mean 'photos'\?"):
        load(source, tmp_path / "photoz", tmp_path / "home")
