"""The tutorial is true: its file is accepted, its commands run in order, its program agrees with `tuner predict`."""

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CommandResult
from tuner.config import parsing

TUTORIAL = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TUTORIAL, re.DOTALL)
# The tutorial's model is downloaded; the embedded one stands in for it. timm resizes by cubic interpolation.
QUICK = [
    "model.name=resnet18_slim",
    "model.weights=bundled",
    "data.size=96",  # below half of a photograph, JPEG is decoded at a smaller scale: other pixels
    "data.interpolation=bicubic",
    "search.trials=2",
    "search.confirm={top: 2, repeats: 2}",
    "recipe.epochs=1",
    "recipe.freeze_depth=5",
    "engine.name=inline",
    "export=onnx",
]


def block(language: str, word: str) -> str:
    return next(text for name, text in BLOCKS if name == language and word in text)


def photograph(path: Path, number: int) -> None:
    """Noise around the colour of its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).normal(0, 40, (150, 144, 3))
    colour = np.array([40 * (sum(path.parent.name.encode()) % 5), 128, 90])
    Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(path)


def first_words(text: str) -> set[str]:
    """What the lines of an output begin with; numbers of trials count as one."""
    return {re.sub(r"#\d+", "#", line.split()[0]) for line in text.splitlines() if line[:1].strip()}


@pytest.mark.slow
def test_the_tutorials_commands_run_in_order(
    tuner: Callable[..., CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r"^photos/(\S+?)/… ", block("", "photos/dress"), re.MULTILINE):
        for number in range(8):
            photograph(tmp_path / "photos" / folder / f"{number}.jpg", number)
    photograph(tmp_path / "new" / "1.jpg", 99)
    (tmp_path / "clothes.yaml").write_text(block("yaml", "path: photos"))
    assert parsing.load_space(tmp_path / "clothes.yaml").dimensions[1].name == "freeze_depth"
    (tmp_path / "classify.py").write_text(block("python", "onnxruntime"))
    outputs: dict[str, str] = {}
    commands = [line for name, text in BLOCKS if name == "bash" for line in text.splitlines()]
    for command in (line for line in commands if line.startswith("tuner ")):
        words = shlex.split(command.replace("*", "1"))[1:]
        finished = tuner(*words, *(QUICK if words[0] in ("check", "run") else ()))
        assert finished.code == 0, (command, finished.err)
        outputs[words[0]] = finished.out
    assert list(outputs) == ["check", "run", "predict"]
    shown = first_words(block("", "training on train and valid"))
    assert shown == first_words(outputs["run"]), "the tutorial shows and explains other lines"

    monkeypatch.setattr(sys, "argv", ["classify.py", "new/1.jpg"])
    capsys.readouterr()
    runpy.run_path("classify.py")
    name, probability = capsys.readouterr().out.split()
    predicted = outputs["predict"].split()
    assert predicted[:2] == ["new/1.jpg", name]
    assert float(predicted[2]) == pytest.approx(float(probability), abs=0.002)
