"""Detectors: cut and partition at every depth, torchvision's own losses, metrics, exports, and a study from files to drawn boxes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model

from tests.conftest import SHARED, CommandResult
from tests.helpers import box_files
from tests.helpers.detector_families import look_at_few_regions
from tests.helpers.exported_programs import run_programs
from tests.helpers.split_laws import check_partition, check_split
from tuner.config import plugins
from tuner.config.run import LOADED_LATER, PluginConfig, Recipe, Run
from tuner.core.detectors import join_targets, pad_objects
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import ImageInputSpec
from tuner.core.targets import NO_OBJECT
from tuner.core.types import Batch, StagedModel, Task
from tuner.errors import SpaceError
from tuner.export import onnx
from tuner.tasks._detected_objects import boxes_on_original, objects_difference
from tuner.tasks.detection import build
from tuner.training.model_summary import summarize_model

# name, pixels of a canvas that is quickly computed, stages
FAMILIES = {
    "fasterrcnn_resnet50_fpn": (64, 7),
    "fasterrcnn_resnet50_fpn_v2": (64, 7),
    "fasterrcnn_mobilenet_v3_large_fpn": (64, 8),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (64, 8),
    "retinanet_resnet50_fpn": (64, 7),
    "retinanet_resnet50_fpn_v2": (64, 7),
    "fcos_resnet50_fpn": (64, 7),
    "ssd300_vgg16": (268, 7),
    "ssdlite320_mobilenet_v3_large": (64, 7),
    "fasterrcnn/timm/tf_efficientnet_lite0": (64, 10),
    "retinanet/timm/resnet10t": (64, 7),
    "fcos/timm/mobilenetv3_small_050": (64, 9),
}
QUICK = [
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "ssdlite320_mobilenet_v3_large",
    "fcos/timm/mobilenetv3_small_050",
    "retinanet/timm/resnet10t",
]
SLOW = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def built(name: str, outputs: int = 3, **options: Any) -> StagedModel:
    if "timm" in name:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    made = plugins.import_plugin("model", name).build
    staged: StagedModel = made(
        Path(), name, "detection", outputs, **{"weights": "none", "backbone": "none", **options}
    )
    return staged


def lively(name: str) -> StagedModel:
    """The model with the statistics of real activations, and a class head that is unsure, so that it finds objects."""
    staged = built(name)
    look_at_few_regions(staged.model, 32)
    prefix, _ = staged.split(staged.max_depth)
    norms = [module for module in prefix.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            prefix.train()(images(FAMILIES.get(name, (64, 0))[0], 4))
    for key, value in staged.model.named_parameters():
        if "cls_logits" in key or "cls_score" in key or "classification_head.module_list" in key:
            if value.dim() > 1:
                nn.init.normal_(value, 0, 0.05)
            elif key.endswith("bias"):
                nn.init.zeros_(value)
    return staged


def images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SLOW)
def test_the_cut_law(name: str) -> None:
    side, stages = FAMILIES[name]
    staged = lively(name)
    assert len(staged.stages) == stages
    check_split(staged, images(side, 1 if side > 200 else 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_partition_law(name: str) -> None:
    if "timm" in name:
        pytest.importorskip("timm")
    with torch.device("meta" if "timm" not in name and not name.startswith("ssd") else "cpu"):
        check_partition(built(name))


def reference(name: str, classes: int, side: int) -> Any:
    """torchvision's own model, told to leave a canvas of this size as it is."""
    if name.startswith("ssd"):
        return get_model(
            name,
            weights=None,
            weights_backbone=None,
            num_classes=classes,
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
        )
    sizes = {"min_size": side, "max_size": side, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return get_model(name, weights=None, weights_backbone=None, num_classes=classes, **sizes)


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "ssdlite320_mobilenet_v3_large",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (
                "fcos_resnet50_fpn",
                "retinanet_resnet50_fpn",
                "ssd300_vgg16",
            )
        ),
    ],
)
def test_the_loss_is_the_sum_of_torchvisions_own(name: str) -> None:
    side, first = (
        {"ssdlite320_mobilenet_v3_large": 320, "ssd300_vgg16": 300}.get(name, 64),
        0 if name.startswith(("fcos", "retina")) else 1,
    )
    count = 1 if name == "ssd300_vgg16" else 2  # images; its large ones take seconds
    staged = built(name)
    model = reference(name, 3 + first, side).train()
    model.load_state_dict(staged.model.state_dict())
    x = images(side, count)
    boxes = torch.tensor([[[4.0, 4, 30, 40], [20, 10, 60, 50]], [[8, 8, 40, 30], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 2], [1, NO_OBJECT]])
    targets = [
        {"boxes": boxes[0], "labels": labels[0] + first},
        {"boxes": boxes[1, :1], "labels": labels[1, :1] + first},
    ][:count]
    boxes, labels = boxes[:count], labels[:count]
    torch.manual_seed(3)
    expected = model(list(x), targets)
    net = staged.split(0)[1].train()
    seed(3, count)
    found = net(join_targets(x, {"boxes": boxes, "labels": labels}))
    assert {k: float(v.detach()) for k, v in found.items()} == pytest.approx(
        {k: float(v.detach()) for k, v in expected.items()}, rel=1e-6
    )
    seed(3, count)
    loss = task().loss(net, Batch(x, {"boxes": boxes, "labels": labels}))
    assert float(loss.detach()) == pytest.approx(
        sum(float(v.detach()) for v in expected.values()), rel=1e-4
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert sum(p.grad is not None for p in net.parameters()) > 0.9 * len(list(net.parameters()))


def seed(number: int, count: int) -> None:
    """Where torchvision stands after it drew each image's size among the one there is."""
    torch.manual_seed(number)
    for _ in range(count):
        torch.empty(1).uniform_()


def test_a_canvas_that_is_too_small_is_said() -> None:
    message = r"data\.size: 200, but ssd300_vgg16 needs at least 268 pixels"
    with torch.device("meta"):  # its weights take seconds to draw
        net = built("ssd300_vgg16").split(0)[1]
    with pytest.raises(SpaceError, match=message):
        net(images(200).to("meta"))


def test_an_image_without_objects_can_be_learnt_from() -> None:
    for name in QUICK:
        net = built(name).split(0)[1].train()
        y = {"boxes": torch.zeros(2, 1, 4), "labels": torch.full((2, 1), NO_OBJECT)}
        loss = float(task().loss(net, Batch(images(64), y)).detach())
        assert (
            loss > 0 if "ssd" not in name else loss == 0
        )  # SSD's background counts three times the objects


@pytest.mark.parametrize(
    "name",
    ["fasterrcnn_resnet50_fpn", "fasterrcnn/timm/resnet10t", "ssdlite320_mobilenet_v3_large"],
)
def test_what_an_export_is_read_into_has_the_layers_of_what_was_trained(name: str) -> None:
    """Pretrained backbones have frozen BatchNorm, as in torchvision's builders; without weights it is an ordinary one."""
    options = {"weights": "none", "backbone": "default"}
    run = Run(
        PluginConfig("detection", {}),
        PluginConfig("voc", {}),
        PluginConfig(name, options),
        Recipe(),
        0,
    )
    assert run.without_weights().model.options == {"weights": "none", "backbone": LOADED_LATER}
    with_weights, fresh = built(name, backbone=LOADED_LATER), built(name)
    assert any("num_batches_tracked" in key for key in fresh.model.state_dict())
    if name.startswith("fasterrcnn"):
        assert not any("num_batches_tracked" in key for key in with_weights.model.state_dict())
        assert any(
            "FrozenBatchNorm" in type(module).__name__ for module in with_weights.model.modules()
        )
    else:  # the tail of ImageNet's MobileNetV3 is twice as wide
        widths = [
            sum(p.numel() for p in staged.model.parameters()) for staged in (with_weights, fresh)
        ]
        assert widths[0] > 1.2 * widths[1]


def test_imagenets_weights_go_into_the_backbone(tmp_path: Path) -> None:
    for name, architecture in (
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "mobilenet_v3_large"),
        ("ssdlite320_mobilenet_v3_large", "mobilenet_v3_large"),
    ):
        torch.manual_seed(5)
        classifier: Any = get_model(architecture, weights=None)
        torch.save(classifier.state_dict(), tmp_path / "weights.pth")
        staged: Any = built(name, backbone=str(tmp_path / "weights.pth"))
        classifier.eval()
        x = images(64)
        expected = classifier.features[:4](x)
        names = list(staged.stages)
        found = staged.stages["stem"].eval()(x)
        found = staged.stages[names[1]].eval()(found)
        assert torch.allclose(
            found["x"], expected, atol=0.01 * float(expected.abs().max().detach())
        ), name  # BatchNorm's eps is another


