"""The commands from end to end, in this process: run, run again, train, export."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import CommandResult
from tests.helpers import damaged_files
from tuner.config.run import EngineSettings
from tuner.files import checkpoint_files
from tuner.manifest import run_from_dict
from tuner.tasks.classification import METRICS
from tuner.training import finalization
from tuner.training.devices import select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

Tuner = Callable[..., CommandResult]


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_run_searches_retrains_tests_exports_and_says_what_to_type_next(
    tuner: Tuner, small: Path
) -> None:
    said = tuner("run", small)
    assert (said.code, said.err) == (0, "")
    study = small.parent / "studies" / "small"
    assert {p.name for p in study.iterdir()} >= {
        "space.yaml",
        "best.yaml",
        "study.db",
        "artifacts",
        "export",
        "lock",
    }
    assert yaml.safe_load((study / "space.yaml").read_text())["search"]["name"] == "small"
    m = manifest(study / "export")
    assert m["classes"] == ["class0", "class1", "class2"]
    assert m["input"]["shape"] == ["batch", 3, 32, 32] and m["preprocess"]["size"] == 32
    assert (
        set(m["scores"]["test"])
        == set(m["scores"]["valid"])
        == set(METRICS) - {"top_3", "top_5"}  # of 3 classes these say nothing
    )
    assert set(m["files"]) == {
        "MODEL_CARD.md",
        "README.md",
        "heat_maps.json",
        "model.json",
        "model.safetensors",
        "test_results.safetensors",
    }
    for words in ("test", "tuner predict small", "tuner dashboard small", "tuner train", "default"):
        assert words in said.out
    assert sum(line.startswith("#") for line in said.out.splitlines()) == 4
    (compared,) = (line for line in said.out.splitlines() if line.startswith("default"))
    assert re.fullmatch(r"default  #1, validation accuracy \d\.\d{4}, the best itself", compared)


def test_running_again_says_that_nothing_is_left_and_a_larger_budget_continues(
    tuner: Tuner, small: Path
) -> None:
    hard = "data.noise=3"  # a score below 1, so that the default recipe is not the best
    first = tuner("run", small, hard, "search.trials=2")
    best, default, below = (
        float(number)
        for row in first.out.splitlines()
        if row.startswith(("best", "default"))
        for number in re.findall(r"\d\.\d{4}", row)
    )
    assert 0 < below == pytest.approx(best - default, abs=2e-4)
    assert "below the best, on the examples that chose it\n" in first.out
    before = manifest(small.parent / "studies/small/export")
    again = tuner("run", small, hard, "search.trials=2")
    assert again.code == 0 and "nothing left to do: 2 of 2 trials are done" in again.out
    assert (
        manifest(small.parent / "studies/small/export") == before
    )  # not trained, not tested again
    more = tuner("run", small, hard, "search.trials=3")
    assert sum(line.startswith("#") for line in more.out.splitlines()) == 1


def test_train_repeats_the_winner_to_the_bit(tuner: Tuner, studied: Path, tmp_path: Path) -> None:
    said = tuner("train", studied / "best.yaml", "--out", tmp_path / "again")
    assert said.code == 0, said.err
    first, second = (
        load_file(f / "model.safetensors") for f in (studied / "export", tmp_path / "again")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert (
        manifest(studied / "export")["scores"]["test"]
        == manifest(tmp_path / "again")["scores"]["test"]
    )


def test_best_yaml_is_a_space_file_with_nothing_left_to_choose(tuner: Tuner, studied: Path) -> None:
    tree = yaml.safe_load((studied / "best.yaml").read_text())
    assert (
        tree["recipe"]["fit"] == "train+valid"
        and isinstance(tree["recipe"]["lr"], float)
        and isinstance(tree["seed"], int)
    )
    assert tree["recipe"]["stop_epoch"] <= tree["recipe"]["epochs"]
    assert tuner("check", studied / "best.yaml").code == 0


def test_train_refuses_what_is_still_to_be_chosen(tuner: Tuner, small: Path) -> None:
    said = tuner("train", small)
    assert said.code == 2 and "still to be chosen" in said.err and "tuner run" in said.err


def test_a_key_with_several_ranges_is_searched_and_best_yaml_has_one_value(
    tuner: Tuner, small: Path
) -> None:
    ranges = "[{low: 0.01, high: 0.02, when: {optimizer: sgd}}, {low: 1e-4, high: 2e-4, when: {optimizer: adamw}}]"
    words = [f"recipe.lr={ranges}", "recipe.epochs=1", "recipe.momentum=0.9"]
    checked = tuner("check", small, *words)
    assert checked.out.startswith("ok: 3 searched keys; "), checked.err
    refused = tuner("train", small, *words)
    assert (
        "optimizer, lr, freeze_depth still to be chosen" in refused.err
        and "recipe.optimizer=…" in refused.err
    )
    said = tuner("run", small, *words, "search.trials=4", "search.retrain=false")
    assert said.code == 0, said.err
    recipe = yaml.safe_load((Path("studies") / "small" / "best.yaml").read_text())["recipe"]
    low, high = {"sgd": (0.01, 0.02), "adamw": (1e-4, 2e-4)}[recipe["optimizer"]]
    assert low <= recipe["lr"] <= high


@pytest.mark.usefixtures("quick_program")
def test_export_adds_a_format_without_training_again_and_exports_other_trials(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner("run", small, "search.trials=3", "search.pruner=none")
    study = small.parent / "studies" / "small"
    weights = (study / "export" / "model.safetensors").read_bytes()
    other = tuner("export", "small", "--trial", 1)
    assert other.code == 0 and manifest(study / "export-1")["trial"] == 1, other.err
    monkeypatch.setattr("tuner.training.finalization.fit", lambda *_: pytest.fail("trained again"))
    said = tuner("export", "small", "--format", "torch_export")
    assert said.code == 0, said.err
    assert set(manifest(study / "export")["exports"]) == {"safetensors", "torch_export"}
    assert (study / "export" / "model.safetensors").read_bytes() == weights
    assert tuner("export", "small", "--format", "torch_export").code == 0  # it is there already


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--format", "onxx"], 2, "did you mean 'onnx'?"),
        (["--trial", "9"], 3, "has trials 0 to 1, not 9"),
    ],
)
def test_export_errors_teach(
    words: list[str], code: int, message: str, tuner: Tuner, studied: Path
) -> None:
    said = tuner("export", "small", *words)
    assert said.code == code and message in said.err


def test_an_unknown_study_is_named_with_the_nearest(tuner: Tuner, studied: Path) -> None:
    said = tuner("export", "smal")
    assert said.code == 3 and "did you mean 'small'?" in said.err


def test_json_prints_one_object_a_line(tuner: Tuner, small: Path) -> None:
    said = tuner("run", small, "search.trials=1", "--json")
    events = [json.loads(line) for line in said.out.splitlines()]
    assert {e["event"] for e in events} >= {"begin", "epoch", "trial", "retrain", "summary"}
    assert events[-1]["event"] == "summary" and 0 <= events[-1]["value"] <= 1


def test_quiet_prints_nothing(tuner: Tuner, small: Path) -> None:
    said = tuner("run", small, "search.trials=1", "--quiet")
    assert (said.code, said.out, said.err) == (0, "", "")


def test_without_retraining_and_kept_weights_there_is_a_best_yaml_and_no_export(
    tuner: Tuner, small: Path
) -> None:
    said = tuner("run", small, "search.trials=1", "search.retrain=false", "search.keep=0")
    assert (
        said.code == 0
        and "nothing is exported: search.retrain is false, and no weights of trial 0 are kept"
        in said.out
    )
    study = small.parent / "studies" / "small"
    assert (study / "best.yaml").exists() and not (study / "export").exists()


@pytest.mark.usefixtures("quick_program")
def test_without_retraining_the_best_trials_own_weights_are_exported(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained for it, and they are to the bit what training that run again gives."""
    monkeypatch.setattr(finalization, "retrain", lambda *_: pytest.fail("it is retrained"))
    words = (
        "run",
        small,
        "search.retrain=false",
        "search.keep=2",
        "search.pruner=none",
        "search.trials=3",
    )
    assert tuner(*words).code == 0
    study = small.parent / "studies" / "small"
    found = manifest(study / "export")
    run = run_from_dict(found["run"])
    assert found["retrained"] is False and run.recipe.fit == "train"
    kept = [
        p
        for p in (study / checkpoint_files.CHECKPOINTS_FOLDER).iterdir()
        if checkpoint_files.find_best_weights(p)
    ]
    assert len(kept) == 2 and all(len(list(p.iterdir())) == 1 for p in kept)
    bench = prepare_training(
        run, select_device(EngineSettings(device="cpu"), Path(os.environ["TUNER_HOME"])), "accuracy"
    )
    progress = list(fit(bench, run.recipe, run.seed))[-1]
    assert progress.epoch.scores == found["scores"]["valid"]
    exported = load_file(study / "export" / "model.safetensors")
    assert all(
        torch.equal(exported[name], value)
        for name, value in bench.staged_model.model.state_dict().items()
    )
    assert "nothing left to do" in tuner(*words).out
    assert tuner("export", "small", "--format", "torch_export").code == 0  # not retrained either
    assert set(manifest(study / "export")["exports"]) == {"safetensors", "torch_export"}
    shutil.rmtree(study / "export")
    for folder in kept:
        (path,) = folder.iterdir()
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    said = tuner(*words)
    assert (
        said.code == 3
        and "damaged or of another model; with search.retrain: true the run is trained again"
        in said.err
    )
    assert not (study / "export").exists()


