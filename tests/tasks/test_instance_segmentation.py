"""Instance segmentation: masks as COCO writes them, on the canvas and in the mirror; Mask R-CNN cut in stages; average precision as pycocotools has it; from the file to a prediction."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from torchmetrics.detection import MeanAveragePrecision

from tests.conftest import CommandResult
from tests.helpers.detector_families import look_at_few_regions
from tests.helpers.exported_programs import run_programs
from tests.helpers.instance_files import HEIGHT, INK, WIDTH, triangles, write_instances
from tests.helpers.split_laws import check_partition
from tuner.config.data_options import ImageOptions
from tuner.config.run import Recipe
from tuner.core.detectors import TARGET_PREFIX, join_targets
from tuner.core.input_spec import ImageInputSpec
from tuner.core.targets import NO_OBJECT, ignored_label, masks_of_objects
from tuner.core.types import Batch, Dataset, StagedModel
from tuner.data import coco, yolo
from tuner.errors import DataError
from tuner.models import mask_rcnn
from tuner.preprocessing.instance_masks import (
    assign_layers,
    decode_run_lengths,
    draw_shape,
    find_shape_problem,
    parse_counts,
)
from tuner.tasks.instance_segmentation import InstanceSegmentation, build, paste_masks

SPEC = ImageInputSpec(64, 64, "nearest", (0.5,) * 3, (0.5,) * 3, "letterbox")


def load(root: Path, home: Path, **options: Any) -> Dataset:
    return coco.load(
        home,
        SPEC,
        "instance_segmentation",
        path=str(root / "instances.json"),
        image=ImageOptions(**options),
    )


def masks_by_label(y: Any, row: int) -> dict[int, torch.Tensor]:
    """The mask of each object of an image by its class."""
    labels = y["labels"][row]
    rows = (labels > NO_OBJECT).nonzero()[:, 0]
    masks = masks_of_objects(y["layers"][row], rows)
    return {int(labels[i]): mask for i, mask in zip(rows, masks, strict=True)}


# -- data


@pytest.mark.parametrize("as_lengths", [False, True])
@pytest.mark.parametrize("augment", ["none", "flip", "strong"])
def test_masks_lie_where_their_pixels_do(as_lengths: bool, augment: str, tmp_path: Path) -> None:
    root = write_instances(tmp_path / "set", as_lengths=as_lengths)
    source = load(root, tmp_path / "home", augment=augment).train
    x, y = source.take(torch.arange(len(source)), 1)
    assert isinstance(x, torch.Tensor) and isinstance(y, dict)
    assert y["layers"].shape[1] == 2  # they overlap
    seen = 0
    for row, pixels in enumerate(x):
        for label, mask in masks_by_label(y, row).items():
            is_ink = ((pixels.int() - torch.tensor(INK[label]).view(3, 1, 1)).abs().sum(0)) < 60
            if augment == "strong":  # other colours
                continue
            hidden = masks_by_label(y, row)[1] if label == 0 else torch.zeros_like(mask)
            assert (is_ink == (mask & ~hidden)).float().mean() > 0.99
            seen += 1
            box = y["boxes"][row][y["labels"][row] == label][0]
            rows, columns = mask.nonzero(as_tuple=True)
            found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found - box).abs().max() <= 1.5
    assert seen == (0 if augment == "strong" else 2 * len(source))


def test_masks_move_as_the_boxes_of_an_augmented_image(tmp_path: Path) -> None:
    source = load(write_instances(tmp_path / "set"), tmp_path / "home", augment="strong").train
    close = 0
    for view in range(1, 4):
        y = source.take(torch.arange(len(source)), view).y
        assert isinstance(y, dict)
        for row in range(len(source)):
            for label, mask in masks_by_label(y, row).items():
                if not mask.any():
                    continue
                rows, columns = mask.nonzero(as_tuple=True)
                found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                box = y["boxes"][row][y["labels"][row] == label][0]
                # clipped by the canvas a triangle may have a smaller box than its clipped box
                inside = (found[:2] >= box[:2] - 1.5).all() and (found[2:] <= box[2:] + 1.5).all()
                assert inside
                close += int((found - box).abs().max() <= 2)
    assert close > 30


def test_polygons_and_run_lengths_give_the_same(tmp_path: Path) -> None:
    a = load(write_instances(tmp_path / "a"), tmp_path / "home").full
    b = load(write_instances(tmp_path / "b", as_lengths=True), tmp_path / "home").full
    first, second = (source.take(torch.arange(len(source)), 0).y for source in (a, b))
    assert isinstance(first, dict) and isinstance(second, dict)
    assert torch.equal(first["boxes"], second["boxes"])
    assert (first["layers"] == second["layers"]).float().mean() > 0.995


def test_polygons_of_yolo_are_masks_and_boxes_are_none(tmp_path: Path) -> None:
    root = write_instances(tmp_path / "set")
    (root / "labels").mkdir()
    (root / "data.yaml").write_text("train: images\nnames: [red, blue]\n")
    for number in range(20):
        lines = [
            f"{label} {' '.join(str(v / (WIDTH, HEIGHT)[i % 2]) for i, v in enumerate(polygon))}\n"
            for label, polygon in enumerate(triangles(number))
        ]
        (root / "labels" / f"{number:02d}.txt").write_text("".join(lines))

    def read() -> Dataset:
        return yolo.load(
            tmp_path, SPEC, "instance_segmentation", path=str(root), image=ImageOptions()
        )

    y, expected = (
        source.take(torch.arange(17), 0).y for source in (read().full, load(root, tmp_path).full)
    )
    assert isinstance(y, dict) and isinstance(expected, dict)
    assert (y["layers"] == expected["layers"]).float().mean() > 0.999
    (root / "labels" / "03.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match=r"03\.txt:1: a box, no polygon"):
        read()


def test_objects_that_overlap_are_in_different_layers() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [30, 0, 40, 10], [8, 8, 12, 12]], float)
    assert assign_layers(boxes) == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (None, "needs a segmentation"),
        ([], "needs a segmentation"),
        ([[1, 2, 3, 4]], "three corners"),
        ([[1, 2, 3, 4, 5, "x"]], "three corners"),
        ({"size": [4, 4]}, "run lengths need size"),
        ({"size": [4, 4], "counts": [3, 3]}, "must add up to 4 x 4"),
        ({"size": [4, 4], "counts": [3, 13]}, ""),
        ([[1, 2, 3, 4, 5, 6]], ""),
    ],
)
def test_what_is_wrong_with_a_mask(shape: Any, problem: str, tmp_path: Path) -> None:
    found = find_shape_problem(shape)
    assert problem in found and bool(found) == bool(problem)
    if problem:
        root = write_instances(tmp_path / "set")
        content = json.loads((root / "instances.json").read_text())
        content["annotations"][3]["segmentation"] = shape
        (root / "instances.json").write_text(json.dumps(content))
        with pytest.raises(
            DataError, match=r"annotations\[3\]: .*\n?.*1 of 40 objects have no mask"
        ):
            load(root, tmp_path / "home")


def test_run_lengths_are_read_as_pycocotools_reads_them() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        mask = np.asfortranarray((generator.random((37, 53)) < 0.3).astype(np.uint8))
        code = coco_masks.encode(mask)
        assert (decode_run_lengths(code) == mask).all()
        uncompressed = {"size": [37, 53], "counts": parse_counts(code["counts"])}
        assert coco_masks.frPyObjects(uncompressed, 37, 53)["counts"] == code["counts"]
    with pytest.raises(ValueError, match="end within a number"):
        parse_counts("o")
    with pytest.raises(ValueError, match="add up to 16, not to 5 x 5"):
        decode_run_lengths({"size": [5, 5], "counts": [3, 13]})


def test_run_lengths_of_another_image_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of 4 x 4 pixels, but the image has 64 x 48"):
        draw_shape({"size": [4, 4], "counts": [3, 13]}, 64, 48, SPEC, is_relative=False)


# -- scores


def example(generator: torch.Generator, is_crowd: bool) -> tuple[Any, Any]:
    """Predictions and truth of one image: four objects, six detections, and maybe a crowd."""
    layers = torch.zeros(1, 5, 64, 64, dtype=torch.uint8)
    corners = torch.randint(0, 36, (4, 2), generator=generator)
    boxes = torch.cat([corners, corners + 24], 1).float()
    for i, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        layers[0, i, top:bottom, left:right] = i + 1
        layers[0, i, top : top + 6, left : left + 6] = 0
    labels = torch.tensor([0, 1, 0, 1])
    truth = {"boxes": boxes[None], "labels": labels[None], "layers": layers}
    if is_crowd:
        layers[0, 4, :, :40] = 5
        truth["boxes"] = torch.cat([boxes, torch.tensor([[0.0, 0, 40, 64]])])[None]
        truth["labels"] = torch.cat([labels, torch.tensor([ignored_label(0)])])[None]
    noise = torch.randn(6, 4, generator=generator) * 2
    predicted = torch.cat([boxes, boxes[:2].flip(1).sort(1).values]) + noise
    masks = torch.rand(1, 6, 28, 28, generator=generator) / 2 + 0.48
    scores = torch.rand(1, 6, generator=generator).sort(descending=True).values
    own = torch.tensor([[0, 1, 0, 1, 0, 1]])
    predicted[:, 2:] = torch.maximum(predicted[:, 2:], predicted[:, :2] + 4)
    padded = {"boxes": predicted[None], "scores": scores, "labels": own, "masks": masks}
    return padded, truth


@pytest.mark.parametrize("is_crowd", [False, True])
def test_scores_are_those_of_pycocotools(is_crowd: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [example(generator, is_crowd) for _ in range(6)]
    task = build(("a", "b"), Recipe())
    metric = MeanAveragePrecision(iou_type=("bbox", "segm"), backend="pycocotools")
    for padded, truth in pairs:
        labels = truth["labels"][0]
        counted = torch.where(labels < NO_OBJECT, ignored_label(0) - labels, labels)
        metric.update(
            [
                {
                    "boxes": padded["boxes"][0],
                    "scores": padded["scores"][0],
                    "labels": padded["labels"][0],
                    "masks": paste_masks(padded["masks"][0], padded["boxes"][0], 64),
                }
            ],
            [
                {
                    "boxes": truth["boxes"][0],
                    "labels": counted,
                    "masks": masks_of_objects(truth["layers"][0], torch.arange(len(labels))),
                    "iscrowd": (labels < NO_OBJECT).int(),
                }
            ],
        )
    expected = metric.compute()
    scores = task.score(pairs)
    for ours, theirs in (("mask_", "segm_"), ("", "bbox_")):
        for name in ("map", "map_50", "map_75", "mar_100"):
            assert scores[f"{ours}{name}"] == pytest.approx(float(expected[f"{theirs}{name}"]))
    assert 0.05 < scores["mask_map"] != scores["map"]


# -- the model


@pytest.fixture(scope="module")
def staged() -> StagedModel:
    model = mask_rcnn.build(
        Path(), "maskrcnn_resnet50_fpn", "instance_segmentation", 2, weights="none", backbone="none"
    )
    generator = torch.Generator().manual_seed(0)
    for value in model.model.state_dict().values():
        if value.dim() > 1:
            value.uniform_(-0.06, 0.06, generator=generator)
    look_at_few_regions(model.model, 16)
    return model


@pytest.mark.slow
def test_mask_rcnn_is_cut_as_faster_rcnn_is(staged: StagedModel) -> None:
    assert list(staged.stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "fpn", "head"]
    check_partition(staged)
    x = torch.rand(1, 3, 64, 64)
    staged.model.eval()
    with torch.no_grad():
        expected = staged.reference_output(x)
        assert isinstance(expected, dict) and expected["masks"].shape == (1, 100, 28, 28)
        assert (expected["labels"] >= 0).sum() > 0
        for depth in (0, 3, 6):
            prefix, suffix = staged.split(depth)
            got = suffix.eval()(prefix(x))
            for name, value in expected.items():
                assert torch.allclose(got[name], value, atol=1e-4), (depth, name)


def test_every_head_learns_from_the_masks(staged: StagedModel, tmp_path: Path) -> None:
    dataset = load(write_instances(tmp_path / "set"), tmp_path / "home")
    pixels, y = dataset.train.take(torch.arange(2), 0)
    x = dataset.input_spec.to_model_input(pixels, torch.device("cpu"))
    task = build(("red", "blue"), Recipe())
    prefix, suffix = staged.split(6)
    suffix.train()
    with torch.no_grad():
        features = prefix(x)
    parts = task.loss_parts(suffix, Batch(features, y))
    assert set(parts) >= {"loss_mask", "loss_classifier", "loss_box_reg", "loss_objectness"}
    parts["loss_mask"].backward()
    gradient = staged.model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad  # type: ignore[union-attr]
    assert gradient is not None and float(gradient.abs().sum()) > 0  # type: ignore[operator,arg-type]
    assert f"{TARGET_PREFIX}layers" in join_targets(features, y)


def test_what_is_told_has_the_mask_at_the_size_of_the_image() -> None:
    task = build(("red", "blue"), Recipe())
    assert isinstance(task, InstanceSegmentation)
    output = {
        "boxes": torch.tensor([[[8.0, 16, 40, 48], [0, 0, 0, 0]]]),
        "scores": torch.tensor([[0.9, 0.0]]),
        "labels": torch.tensor([[1, NO_OBJECT]]),
        "masks": torch.ones(1, 2, 28, 28),
    }
    image = Image.new("RGB", (128, 96))
    (told,) = task.describe_predictions(lambda _: output, torch.zeros(1), [image], SPEC)
    (found,) = told.values["objects"]
    assert found["label"] == "blue" and found["box"] == [16.0, 16.0, 80.0, 80.0]
    mask = decode_run_lengths(found["mask"])
    assert mask.shape == (96, 128) and abs(int(mask.sum()) - 64 * 64) < 300
    assert told.picture is not None


# -- from the file to a prediction


@pytest.mark.slow
def test_masks_of_people_through_export_and_prediction(
    shared: Path, tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    """Real photographs, and ImageNet's weights in the backbone, which is frozen and cached."""
    with tarfile.open(shared / "humans.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    pictures = write_people(tmp_path / "humans", tmp_path / "people.json", 32)
    backbone = shared / "tf_efficientnet_lite0.safetensors"
    (tmp_path / "s.yaml").write_text(
        "task: instance_segmentation\n"
        "data: {name: coco, path: people.json, images: humans/Training_Images, size: 96}\n"
        f"model: {{name: maskrcnn/timm/tf_efficientnet_lite0, backbone: {backbone}, regions: 16, "
        "proposals: 30}\n"
        "recipe: {epochs: 3, batch_size: 4, freeze_depth: 7, lr: 0.01, clip_norm: 10.0}\n"
        "search: {trials: 1, retrain: false}\nengine: {name: inline, device: cpu}\n"
        "export: [safetensors, onnx]\n"
    )
    result = tuner("run", tmp_path / "s.yaml")
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "studies/s/export/manifest.json").read_text())
    scores = manifest["scores"]["test"]
    assert scores["mask_map_50"] > 0.05 and scores["mask_map"] > 0.01, scores
    assert manifest["exports"]["onnx"]["largest_difference"] < 1e-3
    result = tuner("predict", "s", str(pictures[0]), "--json", "--out", "seen")
    assert result.code == 0 and "objects" in json.loads(result.out)
    assert len(list((tmp_path / "seen").iterdir())) == 1
    export = tmp_path / "studies/s/export"
    shutil.copyfile(pictures[0], export / "image.jpg")
    assert run_programs(export, "onnx")[0].startswith("[")