# -- the task


def task(classes: tuple[str, ...] = ("cat", "dog", "cow")) -> Task:
    return build(classes, Recipe(), confidence=0.5)


def found(*rows: tuple[list[float], float, int]) -> dict[str, Tensor]:
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    one = {
        "boxes": torch.tensor(boxes).reshape(-1, 4).float(),
        "scores": torch.tensor(scores).float(),
        "labels": torch.tensor(labels).long(),
    }
    return pad_objects([one])


def true(*rows: tuple[list[float], int]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([[box for box, _ in rows]]).float(),
        "labels": torch.tensor([[label for _, label in rows]]),
    }


A, B = [0.0, 0, 10, 10], [20.0, 20, 40, 40]


@pytest.mark.parametrize(
    ("said", "truth", "scores"),
    [
        (
            found((A, 0.9, 0), (B, 0.8, 1)),
            true((A, 0), (B, 1)),
            {"map": 1.0, "map_50": 1.0, "map_75": 1.0, "mar_100": 1.0},
        ),
        (
            found((A, 0.9, 0)),
            true((A, 0), (B, 1)),
            {"map": 0.5, "map_50": 0.5, "map_75": 0.5, "mar_100": 0.5},
        ),
        # intersection over union 0.61: found at 0.5, 0.55 and 0.6 of the ten thresholds
        (
            found(([0.0, 0, 10, 6.1], 0.9, 0)),
            true((A, 0)),
            {"map": 0.3, "map_50": 1.0, "map_75": 0.0, "mar_100": 0.3},
        ),
        (
            found((A, 0.9, 1)),
            true((A, 0)),
            {"map": 0.0, "map_50": 0.0, "map_75": 0.0, "mar_100": 0.0},
        ),
        (found(), true((A, 0)), {"map": 0.0, "map_50": 0.0, "map_75": 0.0, "mar_100": 0.0}),
        (found(), true((A, NO_OBJECT)), {"map": 0.0, "map_50": 0.0, "map_75": 0.0, "mar_100": 0.0}),
    ],
)
def test_scores(said: Any, truth: Any, scores: dict[str, float]) -> None:
    assert task().score([(said, truth)]) == pytest.approx(scores, abs=1e-6)


