"""Every file in search_spaces/ is checked and runs; those that want a download run on synthetic images or tiny models without weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import texts
from tests.conftest import Said
from tuner import parsing, space

FILES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
TINY = {
    "resnet": ["search.trials=2", "recipe.epochs=1", "recipe.freeze_depth=4"],
    "cifar10_resnet50": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.batch_size=64"],
    "vgg": ["data={name: synthetic, size: 32, examples: 40}", "model.name=vgg11_bn", "model.weights=none", "recipe.freeze_depth=7"],
    "timm": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none", "recipe.freeze_depth=9"],
    "imagefolder": ["data={name: synthetic, size: 32, examples: 40}", "model.weights=none"],
    "bert": ["data.path=messages.csv", "model.folder=bert", "model.weights=none", "model.length=32", "recipe.freeze_depth=2"],
    "gpt2": ["data.path=messages.csv", "model.folder=gpt2", "model.weights=none", "model.length=32", "recipe.freeze_depth=2"],
}
SAID = {"gpt2": "negative log perplexity"}  # instead of accuracy


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_resolves_and_reads_back(path: Path) -> None:
    found = parsing.load(path)
    assert parsing.parse(parsing.document.parse(space.dump(found.tree()), "printed")) == found
    assert found.default()["lr"] == {"bert": 2e-5, "gpt2": 5e-5}.get(path.stem, 0.001)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_file_runs(path: Path, tuner: Callable[..., Said]) -> None:
    words = [*TINY[path.stem], "recipe.epochs=1", "search.trials=2", "engine.name=inline", "engine.device=cpu", "export=[safetensors]"]
    if path.stem in texts.KINDS:
        pytest.importorskip("transformers")
        texts.write_csv(Path("messages.csv"))
        texts.folder(Path(), path.stem, weights=False)
    said = tuner("run", path, *dict.fromkeys(words))
    assert said.code == 0, said.err
    assert f"\ntest     {SAID.get(path.stem, 'accuracy')}" in said.out
