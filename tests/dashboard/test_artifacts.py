"""What the dashboard shows of a trial, however it ended, and of a study that is run again."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna_dashboard import get_note, save_note

from tests.conftest import SMALL
from tuner import deferred_figures
from tuner.config import parsing, yaml_document
from tuner.config.space import Space
from tuner.dashboard import artifacts, plots
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.messages import Epoch, TrialResult
from tuner.search import storage

optuna.logging.set_verbosity(optuna.logging.ERROR)
PNG = b"\x89PNG\r\n\x1a\n"
FILES = {"curve.png": PNG, "confusion.png": PNG, "per_class.csv": b"class,f1\n0,1.0\n"}
EPOCHS = tuple(
    Epoch(n, 1 / n, {"balanced_accuracy": 0.5, "accuracy": score}, 2.0)
    for n, score in ((1, 0.5), (2, 0.75), (3, 0.7))
)


@pytest.fixture(scope="module")
def space() -> Space:
    return parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return optuna.create_study(
        storage=storage.open_storage(None, tmp_path), study_name="small", direction="maximize"
    )


def attached(study: optuna.Study, trial: optuna.Trial) -> dict[str, tuple[str, Path]]:
    """File name -> its type and its place in the store."""
    found = [
        json.loads(v)
        for k, v in study._storage.get_trial_system_attrs(trial._trial_id).items()
        if k.startswith("artifacts:")
    ]
    return {a["filename"]: (a["mimetype"], Path(a["artifact_id"])) for a in found}


def show(
    study: optuna.Study, space: Space, folder: Path, result: TrialResult
) -> tuple[optuna.Trial, str]:
    trial = study.ask()
    run = space.sample(trial, seed=7)
    ArtifactWriter(study, folder, "accuracy").save_artifacts(trial, run, result)
    return trial, get_note(trial)


def test_a_trial_has_its_files_and_a_note(
    study: optuna.Study, space: Space, tmp_path: Path
) -> None:
    trial, note = show(study, space, tmp_path, TrialResult("complete", EPOCHS, 2, FILES, 6.5))

    types = {name: kind for name, (kind, _) in attached(study, trial).items()}
    assert types == {
        "curve.png": "image/png",
        "confusion.png": "image/png",
        "per_class.csv": "text/csv",
    }
    place = attached(study, trial)["per_class.csv"][1]
    assert (tmp_path / "artifacts" / place).read_bytes() == FILES["per_class.csv"]
    assert note.startswith("Best accuracy **0.7500** in epoch 2 of 3, 6.5 s in all.")
    assert (
        "| &emsp;epoch | &emsp;training loss | &emsp;accuracy | &emsp;balanced accuracy | &emsp;seconds |"
        in note
    )
    assert "| **2** | **0.5000** | **0.7500** | **0.5000** | **2.00** |" in note
    assert "\n  batch_size: 16\n" in note and "\nseed: 7\n" in note


def test_a_pruned_trial_says_where_it_was_pruned(
    study: optuna.Study, space: Space, tmp_path: Path
) -> None:
    trial = study.ask({"epochs": optuna.distributions.IntDistribution(3, 3)})
    run = space.sample(optuna.trial.FixedTrial(space.default_params() | {"epochs": 3}), seed=7)

    ArtifactWriter(study, tmp_path, "accuracy").save_artifacts(
        trial, run, TrialResult("stopped", EPOCHS[:1], 1, FILES, 2.0)
    )

    assert len(attached(study, trial)) == 3
    assert get_note(trial).startswith(
        "**Pruned** after epoch 1 of 3. Best accuracy **0.5000** in epoch 1 of 1, 2.0 s in all."
    )


def test_a_trial_that_diverges_at_once_has_a_note_and_no_files(
    study: optuna.Study, space: Space, tmp_path: Path
) -> None:
    trial, note = show(
        study, space, tmp_path, TrialResult("diverged", (), 0, {}, 1.0, "loss nan in epoch 1")
    )

    assert attached(study, trial) == {}
    assert note.startswith("**Diverged**: loss nan in epoch 1. No score, 1.0 s in all.")
    assert "---:" not in note


def test_a_study_is_described_once(study: optuna.Study, space: Space, tmp_path: Path) -> None:
    ArtifactWriter(study, tmp_path, "accuracy").write_study_note(space)
    assert study.metric_names == ["accuracy"]
    assert get_note(study).startswith(
        "Searches `optimizer`, `lr`, `momentum`, `freeze_depth`, `epochs` for the best **accuracy**"
    )
    assert "lr: {low: 0.0001, high: 0.1, log: true}" in get_note(study)

    save_note(study, "seen by somebody")
    ArtifactWriter(study, tmp_path, "accuracy").write_study_note(space)
    assert get_note(study) == "seen by somebody"


def test_the_dashboard_is_imported_only_to_write_a_note(
    tmp_path: Path, study: optuna.Study, space: Space
) -> None:
    ArtifactWriter(study, tmp_path, "accuracy").write_study_note(space)
    code = f"""
