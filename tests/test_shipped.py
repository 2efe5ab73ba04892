"""Every file in search_spaces/ is checked and runs; those that want a download run on synthetic images without weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import scenes
from tests.conftest import Said
from tuner import parsing, space

FILES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
TINY = {
    "resnet": ["search.trials=2", "recipe.epochs=1", "recipe.freeze_depth=4"],
    "cifar10_resnet50": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.batch_size=64"],
    "vgg": ["data={name: synthetic, size: 32, examples: 40}", "model.name=vgg11_bn", "model.weights=none", "recipe.freeze_depth=7"],
    "timm": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.freeze_depth=9"],
    "imagefolder": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none"],
    "yolo": ["data.path=voc", "data.size=64", "model.weights=none", "recipe.freeze_depth=6"],
    "rtdetr": [
        "data.path=voc",
        "data.size=128",
        "data.limit=10",
        "data.augment=none",
        "data.views=1",
        "model.weights=none",
        "recipe.freeze_depth=6",
    ],
}
RATES = {"yolo": 0.0025, "rtdetr": 0.0001}  # their own recipes'
PACKAGES = {"yolo": "libreyolo", "rtdetr": "transformers"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_resolves_and_reads_back(path: Path) -> None:
    found = parsing.load(path)
    assert parsing.parse(parsing.document.parse(space.dump(found.tree()), "printed")) == found
    assert found.default()["lr"] == RATES.get(path.stem, 0.001)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_runs(path: Path, tuner: Callable[..., Said]) -> None:
    words = [*TINY[path.stem], "recipe.epochs=1", "search.trials=2", "engine.name=inline", "engine.device=cpu", "export=[safetensors]"]
    if "data.path=voc" in words:
        pytest.importorskip(PACKAGES.get(path.stem, "torch"))
        scenes.voc(Path("voc"))
    said = tuner("run", path, *dict.fromkeys(words))
    assert said.code == 0, said.err
    assert f"\ntest     {'map' if 'data.path=voc' in words else 'accuracy'}" in said.out
