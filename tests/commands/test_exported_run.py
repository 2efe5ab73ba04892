"""The run that is exported of a trial: how long it is trained on more examples."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from tests.conftest import CommandResult
from tuner.commands.exported_run import (
    choose_export,
    choose_outputs,
    retrained_run,
    with_thresholds,
)
from tuner.config.run import PluginConfig, Recipe, Run, SearchSettings
from tuner.search import history, storage
from tuner.search.retraining import retraining_seconds, training_seconds


def trial_run(folds: int = 1, **recipe: Any) -> Run:
    data = PluginConfig("folder", {"folds": folds})
    model = PluginConfig("resnet18", {})
    return Run(PluginConfig("classification", {}), data, model, Recipe(**recipe), 3)


@pytest.mark.parametrize(
    ("epochs", "best", "train", "valid", "expected"),
    [
        (6, 6, 500, 250, (4, 4)),  # 3,000 examples seen by both
        (6, 3, 500, 250, (4, 2)),
        (10, 7, 700, 150, (9, 6)),  # epochs are whole, and steps not fewer
        (3, 2, 500, 250, (2, 2)),
        (4, 4, 500, 250, (3, 3)),
        (1, 1, 500, 250, (1, 1)),  # at least one epoch
        (2, 1, 100, 900, (1, 1)),
    ],
)
def test_a_retraining_keeps_the_number_of_steps(
    epochs: int, best: int, train: int, valid: int, expected: tuple[int, int]
) -> None:
    run = retrained_run(trial_run(epochs=epochs, patience=2), best, train / (train + valid))
    assert (run.recipe.epochs, run.recipe.stop_epoch) == expected
    assert run.recipe.fit == "train+valid" and run.recipe.patience is None


@pytest.mark.parametrize("best", range(1, 7))
def test_the_time_of_a_retraining_grows_with_its_steps(best: int) -> None:
    values = dict.fromkeys(range(1, 7), 0.5)
    attributes = {history.BEST_EPOCH: best, "seconds": 60.0}
    trial = optuna.trial.create_trial(value=0.5, user_attrs=attributes, intermediate_values=values)
    once = trial_run(epochs=6)
    run = retrained_run(once, best, 2 / 3)
    seconds = retraining_seconds(trial, once, 2 / 3)
    assert seconds == pytest.approx(run.recipe.stop_epoch * 3 / 2 * 10)
    assert seconds >= training_seconds(trial, once) - 1e-9
    assert retraining_seconds(trial, once, 1.0) == training_seconds(trial, once)
    # a trial with three folds is three trainings on two thirds, its retraining is one on all
    folds = trial_run(folds=3, epochs=6)
    assert training_seconds(trial, folds) == pytest.approx(training_seconds(trial, once) / 3)
    longer = retrained_run(folds, best, 0.9).recipe.stop_epoch
    assert retraining_seconds(trial, folds, 0.9) == pytest.approx(longer * 3 / 2 * 10 / 3)


def test_a_trial_of_folds_has_seen_all_but_one() -> None:
    run = retrained_run(trial_run(folds=4, epochs=8), 8, 0.5)
    assert (run.recipe.epochs, run.recipe.stop_epoch) == (6, 6)


@pytest.mark.parametrize(
    ("retrain", "expected"),
    [(False, ("train", 8, 5, Path("best"))), (True, ("train+valid", 4, 3, None))],
)
def test_a_trial_is_exported_as_it_was_or_retrained(
    retrain: bool, expected: tuple[str, int, int, Path | None]
) -> None:
    study = optuna.create_study()
    history.keep_split_sizes(study, 100, 100)
    trial = optuna.trial.create_trial(value=0.5, user_attrs={history.BEST_EPOCH: 5})
    exported, weights, _ = choose_export(
        study, trial, trial_run(epochs=8), Path("best"), SearchSettings(), retrain=retrain
    )
    recipe = exported.recipe
    assert (recipe.fit, recipe.epochs, recipe.stop_epoch, weights) == expected


def test_a_study_knows_its_sizes_unless_it_began_in_an_earlier_version() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"x": 0.5})
    history.keep_split_sizes(study, 300, 100)
    history.keep_split_sizes(study, 1, 1)
    assert history.train_share(study) == 0.75
    earlier = optuna.create_study()
    earlier.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    history.keep_split_sizes(earlier, 300, 100)
    assert history.train_share(earlier) == 1


def epochs_of_trial(study: Path, number: int) -> int:
    loaded = optuna.load_study(study_name="small", storage=storage.open_storage(None, study))
    return int(loaded.get_trials()[number].params["epochs"])


def exported_epochs(study: Path, folder: str) -> int:
    manifest = yaml.safe_load((study / folder / "manifest.json").read_text())
    return int(manifest["run"]["recipe"]["epochs"])


def test_commands_train_for_as_many_steps(small: Path, tuner: Any) -> None:
    """`tuner run` knows the sizes, and `tuner export` reads them from the study."""
    assert tuner("run", small, "search.trials=2", "data.valid=0.45").code == 0
    studied = small.parent / "studies/small"
    said: CommandResult = tuner("export", "small", "--trial", 1)
    assert said.code == 0, said.err
    share = 24 / 51  # of the examples of `small`
    expected = math.ceil(epochs_of_trial(studied, 1) * share)
    assert expected < epochs_of_trial(studied, 1)
    assert exported_epochs(studied, "export-1") == expected
    best = yaml.safe_load((studied / "best.yaml").read_text())["recipe"]
    assert best["epochs"] == exported_epochs(studied, "export")


@pytest.mark.parametrize(
    ("calibrate", "temperature", "expected"),
    [
        ("temperature", 2.0, (0.75, 0.5)),  # the logit of 0.9, halved
        ("temperature", None, (0.9, 0.5)),
        ("none", 2.0, (0.9, 0.5)),
        (2.0, None, (0.75, 0.5)),
    ],
)
def test_the_exported_run_states_the_thresholds_of_calibrated_probabilities(
    calibrate: Any, temperature: float | None, expected: tuple[float, ...]
) -> None:
    attributes = {history.BEST_EPOCH: 5, history.THRESHOLDS: [0.9, 0.5]}
    if temperature is not None:
        attributes[history.TEMPERATURE] = temperature
    trial = optuna.trial.create_trial(value=0.5, user_attrs=attributes)
    outputs = choose_outputs(SearchSettings(calibrate=calibrate), trial, retrain=True)
    run = with_thresholds(trial_run(), trial, outputs, retrain=True)
    assert run.task.options["thresholds"] == expected
    plain = optuna.trial.create_trial(value=0.5, user_attrs={history.BEST_EPOCH: 5})
    outputs = choose_outputs(SearchSettings(), plain, retrain=True)
    assert with_thresholds(trial_run(), plain, outputs, retrain=True) == trial_run()
