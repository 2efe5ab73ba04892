"""Every file in search_spaces/ is checked and runs: those that want data run on small made-up files, those that want a download without weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandResult
from tests.helpers import box_files, image_tables, instance_files, mask_files, small_transformers
from tuner.config import parsing, related_tasks, space, yaml_document
from tuner.config.run import Recipe

FILES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
IMAGES = "data={name: synthetic, size: 32, examples: 40}"
PHOTOS = "data.path=photos/photos.csv"
TEXTS = ["data.path=messages.csv", "model.weights=none", "model.length=32", "recipe.freeze_depth=2"]
TINY = {
    "resnet": ["recipe.freeze_depth=4"],
    "cifar10_resnet50": [IMAGES, "model.weights=none", "recipe.batch_size=64"],
    "vgg": [IMAGES, "model.name=vgg11_bn", "model.weights=none", "recipe.freeze_depth=7"],
    "timm": [IMAGES, "model={name: timm/resnet10t, weights: none}", "recipe.freeze_depth=5"],
    "imagefolder": [IMAGES, "model={name: resnet18_slim, weights: none}"],
    "fasterrcnn": [
        "data={name: voc, path: voc, size: 64}",
        "model={name: fasterrcnn/timm/mobilenetv3_small_050, backbone: none, regions: 16, proposals: 16}",
        "recipe.freeze_depth=8",
    ],
    "maskrcnn": [
        "data={name: coco, path: instances/instances.json, size: 64}",
        "model={name: maskrcnn/timm/mobilenetv3_small_050, backbone: none, regions: 16, proposals: 16}",
        "recipe.freeze_depth=8",
    ],
    "yolo": [
        "data={name: voc, path: voc, size: 64}",
        "model.weights=none",
        "recipe.freeze_depth=6",
    ],
    "rtdetr": [
        "data={name: voc, path: voc, size: 128, limit: 10}",
        "model.weights=none",
        "recipe.freeze_depth=6",
    ],
    "unet": [
        "data={name: masks, path: masks, size: 32}",
        "model={name: unet/tu-mobilenetv3_small_050, weights: none}",
    ],
    "fcn": [
        "data={name: masks, path: masks, size: 32}",
        "model={name: lraspp_mobilenet_v3_large, weights: none}",
    ],
    "multilabel": [PHOTOS, "model={name: resnet18_slim, weights: none}", "recipe.freeze_depth=5"],
    "regression": [PHOTOS, "model={name: resnet18_slim, weights: none}", "recipe.freeze_depth=5"],
    "bert": [*TEXTS, "model.folder=bert"],
    "gpt2": [*TEXTS, "model.folder=gpt2"],
}
PACKAGES = {
    "yolo": "cv2",
    "rtdetr": "transformers",
    "bert": "transformers",
    "gpt2": "transformers",
    "unet": "segmentation_models_pytorch",
}
SLOW = {"maskrcnn", "rtdetr", "vgg", "cifar10_resnet50", "fasterrcnn"}


def files(slow: set[str]) -> list[object]:
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in slow))
        for path in FILES
    ]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the files name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    box_files.write_voc(Path("voc"))
    instance_files.write_instances(Path("instances"))
    mask_files.write_images_and_masks(Path("masks"))
    small_transformers.write_csv(Path("messages.csv"))
    image_tables.write_table(Path("photos"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_resolves_and_reads_back(path: Path) -> None:
    found = parsing.load_space(path)
    assert (
        parsing.parse_space(
            yaml_document.parse_document(space.dump_yaml(found.to_dict()), "printed")
        )
        == found
    )
    run = found.make_run({})
    stated = related_tasks.read_recipe(run.model.name, run.task.name)
    # the first trials are what the model's people begin with
    rates = [
        v for name, v in found.default_params().items() if space.key_of_parameter(name) == "lr"
    ]
    assert rates == [stated.get("lr", Recipe().lr)]


@pytest.mark.parametrize("path", files(SLOW))
def test_a_shipped_file_runs(path: Path, tuner: Callable[..., CommandResult], data: None) -> None:
    pytest.importorskip(PACKAGES.get(path.stem, "torch"), exc_type=ImportError)
    if path.stem in small_transformers.KINDS:
        small_transformers.write_model_folder(Path(), path.stem, weights=False)
    words = [
        *TINY[path.stem],
        "recipe.epochs=1",
        "search.trials=1",
        "search.retrain=false",
        "engine.name=inline",
        "engine.device=cpu",
        "export=[safetensors]",
    ]
    said = tuner("run", path, *words)
    assert said.code == 0 and "no report was written" not in said.err, said.err
    assert (
        f"\ntest     {str(parsing.load_space(path).settings.search.metric).replace('_', ' ')}"
        in said.out
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_where_the_optimizer_is_searched_each_has_a_learning_rate_of_its_own(path: Path) -> None:
    dimensions = parsing.load_space(path).dimensions
    if any(d.key == "optimizer" for d in dimensions):
        rates = {d.label: d.domain.highest for d in dimensions if d.key == "lr"}
        assert rates.keys() == {"sgd", "adamw"} and rates["sgd"] > rates["adamw"]
