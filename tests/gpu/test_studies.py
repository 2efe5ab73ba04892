"""Whole studies on a GPU: killed and continued, two workers on it at once, and the export of what was trained there.

The same bodies run on the CPU, as slow tests.
"""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tuner as package
from tests.conftest import CommandResult
from tests.helpers.study_contents import ended_trials

Tuner = Callable[..., CommandResult]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
ROOT = Path(package.__file__).parents[1]
STUDY = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32}
model: {name: "MODEL"}
recipe: {optimizer: adamw, lr: {low: 1e-3, high: 1e-1, log: true}, epochs: 3, batch_size: 16, head: fresh}
search: {trials: 2, seed: 0, sampler: random, pruner: none, retrain: false, confirm: none, compare: none}
engine: {name: local}
export: [safetensors]
"""


def run_study(folder: Path, name: str, model: str, *words: str, **environment: str) -> int:
    """The exit code of `tuner run` in a process of its own, minus the signal where it was killed."""
    (folder / "study.yaml").write_text(STUDY.replace("MODEL", model))
    command = [sys.executable, "-m", "tuner", "run", "study.yaml", f"search.name={name}", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=env, text=True, check=False)
    return done.returncode


def one_gpu(device: str) -> list[str]:
    return ["engine.device=cpu"] if device == "cpu" else ["engine.device=cuda", "engine.gpus=1"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_study_goes_on_inside_its_trial(device: str, tmp_path: Path) -> None:
    """Same trials, one epoch more is begun; on a GPU, which adds in another order, scores are not compared."""
    model, words = "tests.helpers.counting_model:build_counted_model", one_gpu(device)
    counted = {name: tmp_path / f"{name}.lines" for name in ("calm", "killed")}
    assert run_study(tmp_path, "calm", model, *words, COUNTED=str(counted["calm"])) == 0
    end = run_study(
        tmp_path, "killed", model, *words, COUNTED=str(counted["killed"]), KILL="both:5"
    )
    assert end == -9
    assert run_study(tmp_path, "killed", model, *words, COUNTED=str(counted["killed"])) == 0
    calm, killed = (ended_trials(tmp_path, name) for name in counted)
    assert [(params, state, set(scores)) for params, state, scores in killed] == [
        (params, state, set(scores)) for params, state, scores in calm
    ]
    if device == "cpu":
        assert killed == calm
    begun = {name: len(file.read_text().splitlines()) for name, file in counted.items()}
    assert begun["calm"] <= begun["killed"] <= begun["calm"] + 1


@pytest.mark.parametrize("device", DEVICES)
def test_two_workers_train_on_one_device_at_once(device: str, tmp_path: Path) -> None:
    words = one_gpu(device) + (["engine.workers=2"] if device == "cpu" else ["engine.per_gpu=2"])
    meeting = tmp_path / "meeting"
    model = "tests.helpers.meeting_model:build_meeting_model"
    assert run_study(tmp_path, "both", model, *words, MEETING=str(meeting)) == 0
    assert len(list(meeting.iterdir())) >= 2  # each worker, and perhaps who made the export
    assert [state for _, state, _ in ended_trials(tmp_path, "both")] == ["COMPLETE"] * 2
    with sqlite3.connect(tmp_path / "studies" / "both" / "study.db") as database:
        (failed,) = database.execute("select count(*) from trials where state = 'FAIL'").fetchone()
    database.close()
    assert failed == 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_export_of_a_model_trained_there_is_read_back(
    device: str, tuner: Tuner, small: Path
) -> None:
    """The command compares each format with the model on the device; here the export answers on the CPU."""
    formats = "export=[safetensors,torch_export]"
    done = tuner("run", small, f"engine.device={device}", "search.trials=1", formats)
    assert done.code == 0, done.err
    folder = small.parent / "studies" / "small" / "export"
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    assert {"model.safetensors", "model.pt2"} <= set(manifest["files"])
    image = small.parent / "grey.png"
    Image.new("RGB", (40, 32), (90, 120, 90)).save(image)
    said = tuner("predict", small.parent / "studies" / "small", image, "--json")
    assert said.code == 0, said.err
    probabilities = json.loads(said.out)["classes"].values()
    assert len(probabilities) == 3 and sum(probabilities) == pytest.approx(1, abs=1e-5)