def write_people(root: Path, target: Path, count: int) -> list[Path]:
    """COCO's instances of some photographs: each connected part of a true mask is a person.

    Returns the photographs. They are read at a quarter of their size, where finding the parts is
    soon done; the masks are written in it too, so the photographs are made smaller as well.
    """
    from scipy import ndimage

    pictures: list[Path] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, file in enumerate(sorted((root / "Ground_Truth").glob("*.png"))[:count]):
        (picture,) = (root / "Training_Images").glob(f"{file.stem}.*")
        with Image.open(picture) as image:
            small = image.convert("RGB").resize((image.width // 4, image.height // 4))
        small.save(picture)
        mask_image = Image.open(file).convert("L").resize(small.size, Image.Resampling.NEAREST)
        parts, part_count = ndimage.label(np.asarray(mask_image) > 127)
        images.append({"id": number, "file_name": picture.name})
        pictures.append(picture)
        for part in range(1, part_count + 1):
            mask = parts == part
            if mask.sum() < 50:
                continue
            code = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
            size = [int(side) for side in code["size"]]
            annotations.append(
                {
                    "image_id": number,
                    "category_id": 1,
                    "bbox": coco_masks.toBbox(code).tolist(),
                    "segmentation": {"size": size, "counts": code["counts"].decode()},
                }
            )
    categories = [{"id": 1, "name": "person"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    target.write_text(json.dumps(content))
    return pictures