def test_a_model_of_the_users_own_is_searched(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.parent / "mymodels.py").write_text(
        "from torch import nn\n\n\ndef build(outputs: int, *, width: int = 8) -> nn.Module:\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))\n"
    )
    monkeypatch.syspath_prepend(str(small.parent))
    said = tuner(
        "run",
        small,
        "model={name: 'mymodels:build', width: {low: 4, high: 8}}",
        "recipe.freeze_depth.high=4",
        "search.trials=2",
        "data.size=16",
    )
    assert said.code == 0, said.err
    assert "  PYTHONPATH=. tuner predict small IMAGE… --trust " in said.out
    damaged_files.make_picture(0).save(small.parent / "a.png")
    assert tuner("predict", "small", "a.png").code == 2
    assert tuner("predict", "small", "a.png", "--trust").out.startswith("a.png  ")
    assert "width" in (small.parent / "studies/small/best.yaml").read_text()
    assert (
        tuner(
            "check", small, "model={name: 'mymodels:build'}", "recipe.freeze_depth.high=5"
        ).err.count("allows 0..4")
        == 1
    )


def test_the_data_and_weights_are_read_before_a_study_is_made(tuner: Tuner, small: Path) -> None:
    said = tuner("run", small, "data={name: folder, path: nowhere}")
    assert said.code == 3 and "data.path: nowhere does not exist" in said.err
    assert not (small.parent / "studies").exists()


