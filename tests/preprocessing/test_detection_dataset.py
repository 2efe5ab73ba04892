"""Boxes follow their image to the canvas and in the mirror; three ways to write them; what is wrong with them is said with its file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import CommandResult
from tests.helpers import box_files
from tuner.config import plugins
from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.core.targets import NO_OBJECT
from tuner.core.types import Dataset
from tuner.errors import DataError
from tuner.preprocessing.detection_dataset import AnnotatedImage, Box, boxes_on_canvas

WANTED = ImageInputSpec(32, 32, "nearest", (0.5,) * 3, (0.5,) * 3, "letterbox")


def loaded(
    name: str, path: Path, home: Path, wanted: ImageInputSpec = WANTED, **options: Any
) -> Dataset:
    own = {key: options.pop(key) for key in ("classes", "difficult", "images") if key in options}
    found: Dataset = plugins.load_plugin("data", name)(
        home, wanted, "detection", path=str(path), image=ImageOptions(**options), **own
    )
    return found


def seen(pixels: torch.Tensor, ink: str) -> list[float]:
    """Where an ink lies on an image: left, top, right, bottom, the last outside."""
    apart = (pixels.int() - torch.tensor(box_files.INK[ink]).view(3, 1, 1)).abs().sum(0)
    rows, columns = torch.nonzero(apart < 30, as_tuple=True)
    return [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@pytest.mark.parametrize("side", [64, 32, 128])
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (64, 64)])
def test_boxes_lie_where_the_pixels_do_on_the_canvas_and_in_the_mirror(
    size: tuple[int, int], side: int, tmp_path: Path
) -> None:
    (tmp_path / "annotations").mkdir()
    for i in range(8):
        objects: list[box_files.Object] = [
            ("red", (2 * i, 4, 2 * i + 12, 20)),
            ("blue", (8, 24 + i // 4 * 2, 40, 40)),
        ]
        box_files.draw_scene(tmp_path / "images" / f"{i}.png", objects, size)
        (tmp_path / "annotations" / f"{i}.xml").write_text(box_files.voc_xml(objects, size))
    source = loaded(
        "voc",
        tmp_path,
        tmp_path / "home",
        ImageInputSpec(side, side, "nearest", (0.5,) * 3, (0.5,) * 3, "letterbox"),
        augment="flip",
    ).train
    for view in (0, 1):
        x, y = source.take(torch.arange(len(source)), view)
        assert isinstance(x, torch.Tensor) and isinstance(y, dict)
        for pixels, boxes, labels in zip(x, y["boxes"], y["labels"], strict=True):
            assert labels.tolist() == [1, 0]  # red, blue: classes go by name
            assert [boxes[0].tolist(), boxes[1].tolist()] == [
                seen(pixels, "red"),
                seen(pixels, "blue"),
            ]
    first, second = (source.take(torch.arange(len(source)), view).x for view in (0, 1))
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    assert torch.equal(first, second.flip(3))  # each image is mirrored in one of the two


@pytest.mark.parametrize("name", ["voc", "coco", "yolo"])
def test_three_ways_to_write_the_same(name: str, tmp_path: Path) -> None:
    data = loaded(name, getattr(box_files, f"write_{name}")(tmp_path / name), tmp_path / "home")
    assert data.classes == ("blue", "red")
    assert (len(data.train), len(data.valid), len(data.test), len(data.full)) == (14, 3, 3, 17)
    truths = sorted(
        json.dumps(
            [np.round(y["boxes"][0].numpy().astype(float), 4).tolist(), y["labels"][0].tolist()]
        )
        for source in (data.full, data.test)
        for i in range(len(source))
        for y in [source.take(torch.tensor([i]), 0).y]
        if isinstance(y, dict)
    )
    expected = []
    for objects in box_files.make_scenes(20):
        boxes = [[x / 2, y / 2 + 4, r / 2, b / 2 + 4] for _, (x, y, r, b) in objects]
        labels = [["blue", "red"].index(ink) for ink, _ in objects]
        filling = 2 - len(labels)
        expected.append(json.dumps([boxes + [[0.0] * 4] * filling, labels + [NO_OBJECT] * filling]))
    assert truths == sorted(expected)


def test_parts_are_taken_from_the_lists_of_voc(tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"{i:02d}\n" for i in range(12)))
    (lists / "val.txt").write_text("12\n13\n14\n")
    (lists / "test.txt").write_text("15\n16\n")
    data = loaded("voc", root, tmp_path / "home")
    assert (len(data.train), len(data.valid), len(data.test)) == (12, 3, 2)
    (lists / "val.txt").write_text("12\n99\n")
    with pytest.raises(DataError, match=r"val.txt: 99: no such annotation"):
        loaded("voc", root, tmp_path / "home")


def test_classes_of_voc_are_the_ones_found_or_those_that_are_named(tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    assert loaded("voc", root, tmp_path / "home").classes == ("blue", "red")
    assert loaded("voc", root, tmp_path / "home", classes=["red", "green", "blue"]).classes == (
        "red",
        "green",
        "blue",
    )
    with pytest.raises(
        DataError,
        match=r"01\.xml: object 2: class 'blue'; did you mean 'blu'\? \(allowed: red, blu\)",
    ):
        loaded("voc", root, tmp_path / "home", classes=["red", "blu"])


def test_parts_are_taken_from_the_files_of_coco_and_from_data_yaml(tmp_path: Path) -> None:
    for name, ids in (("train", range(12)), ("val", range(12, 16))):
        tree = json.loads((box_files.write_coco(tmp_path / "all") / "instances.json").read_text())
        some = {100 + i for i in ids}
        tree["images"] = [one for one in tree["images"] if one["id"] in some]
        tree["annotations"] = [one for one in tree["annotations"] if one["image_id"] in some]
        folder = tmp_path / "all" / "annotations"
        folder.mkdir(exist_ok=True)
        (folder / f"instances_{name}2017.json").write_text(json.dumps(tree))
    data = loaded("coco", tmp_path / "all", tmp_path / "home")
    assert (len(data.valid), len(data.train) + len(data.test)) == (
        4,
        12,
    )  # what is missing is taken from what trains
    root = box_files.write_yolo(tmp_path / "yolo")
    (root / "val.txt").write_text("images/00.png\nimages/01.png\n")
    (root / "train.txt").write_text("".join(f"images/{i:02d}.png\n" for i in range(2, 18)))
    (root / "test.txt").write_text("images/18.png\n")
    (root / "data.yaml").write_text(
        "train: train.txt\nval: val.txt\ntest: test.txt\nnames: {0: blue, 1: red}\n"
    )
    data = loaded("yolo", root, tmp_path / "home")
    assert (len(data.train), len(data.valid), len(data.test)) == (16, 2, 1)


def test_folds_hold_out_every_example_once(tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    held = []
    for fold in range(3):
        data = loaded("voc", root, tmp_path / "home", folds=3, fold=fold)
        held += [pixels.numpy().tobytes() for pixels in _pixels(data)]
    assert len(held) == len(set(held)) == 17


def _pixels(data: Dataset) -> torch.Tensor:
    x = data.valid.take(torch.arange(len(data.valid)), 0).x
    assert isinstance(x, torch.Tensor)
    return x


# -- what is wrong is said


def test_what_is_odd_but_harmless_is_a_warning(tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    (root / "annotations" / "00.xml").write_text(box_files.voc_xml([("red", (50, 10, 80, 30))]))
    (root / "annotations" / "01.xml").write_text(box_files.voc_xml([]))
    (root / "annotations" / "02.xml").unlink()
    (root / "annotations" / "03.xml").write_text(
        box_files.voc_xml([("red", (1, 1, 8, 8))], (640, 480))
    )
    for i in range(4, 8):
        (root / "images" / f"{i:02d}.png").write_bytes((root / "images" / "04.png").read_bytes())
    said = "\n".join(loaded("voc", root, tmp_path / "home", seed=2).warnings)
    assert "1 image has no annotation and is left out" in said and "02.png" in said
    assert "1 of 19 images have no objects" in said
    assert (
        "1 boxes reach beyond their image and are clipped" in said
        and "00.xml: object 1: box (50, 10, 80, 30)" in said
    )
    assert "03.xml: object 1: the image is said to be 640 x 480 pixels, but is 64 x 48" in said
    assert "1 image lies in two parts with the same content" in said and "04.png (training)" in said


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((30, 10, 20, 20), "is inverted"),
        ((64, 10, 80, 20), "lies wholly outside its image of 64 x 48 pixels"),
    ],
)
def test_useless_boxes_are_errors_with_their_file(
    box: tuple[int, int, int, int], said: str, tmp_path: Path
) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    for i in range(12):
        (root / "annotations" / f"{i:02d}.xml").write_text(
            box_files.voc_xml([("red", (1, 1, 9, 9)), ("red", box)])
        )
    with pytest.raises(DataError) as error:
        loaded("voc", root, tmp_path / "home")
    assert f"00.xml: object 2: box ({', '.join(map(str, box))}) {said}" in error.value.problems[0]
    assert error.value.problems[10:] == (
        "… and 2 more",
        "data: 12 boxes are wrong; mend or remove them",
    )


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]><annotation><object><name>&c;</name></object></annotation>'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, "refused: it declares a DOCTYPE or entities"),
        ("<annotation><object>", r"not well-formed XML \(no element found: line 1, column 20\)"),
        ("<annotation><object><bndbox/></object></annotation>", "object 1: it has no <name>"),
        (
            "<annotation><object><name>red</name><bndbox><xmin>1</xmin></bndbox></object></annotation>",
            "<bndbox> needs a number as <ymin>, got None",
        ),
        (
            "<a><object><name>red</name><bndbox><xmin>one</xmin></bndbox></object></a>",
            "a number as <xmin>, got 'one'",
        ),
    ],
)
def test_xml_that_cannot_be_trusted_or_read(content: str, said: str, tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    (root / "annotations" / "05.xml").write_text(content)
    with pytest.raises(DataError, match=rf"05\.xml.*{said}"):
        loaded("voc", root, tmp_path / "home")


def test_huge_xml_is_not_read(tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    (root / "annotations" / "05.xml").write_text(" " * 10_000_001)
    with pytest.raises(DataError, match=r"05\.xml: 10,000,001 bytes, more than 10,000,000"):
        loaded("voc", root, tmp_path / "home")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tree: tree["annotations"][3].update(category_id=8),
            r"annotations\[3\]: category_id 8 is no category's id",
        ),
        (
            lambda tree: tree["annotations"][3].update(image_id=8),
            r"annotations\[3\]: image_id 8 is no image's id",
        ),
        (
            lambda tree: tree["annotations"][3].update(bbox=[1, 2, 3]),
            r"annotations\[3\]: needs a bbox of four numbers",
        ),
        (
            lambda tree: tree["annotations"][3].update(bbox=[1, 2, 0, 4]),
            r"annotations\[3\] \(02.png\): box \(1, 2, 1, 6\) is empty.*\n.*1 of 30 boxes have no width",
        ),
        (lambda tree: tree["images"][3].update(id=100), r"images\[3\]: id 100 is there twice"),
        (
            lambda tree: tree["images"][3].update(file_name="99.png"),
            r"images/99\.png: there is no such image",
        ),
        (lambda tree: tree["images"][3].update(file_name="02.png"), r"02\.png: named 2 times"),
        (lambda tree: tree["annotations"].clear(), r"20 images, but not one object on them"),
        (
            lambda tree: tree.pop("categories"),
            r"expected a mapping with lists called images, annotations and categories",
        ),
    ],
)
def test_what_is_wrong_in_coco(change: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    file = box_files.write_coco(tmp_path / "coco") / "instances.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=said):
        loaded("coco", file.parent, tmp_path / "home")


def test_truncated_json(tmp_path: Path) -> None:
    file = box_files.write_coco(tmp_path / "coco") / "instances.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(DataError, match=r"instances\.json: not JSON .*is it truncated"):
        loaded("coco", file, tmp_path / "home")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "0 0.5 0.5 0.1",
            "expected class, centre x, centre y, width, height, or class and the corners of a polygon; got 4 values",
        ),
        ("2 0.5 0.5 0.1 0.1", "class '2', but there are 2 classes, 0 to 1"),
        ("0 0.5 x 0.1 0.1", "expected numbers after the class"),
        ("0 20 20 10 10", "box 20 20 10 10: these are pixels; expected shares"),
    ],
)
def test_what_is_wrong_in_a_line_of_yolo(line: str, said: str, tmp_path: Path) -> None:
    root = box_files.write_yolo(tmp_path / "yolo")
    file = root / "labels" / "03.txt"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"03\.txt:3: {said}"):
        loaded("yolo", root, tmp_path / "home")


def write_poses(root: Path, keypoints: int, numbers: int, said: str) -> Path:
    """YOLO's files with keypoints behind each box, and what data.yaml says of them."""
    box_files.write_yolo(root, 6)
    (root / "data.yaml").write_text(f"train: images\nnames: [blue, red]\nkpt_shape: {said}\n")
    pose = " ".join(["0.4 0.45 2"[: 8 if numbers == 2 else None]] * keypoints)
    for file in (root / "labels").iterdir():
        file.write_text("".join(f"{line} {pose}\n" for line in file.read_text().splitlines()))
    return root