import sys, optuna
from pathlib import Path
from tuner.search import storage
from tuner.dashboard import artifacts
study = optuna.load_study(study_name="small", storage=storage.open_storage(None, Path({str(tmp_path)!r})))
artifacts.ArtifactWriter(study, Path({str(tmp_path)!r}), "accuracy").write_study_note(None)
assert "optuna_dashboard" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_note_of_a_run_without_ranges(space: Space) -> None:
    fixed = parsing.parse_space(
        yaml_document.parse_document(
            "task: classification\ndata: {name: digits}\nmodel: {name: resnet18_slim}\n",
            "fixed.yaml",
        )
    )

    assert artifacts.format_study_note(fixed, "fixed", "log_likelihood").startswith(
        "Searches nothing for the best **log likelihood**"
    )


@pytest.mark.parametrize("classes", [1, 2, 10, 25, 61])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(classes: int) -> None:
    matrix = [[int(i == j) for j in range(classes)] for i in range(classes)]

    assert plots.plot_confusion(
        matrix, [f"a class with a long name {i}" for i in range(classes)]
    ).startswith(PNG)


@pytest.mark.parametrize("scores", [[], [0.5], [0.5, 0.75, 0.7]])
def test_a_learning_curve_is_drawn_for_any_number_of_epochs(scores: list[float]) -> None:
    rows: list[dict[str, Any]] = [{"balanced_accuracy": s} for s in scores]

    for row in ({}, *rows[:1]):  # an epoch that was not validated, or one that was
        all_rows = [row, *rows] if scores else []
        losses = [1.0] * len(all_rows)
        assert plots.plot_learning_curve(losses, all_rows, "balanced_accuracy").startswith(PNG)


def test_scores_per_class_are_a_table() -> None:
    torch = pytest.importorskip("torch")
    from tuner.core.types import Batch
    from tuner.tasks.classification import Classification

    def take(rows: Any, view: int) -> Batch:
        return Batch(torch.zeros(len(rows), 5), rows)  # features, which are no images

    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    data: Any = SimpleNamespace(valid=SimpleNamespace(take=take))
    shown = Classification(("cat", "dog"), 0.0).make_artifacts(
        [(logits, torch.tensor([0, 1, 1]))], data
    )
    assert set(shown) == {"confusion.png", "per_class.csv"}

    rows = list(csv.DictReader(shown["per_class.csv"].decode().splitlines()))
    assert rows[0] == {
        "class": "cat",
        "precision": "0.5000",
        "recall": "1.0000",
        "f1": "0.6667",
        "examples": "1",
    }
    assert shown["confusion.png"] == deferred_figures.defer_figure(
        "confusion", matrix=[[1, 0], [1, 1]], classes=["cat", "dog"]
    )
    assert plots.render_figure(shown["confusion.png"]).startswith(PNG)
