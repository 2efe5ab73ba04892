"""Data sets as the world writes them: empty boxes, crowds and difficult objects, polygons, grey of more than 8 bits, masks of another size than the canvas."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import box_files
from tuner.config import plugins
from tuner.config.data_options import ImageOptions
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec
from tuner.core.targets import NO_OBJECT, Boxes, ignored_label
from tuner.core.types import Dataset, Source
from tuner.data import folder
from tuner.errors import DataError
from tuner.preprocessing.detection_dataset import AnnotatedImage, drop_empty_boxes
from tuner.tasks.detection import Detection

SPEC = ImageInputSpec(32, 32, "nearest", (0.5,) * 3, (0.5,) * 3, "letterbox")


def load(name: str, path: Path, home: Path, **options: Any) -> Dataset:
    dataset: Dataset = plugins.load_plugin("data", name)(
        home, SPEC, "detection", path=str(path), image=ImageOptions(), **options
    )
    return dataset


def all_boxes(dataset: Dataset) -> list[tuple[list[float], int]]:
    """Box and label of everything that is no padding, of all splits."""
    rows = []
    for source in (dataset.full, dataset.test):
        y = source.take(torch.arange(len(source)), 0).y
        assert isinstance(y, dict)
        pairs = zip(y["boxes"].flatten(0, 1), y["labels"].flatten(), strict=True)
        rows += [(box.tolist(), int(label)) for box, label in pairs if label != NO_OBJECT]
    return rows


# -- empty boxes: COCO's train2017 has two in 860,001


def annotated(count: int, empty: int) -> list[AnnotatedImage]:
    boxes = [(1.0, 1.0, 5.0, 5.0)] * (count - empty) + [(1.0, 2.0, 1.0, 5.0)] * empty
    return [AnnotatedImage(Path("a.png"), boxes, [0] * count, [f"a:{i}" for i in range(count)])]


def test_fewer_than_one_percent_of_empty_boxes_are_left_out_with_a_warning() -> None:
    (image,), warnings = drop_empty_boxes(annotated(1001, 10))
    assert len(image.boxes) == len(image.labels) == len(image.locations) == 991
    assert warnings[0] == "data: 10 boxes have no width or no height and are left out"
    assert warnings[1] == "a:991: box (1, 2, 1, 5) is empty"
    with pytest.raises(DataError, match="10 of 1000 boxes have no width or no height"):
        drop_empty_boxes(annotated(1000, 10))


def test_a_set_with_an_empty_box_is_read(tmp_path: Path) -> None:
    file = box_files.write_coco(tmp_path / "coco", 80) / "instances.json"
    content = json.loads(file.read_text())
    content["annotations"][7]["bbox"] = [29, 38, 1.03, 0.0]
    file.write_text(json.dumps(content))
    dataset = load("coco", file, tmp_path / "home")
    assert len(all_boxes(dataset)) == len(content["annotations"]) - 1
    assert "data: 1 boxes have no width or no height and are left out" in dataset.warnings


# -- crowds and difficult objects


def test_crowds_are_ignored_areas_and_not_learnt(tmp_path: Path) -> None:
    file = box_files.write_coco(tmp_path / "coco") / "instances.json"
    content = json.loads(file.read_text())
    crowd = {"image_id": 103, "category_id": 9, "bbox": [0, 0, 64, 48], "iscrowd": 1}
    content["annotations"].append(crowd)
    file.write_text(json.dumps(content))
    dataset = load("coco", file, tmp_path / "home")
    ignored = [row for row in all_boxes(dataset) if row[1] < NO_OBJECT]
    assert ignored == [([0.0, 4.0, 32.0, 28.0], ignored_label(1))]
    assert len(all_boxes(dataset)) == len(content["annotations"])


@pytest.mark.parametrize("difficult", [False, True])
def test_difficult_objects_are_ignored_unless_they_shall_count(
    difficult: bool, tmp_path: Path
) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    file = root / "annotations" / "01.xml"
    file.write_text(file.read_text().replace("</name>", "</name><difficult>1</difficult>", 1))
    labels = [label for _, label in all_boxes(load("voc", root, tmp_path, difficult=difficult))]
    assert len(labels) == 30
    assert [label for label in labels if label < 0] == ([] if difficult else [ignored_label(1)])


def test_ignored_areas_move_with_the_image_as_objects_do() -> None:
    boxes = torch.tensor([[[2.0, 4, 10, 12], [2, 4, 10, 12], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, ignored_label(0), NO_OBJECT]])
    targets = Boxes(boxes, labels, 32)
    y = targets.mirror(targets.take(torch.tensor([0])), torch.tensor([0]))
    assert isinstance(y, dict)
    assert y["boxes"][0].tolist() == [[22, 4, 30, 12], [22, 4, 30, 12], [0, 0, 0, 0]]


def objects(*rows: tuple[list[float], int]) -> dict[str, torch.Tensor]:
    """One image's padded boxes and labels."""
    return {
        "boxes": torch.tensor([[box for box, _ in rows]], dtype=torch.float32),
        "labels": torch.tensor([[label for _, label in rows]]),
    }


