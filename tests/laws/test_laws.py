"""The laws of docs/design.md that hold whatever is in the folders. Cut and partition: test_models.py; narrowing: test_space.py."""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL, CommandResult
from tests.helpers.study_contents import ended_trials
from tuner.config import parsing, plugins, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.core.types import Source
from tuner.training.devices import DeviceContext, select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

CORES = len(os.sched_getaffinity(0))  # of one local worker


def run(model: str, depth: int, **data: Any) -> Run:
    words = [
        f"model.name={model}",
        "model.weights=none",
        f"recipe.freeze_depth={depth}",
        "recipe.epochs=2",
        "recipe.lr=0.01",
        "recipe.optimizer=sgd",
        "recipe.momentum=0.9",
    ]
    doc = parsing.apply_overrides(
        yaml_document.parse_document(SMALL, "small.yaml"),
        [*words, *(f"data.{k}={v}" for k, v in data.items())],
    )
    return parsing.parse_space(doc).sample(None, seed=5)


def here(home: Path, cache: str) -> DeviceContext:
    return select_device(EngineSettings.model_validate({"device": "cpu", "cache": cache}), home)


@pytest.mark.parametrize(
    ("model", "depth"),
    [
        ("resnet18_slim", 1),
        ("resnet18_slim", 3),
        ("resnet18_slim", 5),
        pytest.param("vgg11_bn", 6, marks=pytest.mark.slow),
    ],
)
def test_stillness_after_fit_the_prefix_is_bit_identical(
    model: str, depth: int, tmp_path: Path
) -> None:
    r = run(model, depth)
    bench = prepare_training(r, here(tmp_path, "auto"), "accuracy")
    prefix, _ = bench.staged_model.split(depth)
    frozen = {k: v.clone() for k, v in prefix.state_dict().items()}
    moving = {k: v.clone() for k, v in bench.net.state_dict().items()}
    list(fit(bench, r.recipe, r.seed))
    assert any("running_mean" in k for k in frozen)  # BatchNorm's buffers are part of the law
    assert all(torch.equal(v, frozen[k]) for k, v in prefix.state_dict().items())
    assert any(not torch.equal(v, moving[k]) for k, v in bench.net.state_dict().items())


@pytest.mark.parametrize(
    ("model", "depth", "data"),
    [
        ("resnet18_slim", 1, {}),
        ("resnet18_slim", 2, {}),
        ("resnet18_slim", 5, {}),
        pytest.param("vgg11_bn", 6, {}, marks=pytest.mark.slow),
        ("resnet18_slim", 1, {"augment": "flip", "views": 2}),
        ("resnet18_slim", 2, {"augment": "strong", "views": 2}),
        ("resnet18_slim", 5, {"augment": "standard"}),
    ],
)
def test_memory_fit_over_the_cache_equals_fit_without(
    model: str, depth: int, data: dict[str, Any], tmp_path: Path
) -> None:
    r = run(model, depth, **data)
    benches = [
        prepare_training(r, here(tmp_path, cache), "accuracy") for cache in ("always", "never")
    ]
    kinds = [type(b.train).__name__ for b in benches]
    assert kinds == ["CachedSource", "UncachedSource"]
    remembered, live = ([progress.epoch for progress in fit(b, r.recipe, r.seed)] for b in benches)
    for a, b in zip(remembered, live, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)
        assert a.scores == pytest.approx(
            b.scores, abs=0.12
        )  # one of the 9 validation images may tip over by rounding
        assert a.scores["log_likelihood"] == pytest.approx(b.scores["log_likelihood"], rel=1e-2)


@pytest.mark.parametrize("augment", ["flip", "strong"])
def test_memory_equal_batches_from_the_cache_and_without(augment: str, tmp_path: Path) -> None:
    r = run("resnet18_slim", 3, augment=augment)
    cached, live = (
        prepare_training(r, here(tmp_path, cache), "accuracy").train
        for cache in ("always", "never")
    )
    index = torch.tensor([5, 0, 17, 3])
    assert cached.views == live.views == (2 if augment == "flip" else 4)
    for view in range(4):
        a, b = cached.take(index, view), live.take(index, view)
        assert torch.allclose(_tensor(a.x), _tensor(b.x), atol=1e-5) and torch.equal(a.y, b.y)
    assert not torch.equal(_tensor(cached.take(index, 0).x), _tensor(cached.take(index, 1).x))


def _tensor(x: Any) -> torch.Tensor:
    assert isinstance(x, torch.Tensor)
    return x


def test_what_a_prefix_computed_is_not_computed_again_by_a_later_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = run("resnet18_slim", 3)
    list(fit(prepare_training(r, here(tmp_path, "always"), "accuracy"), r.recipe, r.seed))

    def never(*_: object) -> Source:
        raise AssertionError("computed again")

    monkeypatch.setattr("tuner.training.activation_cache.CacheFill.run", never)
    again = run("resnet18_slim", 3)
    assert (
        len(
            list(
                fit(prepare_training(again, here(tmp_path, "always"), "accuracy"), again.recipe, 9)
            )
        )
        == 2
    )


@pytest.mark.parametrize("change", [{"cache_gb": 0.0001}, {"cache": "never"}])
def test_what_does_not_fit_is_computed_on_the_fly(change: dict[str, Any], tmp_path: Path) -> None:
    r = run("resnet18_slim", 1)
    bench = prepare_training(
        r,
        select_device(EngineSettings.model_validate({"device": "cpu", **change}), tmp_path),
        "accuracy",
    )
    assert type(bench.train).__name__ == "UncachedSource"
    assert (
        not [p for p in (tmp_path / "activations").glob("*") if p.is_dir()]
        if (tmp_path / "activations").exists()
        else True
    )


