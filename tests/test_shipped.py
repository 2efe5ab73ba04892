"""Every file in search_spaces/ is checked and runs; those that want a download run on synthetic images without weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Said
from tests.scenes import scenes
from tuner import parsing, space

FILES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
TINY = {
    "resnet": ["search.trials=2", "recipe.epochs=1", "recipe.freeze_depth=4"],
    "cifar10_resnet50": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.batch_size=64"],
    "vgg": ["data={name: synthetic, size: 32, examples: 40}", "model.name=vgg11_bn", "model.weights=none", "recipe.freeze_depth=7"],
    "timm": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.freeze_depth=9"],
    "imagefolder": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none"],
    "unet": ["data={name: masks, path: scenes, size: 32}", "model={name: unet/tu-mobilenetv3_small_050, weights: none}"],
    "fcn": ["data={name: masks, path: scenes, size: 32}", "model={name: lraspp_mobilenet_v3_large, weights: none}"],
}
DEFAULT_LR = {"unet": 2e-4, "fcn": 0.01}  # of the first trial, as the model's own people begin; 0.001 elsewhere
METRIC = {"unet": "mean iou", "fcn": "mean iou"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_resolves_and_reads_back(path: Path) -> None:
    found = parsing.load(path)
    assert parsing.parse(parsing.document.parse(space.dump(found.tree()), "printed")) == found
    assert found.default()["lr"] == DEFAULT_LR.get(path.stem, 0.001)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_runs(path: Path, tuner: Callable[..., Said]) -> None:
    words = [*TINY[path.stem], "recipe.epochs=1", "search.trials=2", "engine.name=inline", "engine.device=cpu", "export=[safetensors]"]
    scenes(Path("scenes"))
    said = tuner("run", path, *dict.fromkeys(words))
    assert said.code == 0, said.err
    assert f"\ntest     {METRIC.get(path.stem, 'accuracy')}" in said.out