def test_detections_in_a_crowd_are_neither_right_nor_wrong() -> None:
    """The draw of a bootstrap agrees with pycocotools, which defines the protocol."""
    task = Detection(("cat", "dog"), 0.5)
    generator = torch.Generator().manual_seed(0)
    pairs, without = [], []
    for i in range(12):
        corner = torch.rand(8, 2, generator=generator) * 60
        side = torch.rand(8, 2, generator=generator) * 30 + 8
        boxes = torch.cat([corner, corner + side], 1)
        crowds = [([0.0, 0.0, 50.0, 60.0], ignored_label(i % 2))]
        truth = [(box.tolist(), int(j % 2)) for j, box in enumerate(boxes[:4])]
        noise = torch.randn(8, 4, generator=generator) * 2
        predicted = objects(
            *((box, j % 2) for j, box in reversed(list(enumerate((boxes + noise).tolist()))))
        )
        predicted["scores"] = torch.rand(1, 8, generator=generator).sort(descending=True).values
        pairs.append((predicted, objects(*truth, *crowds)))
        without.append((predicted, objects(*truth)))
    expected = task.score(pairs)
    results = task.example_results(pairs)
    assert task.score_results(results, torch.ones(12, dtype=torch.int64)) == pytest.approx(expected)
    assert expected["map"] > task.score(without)["map"] + 0.02  # false ones inside do not count
    assert expected["mar_100"] == task.score(without)["mar_100"]


# -- polygons in YOLO's files


def test_a_polygon_of_yolo_is_its_box(tmp_path: Path) -> None:
    root = box_files.write_yolo(tmp_path / "yolo")
    plain = all_boxes(load("yolo", root, tmp_path / "home"))
    for file in (root / "labels").iterdir():
        lines = []
        for line in file.read_text().splitlines():
            name, x, y, w, h = line.split()
            left, right = float(x) - float(w) / 2, float(x) + float(w) / 2
            top, bottom = float(y) - float(h) / 2, float(y) + float(h) / 2
            corners = [left, top, right, top, right, bottom, left, bottom]
            lines.append(f"{name} {' '.join(map(str, corners))}\n")
        file.write_text("".join(lines))
    polygons = all_boxes(load("yolo", root, tmp_path / "home2"))
    assert [label for _, label in polygons] == [label for _, label in plain]
    assert np.allclose([box for box, _ in polygons], [box for box, _ in plain], atol=1e-4)


# -- canvas and grey


@pytest.mark.parametrize(
    ("model", "fit"),
    [
        ("ssd300_vgg16", "stretch"),
        ("ssdlite320_mobilenet_v3_large", "stretch"),
        ("rtdetr_r18", "stretch"),
        ("dfine_s", "stretch"),
        ("yolox_s", "letterbox"),
        ("yolov9_s", "letterbox"),
        ("retinanet_resnet50_fpn", "letterbox"),
    ],
)
def test_the_canvas_is_what_the_model_was_made_with(model: str, fit: str) -> None:
    spec = plugins.import_plugin("model", model).input_spec(model)
    assert spec.fit == fit
    placement = place_on_canvas(300, 100, spec)
    whole = (spec.size, spec.size) if fit == "stretch" else (spec.size, round(spec.size / 3))
    assert (placement.width, placement.height) == whole


def write_grey(root: Path, highest: int, dark: int) -> Path:
    """16-bit images of two classes; of the last one `dark` is the highest value."""
    for i in range(20):
        values = np.full((16, 16), dark if i == 19 else highest, np.uint16)
        values[:8] //= 2
        path = root / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values[0, 0] = i  # no two are equal
        Image.fromarray(values).save(path)
    return root


@pytest.mark.parametrize(
    ("highest", "bits"), [(200, 8), (1023, 10), (4095, 12), (16_000, 14), (65_535, 16)]
)
def test_grey_of_more_than_8_bits_is_scaled_by_the_set(
    highest: int, bits: int, tmp_path: Path
) -> None:
    spec = ImageInputSpec(16, 16, "nearest", (0.5,) * 3, (0.5,) * 3)
    root = write_grey(tmp_path / "photos", highest, 200)
    dataset = folder.load(
        tmp_path / "home", spec, "classification", path=str(root), image=ImageOptions()
    )
    assert isinstance(dataset.input_spec, ImageInputSpec) and dataset.input_spec.grey_bits == bits

    def values(source: Source) -> set[int]:
        x = source.take(torch.arange(len(source)), 0).x
        assert isinstance(x, torch.Tensor)
        return set(x[:, :, 1:].unique().tolist())

    expected = {v >> (bits - 8) for v in (highest, highest // 2, 200, 100)}
    assert values(dataset.full) | values(dataset.test) == expected
