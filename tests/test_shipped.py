"""Every file in search_spaces/ is checked and runs; those that want a download run on synthetic images without weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import scenes
from tests.conftest import Said
from tuner import parsing, plugins, space

FILES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
TINY = {
    "resnet": ["search.trials=2", "recipe.epochs=1", "recipe.freeze_depth=4"],
    "cifar10_resnet50": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.batch_size=64"],
    "vgg": ["data={name: synthetic, size: 32, examples: 40}", "model.name=vgg11_bn", "model.weights=none", "recipe.freeze_depth=7"],
    "timm": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.freeze_depth=9"],
    "fasterrcnn": [
        "data={name: voc, path: voc, size: 64}",
        "model={name: fasterrcnn/timm/mobilenetv3_small_050, backbone: none, regions: 16, proposals: 50}",
        "recipe.freeze_depth=8",
    ],
    "imagefolder": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none"],
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_resolves_and_reads_back(path: Path) -> None:
    found = parsing.load(path)
    assert parsing.parse(parsing.document.parse(space.dump(found.tree()), "printed")) == found
    task, names = found.values["task", "name"], found.tree()["model"]["name"]
    recipe = plugins.stated(names if isinstance(names, str) else "resnet18", "RECIPES", {}).get(task, {})
    assert found.default()["lr"] == recipe.get("lr", 0.001)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_runs(path: Path, tuner: Callable[..., Said], tmp_path: Path) -> None:
    if "path: voc" in str(TINY[path.stem]):
        scenes.voc(tmp_path / "voc")
    words = [*TINY[path.stem], "recipe.epochs=1", "search.trials=2", "engine.name=inline", "engine.device=cpu", "export=[safetensors]"]
    said = tuner("run", path, *dict.fromkeys(words))
    assert said.code == 0, said.err
    assert f"\ntest     {parsing.load(path).settings.search.metric}" in said.out