def test_a_cache_folder_that_cannot_be_written_is_replaced_with_one_warning(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = small.parent / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("TUNER_HOME", str(blocked))
    said = tuner("run", small, "search.trials=1", "search.retrain=false")
    assert said.code == 0 and said.err.count("cannot be written") == 1


def test_check_looks_at_local_weights_and_downloads_nothing(tuner: Tuner, small: Path) -> None:
    said = tuner("check", small, "model.weights=./nothing.pth")
    assert said.code == 3 and "nothing.pth does not exist" in said.err
    said = tuner("check", small, "data={name: cifar10}")
    assert said.code == 3 and "is not there yet; `tuner run` downloads it from https://" in said.err
    assert (
        tuner("check", small, "model={name: resnet18, weights: default}").code == 0
    )  # named weights are fetched by run only


@pytest.mark.parametrize("name", ["a$_{$猫" + "x" * 100])
def test_odd_class_names_reach_the_pictures(name: str, tuner: Tuner, small: Path) -> None:
    from PIL import Image

    for label, colour in ((name, "red"), ("other", "blue")):
        (small.parent / "photos" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (32, 32), colour).save(small.parent / "photos" / label / f"{i}.png")
    said = tuner("run", small, "data={name: folder, path: photos}", "search.trials=1")
    assert said.code == 0, said.err
    kept = [p for p in (small.parent / "studies/small/artifacts").iterdir() if p.is_file()]
    assert len(kept) >= 3  # curves, confusion matrix and table; mistakes where there are any
