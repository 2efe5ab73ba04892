"""`data.group`: examples of one group are never in different splits, whatever the data come from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import box_files, mask_files
from tuner.config import parsing, plugins, yaml_document
from tuner.config.data_options import ImageFileOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.core.subset import Subset
from tuner.core.types import Dataset, Source
from tuner.errors import DataError, SpaceError

COUNT = 20
LAST_DIGIT = r"(\d)\.png$"
TASKS = {
    "folder": "classification",
    "masks": "segmentation",
    "voc": "detection",
    "coco": "detection",
    "yolo": "detection",
}


def write_folder(root: Path, name: str = "{:02d}.png") -> Path:
    """Two classes; images whose numbers have the same last digit are in both."""
    for i in range(COUNT):
        file = root / ("cat" if i < COUNT // 2 else "dog") / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(file)
    return root


def write(name: str, root: Path) -> Path:
    """Data of a source: images 00.png to 19.png."""
    if name == "folder":
        return write_folder(root)
    if name == "masks":
        return mask_files.write_images_and_masks(root, COUNT)
    writers = {"voc": box_files.write_voc, "coco": box_files.write_coco}
    return writers.get(name, box_files.write_yolo)(root, COUNT)


def load(name: str, root: Path, group: str | None, **options: Any) -> Dataset:
    fit: Any = "letterbox" if TASKS[name] == "detection" else "crop"
    spec = ImageInputSpec(32, 32, "nearest", (0.5,) * 3, (0.5,) * 3, fit)
    image = ImageFileOptions(group=group, **options)
    read = plugins.load_plugin("data", name)
    dataset: Dataset = read(root.parent / "home", spec, TASKS[name], path=str(root), image=image)
    return dataset


def rows(source: Source) -> list[int]:
    """The numbers of the images, in the order of the files."""
    if isinstance(source, Subset):
        return source.whole.rows[source.rows].tolist()  # type: ignore[attr-defined,no-any-return]
    return source.rows.tolist()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("name", TASKS)
def test_images_of_a_group_are_in_one_split_and_folds_share_what_is_computed(
    name: str, tmp_path: Path
) -> None:
    root = write(name, tmp_path / name)
    held: list[int] = []
    wholes = set()
    for folds, fold in ((1, 0), (3, 0), (3, 1), (3, 2)):
        data = load(name, root, LAST_DIGIT, folds=folds, fold=fold)
        parts = [{i % 10 for i in rows(s)} for s in (data.train, data.valid, data.test)]
        assert all(parts) and sum(map(len, parts)) == len(set().union(*parts)) == 10
        assert len(data.full) + len(data.test) == COUNT
        held += rows(data.valid) if folds > 1 else []
        wholes |= {part.whole.digest for part in (data.train, data.valid)}  # type: ignore[attr-defined]
    assert sorted(held) == rows(data.full) and wholes == {data.full.digest}
    singly = load(name, root, None)
    assert {i % 10 for i in rows(singly.train)} & {i % 10 for i in rows(singly.valid)}


def test_an_image_without_a_group_is_one_of_its_own(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder")
    data = load("folder", root, r"^(0)\d")
    where = [{i for i in rows(s) if i < 10} for s in (data.train, data.valid, data.test)]
    assert sorted(map(len, where)) == [0, 0, 10]
    (warning,) = [w for w in data.warnings if "data.group" in w]
    assert "is not found in 10 of 20 names, such as 10.png; each of these" in warning


def test_with_a_slash_the_folders_are_read_too(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder", "person_{0:02d}/a.png")
    with pytest.raises(DataError, match=r"found in none of 20 names, such as 'a.png'; for"):
        load("folder", root, r"person_\d(\d)")
    data = load("folder", root, r"person_\d(\d)/")
    parts = [{i % 10 for i in rows(s)} for s in (data.train, data.valid, data.test)]
    assert sum(map(len, parts)) == 10 and len(data.full) + len(data.test) == COUNT


def test_what_is_no_expression_is_told_with_its_line() -> None:
    text = "task: classification\ndata:\n  name: folder\n  path: x\n  group: 'person_('\n"
    document = yaml_document.parse_document(text + "model: resnet18_slim\n", "s.yaml")
    with pytest.raises(SpaceError, match=r"s\.yaml:5.*data\.group.*not a regular expression: mis"):
        parsing.parse_space(document)
    plain = text.replace("'person_('", r"'person_(\d+)'") + "model: resnet18_slim\n"
    run = parsing.parse_space(yaml_document.parse_document(plain, "s.yaml")).sample(None, seed=0)
    assert run.data.options["group"] == r"person_(\d+)"


def test_a_detector_sees_all_of_a_group_in_one_split(tmp_path: Path) -> None:
    """The boxes stay with their images."""
    data = load("coco", box_files.write_coco(tmp_path / "coco", COUNT), LAST_DIGIT)
    y = data.valid.take(torch.arange(len(data.valid)), 0).y
    assert isinstance(y, dict)
    counts = [1 + i % 2 for i in rows(data.valid)]
    assert (y["labels"] >= 0).sum(1).tolist() == counts