def test_the_table_has_each_class(tmp_path: Path) -> None:
    pairs = [(found((A, 0.9, 0)), true((A, 0), (B, 1)))]
    names = ("average_precision", "average_recall", "objects")
    assert task().class_scores(pairs) == {
        "cat": dict(zip(names, (1.0, 1.0, 1), strict=True)),
        "dog": dict(zip(names, (0.0, 0.0, 1), strict=True)),
        "cow": dict(zip(names, (0.0, 0.0, 0), strict=True)),
    }
    rows = task()._per_class_csv(pairs).decode().splitlines()  # type: ignore[attr-defined]
    assert rows == [
        "class,average precision,average recall,objects",
        "cat,1.0000,1.0000,1",
        "dog,0.0000,0.0000,1",
        "cow,0.0000,0.0000,0",
    ]


def test_difference_matches_boxes_whatever_their_order() -> None:
    one = found((A, 0.8, 0), (B, 0.8, 1))
    assert task().output_difference(one, found((B, 0.8, 1), (A, 0.8, 0))) == 0
    assert task().output_difference(
        one, found((B, 0.8, 1), ([0.0, 0, 10, 10.4], 0.8, 0))
    ) == pytest.approx(0.01)  # of 40 pixels
    assert task().output_difference(one, found((B, 0.7, 1), (A, 0.8, 0))) == pytest.approx(0.1)
    assert task().output_difference(one, found((A, 0.8, 0))) == pytest.approx(0.8)
    assert task().output_difference(found((A, 0.8, 0)), one) == pytest.approx(0.8)
    assert task().output_difference(one, found((A, 0.8, 0), (B, 0.8, 2))) == pytest.approx(
        0.8
    )  # another class is another object
    assert (
        task().output_difference(found((A, 0.8, 0), (B, 0.04, 1)), found((A, 0.8, 0))) == 0
    )  # noise
    assert (
        objects_difference(
            {**one_of(one), "full": torch.tensor(False)},
            {**one_of(one), "full": torch.tensor(False)},
        )
        == 0
    )


