"""Cross-validation: a trial trained once a fold, its scores their mean."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.conftest import SMALL, CommandResult
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.files.cache_entries import list_entries
from tuner.messages import mean_temperature
from tuner.training import cross_validation
from tuner.training.building import load_dataset
from tuner.training.cross_validation import fit_folds, prepare_folds, runs_of_folds
from tuner.training.devices import DeviceContext, select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import FitProgress, fit

FIXED = [
    "recipe.lr=0.01",
    "recipe.optimizer=sgd",
    "recipe.momentum=0.9",
    "recipe.freeze_depth=4",
    "recipe.epochs=3",
]


def run(*words: str) -> Run:
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SMALL, "small.yaml"), [*FIXED, *words])
    ).sample(None, seed=5)


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def test_an_epoch_is_the_mean_of_the_folds(here: DeviceContext) -> None:
    folds = run("data.folds=3")
    progress = list(fit_folds(folds, prepare_folds(folds, here, "accuracy")))
    found, best = [p.epoch for p in progress], progress[-1].best
    alone = [
        [p.epoch for p in fit(prepare_training(fold, here, "accuracy"), fold.recipe, fold.seed)]
        for fold in runs_of_folds(run("data.folds=3"))
    ]
    assert [e.number for e in found] == [1, 2, 3]
    for i, epoch in enumerate(found):
        for name, value in epoch.scores.items():
            assert value == pytest.approx(sum(fold[i].scores[name] for fold in alone) / 3, abs=1e-5)
        temperatures = [fold[i].temperature for fold in alone]
        assert len(set(temperatures)) > 1 and epoch.temperature == mean_temperature(temperatures)
    assert (
        len({fold[0].scores["log_likelihood"] for fold in alone}) == 3
    )  # they are not one fold three times
    assert best is not None and best.epoch.scores["accuracy"] == max(
        e.scores["accuracy"] for e in found
    )


def test_one_fold_is_no_cross_validation(here: DeviceContext) -> None:
    plain, crossed_ = (
        list(fit(prepare_training(run(), here, "accuracy"), run().recipe, 5)),
        list(fit_folds(run(), prepare_folds(run(), here, "accuracy"))),
    )
    assert [(p.epoch.loss, p.epoch.scores) for p in plain] == [
        (p.epoch.loss, p.epoch.scores) for p in crossed_
    ]


def test_the_mean_decides_when_patience_ends(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = iter([0.5, 0.9, 0.1, 0.9, 0.2, 0.9])
    real = cross_validation.fit

    def fitted(*arguments: Any) -> Iterator[FitProgress]:
        for progress in real(*arguments):
            yield replace(
                progress, epoch=replace(progress.epoch, scores={"accuracy": next(scripted)})
            )

    monkeypatch.setattr(cross_validation, "fit", fitted)
    folds = run("data.folds=2", "recipe.patience=1")
    found = fit_folds(folds, prepare_folds(folds, here, "accuracy"))
    assert [progress.epoch.scores["accuracy"] for progress in found] == [
        pytest.approx(0.7),
        pytest.approx(0.5),
    ]


def test_a_study_over_folds_ends_in_an_export(
    tuner: Callable[..., CommandResult], small: Path
) -> None:
    said = tuner("run", small, "data.folds=3", "search.trials=2", "recipe.epochs=1")
    assert said.code == 0, said.err
    assert "\ntest     accuracy" in said.out


def computed_examples(runs: list[Run], home: Path) -> list[int]:
    """How many examples go through the first stage in each run, all folds together."""
    counts = []
    context = select_device(
        EngineSettings.model_validate({"device": "cpu", "cache": "always"}), home
    )
    for run_ in runs:
        count = 0

        def add(module: nn.Module, inputs: Any) -> None:
            nonlocal count
            count += (
                len(inputs[0]) if isinstance(module, nn.Conv2d) and module.in_channels == 3 else 0
            )

        with nn.modules.module.register_module_forward_pre_hook(add):
            deque(fit_folds(run_, prepare_folds(run_, context, "accuracy")), maxlen=0)
        counts.append(count)
    return counts


@pytest.mark.parametrize(("augment", "views"), [("none", 1), ("flip", 2)])
def test_folds_and_the_winner_share_what_frozen_stages_computed(
    augment: str, views: int, tmp_path: Path
) -> None:
    """Validation images are as they are: with flips they are other images than those of training."""
    words = ("recipe.head=fresh", f"data.augment={augment}", f"recipe.epochs={views}")
    single, crossed = run(*words), run(*words, "data.folds=5")
    winner = replace(single, recipe=single.recipe.model_copy(update={"fit": "train+valid"}))
    data = load_dataset(single, tmp_path)
    own_valid, own_folds = (0, 0) if views == 1 else (len(data.valid), len(data.full))
    assert computed_examples([single], tmp_path) == [views * len(data.full) + own_valid]
    entries = list_entries(tmp_path / "activations")
    assert computed_examples([crossed, winner], tmp_path) == [own_folds, 0]
    if views == 1:
        assert len(list_entries(tmp_path / "activations")) == len(entries)