@pytest.mark.parametrize(("views", "expected"), [("auto", None), (3, 3), ("null", None)])
def test_views_that_are_limited_for_the_cache_are_endless_where_nothing_is_cached(
    views: Any, expected: int | None, tmp_path: Path
) -> None:
    r = run("resnet18_slim", 0, augment="light", views=views)
    context = prepare_training(r, here(tmp_path, "auto"), "accuracy")
    assert context.train.views == expected and context.valid.views == 1
    index = torch.arange(4)
    shown = {_tensor(context.train.take(index, view).x).numpy().tobytes() for view in range(9)}
    assert len(shown) == 9
    deeper = run("resnet18_slim", 2, augment="light", views=views)
    limited = prepare_training(deeper, here(tmp_path, "auto"), "accuracy").train.views
    assert limited == {"auto": 4, 3: 3, "null": None}[views]


def test_endless_views_are_computed_on_the_fly_and_depth_0_is_the_data_itself(
    tmp_path: Path,
) -> None:
    endless = run("resnet18_slim", 2, augment="flip", views="null")
    assert (
        type(prepare_training(endless, here(tmp_path, "auto"), "accuracy").train).__name__
        == "UncachedSource"
    )
    assert (
        type(
            prepare_training(run("resnet18_slim", 0), here(tmp_path, "auto"), "accuracy").train
        ).__name__
        == "DeviceSource"
    )


# the largest difference of an output: of float16 about 1e-3; 8-bit integers are judged by their score
LARGEST_DIFFERENCE = {"onnx_fp16": 1e-2, "onnx_int8": 1.0}


# formats made from those that the default suite makes
LONG_FORMATS = ("onnx_fp16", "onnx_int8", "openvino")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind in LONG_FORMATS else [])
        for kind in plugins.list_names("export")
    ],
)
def test_export_what_is_read_back_agrees_with_the_model(
    kind: str, tuner: Callable[..., CommandResult], small: Path
) -> None:
    said = tuner(
        "train",
        small,
        "recipe.lr=0.01",
        "recipe.optimizer=sgd",
        "recipe.momentum=0.9",
        "recipe.freeze_depth=2",
        "recipe.epochs=1",
        # a library of models can only hold its own
        *(["model={name: timm/resnet10t, weights: none}"] if kind == "pretrained" else []),
        f"export=[{kind}]",
        "--quiet",
    )
    assert said.code == 0, said.err
    manifest = json.loads((small.parent / "studies/small/train/manifest.json").read_text())
    assert manifest["exports"][kind]["largest_difference"] < LARGEST_DIFFERENCE.get(kind, 1e-3)
    assert {
        n: hashlib.sha256((small.parent / "studies/small/train" / n).read_bytes()).hexdigest()
        for n in manifest["files"]
    } == manifest["files"]


@pytest.mark.slow
def test_engines_the_same_study_whichever_carries_it(calm: Path) -> None:
    finish(start(calm, "inline", "engine.name=inline"))
    assert ended_trials(calm, "inline") == ended_trials(calm, "calm")


@pytest.mark.slow
def test_engines_ray_carries_the_same_study(calm: Path) -> None:
    pytest.importorskip("ray")
    said = finish(
        start(
            calm,
            "ray",
            "engine.name=ray",
            "engine.address=local",
            "engine.workers=1",
            f"engine.cpus_per_trial={CORES}",
        )
    )
    assert ended_trials(calm, "ray") == ended_trials(calm, "calm")
    assert "raylet" not in said  # what Ray says stays out of what tuner says


# -- resume: killed and continued equals undisturbed


def start(folder: Path, name: str, *words: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-u",
        "-m",
        "tuner",
        "run",
        str(folder / "kill.yaml"),
        f"search.name={name}",
        *words,
    ]
    # as many threads in every engine: sums of floats follow their number
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES)}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed study named calm."""
    folder = tmp_path_factory.mktemp("kills")
    text = (
        SMALL.replace("inline", "local")
        .replace("examples: 60", "examples: 200")
        .replace("low: 1, high: 3", "low: 3, high: 4")
    )
    (folder / "kill.yaml").write_text(text)
    finish(start(folder, "calm"))
    return folder


@pytest.mark.slow
def test_resume_killed_and_continued_equals_undisturbed(calm: Path) -> None:
    """At a moment by chance; test_resume.py kills the worker too, and counts epochs."""
    name = "killed"
    process = start(calm, name)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("#1 "):
            break
    time.sleep(0.2)
    process.kill()
    process.wait()
    process.stdout.close()
    finish(start(calm, name))
    assert ended_trials(calm, name) == ended_trials(calm, "calm")
    database = sqlite3.connect(calm / "studies" / name / "study.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    files = [
        json.loads((calm / "studies" / n / "export" / "manifest.json").read_text())["files"][
            "model.safetensors"
        ]
        for n in (name, "calm")
    ]
    assert files[0] == files[1]  # the winner, retrained, is the same to the bit
    left = [
        sorted(p.name.partition("-")[0] for p in kept.iterdir())
        for kept in (calm / "studies" / name / "checkpoints").iterdir()
    ]
    assert (
        left == [["best"]] * 3
    )  # of all checkpoints the best three trials' weights stay; test_resume.py counts epochs