def one_of(padded_: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf[0, :2] for name, leaf in padded_.items()}


def test_what_is_told_is_in_pixels_of_the_original() -> None:
    wanted = ImageInputSpec(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3, "letterbox")
    assert boxes_on_original(torch.tensor([[2.0, 6, 18, 30]]), 128, 64, wanted).tolist() == [
        [8.0, 0.0, 72.0, 64.0]
    ]  # scale 4, 8 rows above
    image = Image.new("RGB", (128, 64), "grey")
    told = task().describe_predictions(
        lambda _: found(([2.0, 10, 18, 20], 0.9, 1), (A, 0.4, 0)),
        torch.zeros(1, 3, 32, 32),
        [image],
        wanted,
    )[0]
    assert told.line == "dog 0.900 at 8, 8, 72, 48"
    assert told.values == {
        "objects": [{"label": "dog", "score": pytest.approx(0.9), "box": [8.0, 8.0, 72.0, 48.0]}]
    }
    assert told.picture is not None and told.picture.startswith(b"\x89PNG")
    nothing = task().describe_predictions(
        lambda _: found(), torch.zeros(1, 3, 32, 32), [image], wanted
    )[0]
    assert (nothing.line, nothing.values) == ("nothing with a score from 0.5", {"objects": []})


# -- exports


@pytest.mark.parametrize(
    ("name", "format_", "side"),
    [
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                # of each head, over a backbone of few layers where there is one
                ("fasterrcnn/timm/resnet10t", onnx, 64),
                ("ssdlite320_mobilenet_v3_large", onnx, 64),
                ("retinanet/timm/resnet10t", onnx, 64),
                ("fcos/timm/resnet10t", onnx, 64),
            )
        ),
    ],
)
def test_what_is_read_back_finds_the_same_objects(
    name: str, format_: Any, side: int, tmp_path: Path
) -> None:
    staged = lively(name)
    assert format_.FILE.replace("model.pt2", "torch_export").replace(
        "model.onnx", "onnx"
    ) in plugins.read_model_constant(name, "EXPORTS", ("torch_export", "onnx"))
    model = ExportModule(
        staged, ImageInputSpec(side, side, "bilinear", (0.5,) * 3, (0.5,) * 3, "letterbox")
    ).eval()
    x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2))
    format_.save(model, x[:1], tmp_path / format_.FILE)
    again = format_.load(tmp_path / format_.FILE, lambda: model)
    for i in range(3):
        with torch.no_grad():
            expected, got = model(x[i : i + 1]), again(x[i : i + 1])
        assert (expected["labels"] != NO_OBJECT).any()
        assert task().output_difference(expected, got) < 1e-3


# -- from files to drawn boxes

STUDY = """
task: detection
data: {{name: voc, path: {root}, size: 64, augment: flip, views: 2}}
model: {{name: ssdlite320_mobilenet_v3_large, weights: none, backbone: none}}
recipe: {{lr: {{low: 1e-3, high: 1e-2, log: true}}, freeze_depth: [0, 5], epochs: 1, batch_size: 8}}
search: {{trials: 2, seed: 0}}
engine: {{name: inline, device: cpu}}
export: [safetensors, torch_export]
"""