@pytest.mark.parametrize(("keypoints", "numbers"), [(3, 2), (2, 3), (3, 3)])
def test_keypoints_behind_a_box_of_yolo_are_left_out(
    keypoints: int, numbers: int, tmp_path: Path
) -> None:
    """With an odd number of words a line looks like a polygon."""
    boxes = loaded("yolo", box_files.write_yolo(tmp_path / "boxes", 6), tmp_path / "home")
    root = write_poses(tmp_path / "poses", keypoints, numbers, f"[{keypoints}, {numbers}]")
    poses = loaded("yolo", root, tmp_path / "home")
    expected, got = (d.full.take(torch.arange(len(d.full)), 0).y for d in (boxes, poses))
    assert isinstance(expected, dict) and isinstance(got, dict)
    assert torch.equal(got["boxes"], expected["boxes"])
    assert f"data: {root / 'data.yaml'}: kpt_shape: keypoints are left out" in poses.warnings


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("[4, 2]", "expected 5 values of a box and 8 of its keypoints, as kpt_shape says; got 11"),
        ("17", r"kpt_shape: expected how many keypoints .* such as \[17, 3\], got 17"),
    ],
)
def test_keypoints_that_are_not_as_data_yaml_says_are_refused(
    shape: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        loaded("yolo", write_poses(tmp_path / "poses", 3, 2, shape), tmp_path / "home")


def test_images_without_a_text_file_have_no_objects(tmp_path: Path) -> None:
    root = box_files.write_yolo(tmp_path / "yolo")
    for i in range(6):
        (root / "labels" / f"{i:02d}.txt").unlink()
    data = loaded("yolo", root, tmp_path / "home")
    assert "data: 6 of 20 images have no objects" in data.warnings
    y = data.valid.take(torch.arange(len(data.valid)), 0).y
    assert isinstance(y, dict)
    assert (y["labels"] == NO_OBJECT).all(1).sum() == 1  # each part has its share of them


def test_the_command_says_it_without_a_traceback(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    (root / "annotations" / "05.xml").write_text("<annotation>")
    (tmp_path / "x.yaml").write_text(
        f"task: detection\ndata: {{name: voc, path: {root}}}\nmodel: {{name: ssdlite320_mobilenet_v3_large, weights: none, backbone: none}}\n"
    )
    said = tuner("check", tmp_path / "x.yaml", "engine.name=inline")
    assert said.code == 3
    assert "05.xml: not well-formed XML" in said.err and "Traceback" not in said.err
    said = tuner(
        "check", tmp_path / "x.yaml", "engine.name=inline", f"data.path={tmp_path / 'vok'}"
    )
    assert said.code == 3 and "did you mean 'voc'" in said.err


@pytest.mark.parametrize("box", [(639.99999, 10.0, 650.0, 20.0), (300.0, 10.0, 300.0000001, 20.0)])
def test_a_box_of_which_rounding_leaves_nothing_is_left_out(box: Box) -> None:
    """torchvision's losses refuse a box without a width, in the middle of a training."""
    image = AnnotatedImage(Path("a.png"), [box, (1.0, 2.0, 3.0, 4.0)], [0, 1], ["a:1", "a:2"])
    sizes = np.array([[640, 640]])
    boxes, warnings = boxes_on_canvas([image], sizes, replace(WANTED, size=640, resize=640))
    assert boxes.labels.tolist() == [[NO_OBJECT, 1]]
    assert boxes.boxes.tolist() == [[[0, 0, 0, 0], [1, 2, 3, 4]]]
    assert any("1 boxes have no width or no height inside" in warning for warning in warnings)