@pytest.mark.slow
def test_a_study_from_files_to_drawn_boxes(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    (tmp_path / "boxes.yaml").write_text(STUDY.format(root=root))
    # the default recipe is one of the two trials, so that its comparison would train it again
    said = tuner("run", tmp_path / "boxes.yaml", "search.compare=none")
    assert said.code == 0, said.err
    manifest = json.loads((tmp_path / "studies/boxes/export/manifest.json").read_text())
    assert set(manifest["exports"]) == {"safetensors", "torch_export"}
    assert max(one["largest_difference"] for one in manifest["exports"].values()) < 1e-3
    assert set(manifest["scores"]["test"]) == {"map", "map_50", "map_75", "mar_100"}
    assert list(manifest["scores"]["per_class"]) == manifest["classes"]
    shown = sorted(p.read_bytes()[:4] for p in (tmp_path / "studies/boxes/artifacts").iterdir())
    assert sum(begin == b"\x89PNG" for begin in shown) >= 2
    said = tuner("predict", "boxes", root / "images", "--json")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 20 and all("objects" in row for row in rows)
    export = tmp_path / "studies/boxes/export"
    shutil.copyfile(sorted((root / "images").iterdir())[0], export / "image.jpg")
    assert run_programs(export, "torch_export")[0].startswith("[")


@pytest.mark.parametrize("augment", ["strong"])  # it has mosaics
def test_cross_validation_and_a_cache_that_changes_nothing(
    augment: str, tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    """Memory and stillness: two folds over remembered activations give the losses of two folds without."""
    root = box_files.write_voc(tmp_path / "voc")
    (tmp_path / "boxes.yaml").write_text(STUDY.format(root=root))
    losses = []
    for mode in ("always", "never"):
        from tuner.config import parsing
        from tuner.config.run import EngineSettings
        from tuner.training.cross_validation import fit_folds, prepare_folds
        from tuner.training.devices import select_device

        words = ["data.folds=2", "recipe.freeze_depth=5", "recipe.lr=0.005", "recipe.epochs=2"]
        words.append(f"data.augment={augment}")
        run = parsing.load_space(tmp_path / "boxes.yaml", words).sample(None, seed=1)
        there = select_device(
            EngineSettings.model_validate({"device": "cpu", "cache": mode}), tmp_path / "home"
        )
        contexts = prepare_folds(run, there, "map")
        bench = contexts[0]
        assert (
            type(bench.train).__name__
            == {"always": "CachedSource", "never": "UncachedSource"}[mode]
        )
        prefix, _ = bench.staged_model.split(5)
        before = {key: value.clone() for key, value in prefix.state_dict().items()}
        losses.append([progress.epoch.loss for progress in fit_folds(run, contexts)])
        assert all(torch.equal(value, before[key]) for key, value in prefix.state_dict().items())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_raccoons(tuner: Callable[..., CommandResult], shared: Path, tmp_path: Path) -> None:
    """Real photographs, and ImageNet's weights in the backbone."""
    import tarfile

    with tarfile.open(shared / "raccoon.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    root = next(p.parent for p in tmp_path.rglob("annotations") if p.is_dir())
    (tmp_path / "raccoon.yaml").write_text(f"""
task: detection
data: {{name: voc, path: {root}, size: 96, limit: 32}}
model: {{name: fasterrcnn/timm/tf_efficientnet_lite0, backbone: {SHARED / "tf_efficientnet_lite0.safetensors"}, regions: 32, proposals: 40}}
recipe: {{lr: 0.01, freeze_depth: 7, epochs: 3, batch_size: 4, clip_norm: 10.0, schedule: cosine, warmup: 0.1}}
search: {{trials: 1, retrain: false}}
engine: {{name: inline, device: cpu}}
export: [safetensors]
""")
    said = tuner("run", tmp_path / "raccoon.yaml")
    assert said.code == 0, said.err
    assert (
        json.loads((tmp_path / "studies/raccoon/export/manifest.json").read_text())["scores"][
            "test"
        ]["map_50"]
        > 0.05
    )


def test_a_detector_is_described_with_numbers_in_it() -> None:
    found = summarize_model("ssdlite320_mobilenet_v3_large", outputs=3)
    assert (found.example, [row.stage for row in found.depths][-1]) == ("320 x 320 image", "extra")
    assert 0.5 < found.depths[-1].flops < 1
