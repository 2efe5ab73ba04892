"""To which of its epochs a trial is trained again."""

from typing import Any

import pytest

from tests.helpers.instant_engine import make_coordinator, make_space, run_all_jobs
from tuner.commands.exported_run import choose_export
from tuner.config.run import Recipe
from tuner.jobs import Job, Outcome
from tuner.messages import Epoch, TrialResult, scale_probability
from tuner.search import history
from tuner.search.coordinator import Coordinator
from tuner.search.retraining import choose_epoch, difference_noise, retrained_epochs

COUNT = 250
NOISE = 2 * difference_noise(0.9, COUNT)  # 0.034


def epoch_of(
    scores: list[float | None], best: int, sign: int = 1, count: int = COUNT, **recipe: Any
) -> int:
    epochs = [
        Epoch(number, 1.0, {} if score is None else {"score": score}, 0.1)
        for number, score in enumerate(scores, 1)
    ]
    settings = Recipe(**{"schedule": "cosine", "epochs": len(epochs), **recipe})
    return choose_epoch(settings, epochs, best, "score", sign, count)


def test_a_falling_schedule_ends_at_its_last_epoch_within_noise() -> None:
    near, worse = 0.9 - 0.9 * NOISE, 0.9 - 1.1 * NOISE
    assert epoch_of([0.8, 0.9, near], 2) == 3
    assert epoch_of([0.8, 0.9, 0.9], 2) == 3
    assert epoch_of([0.8, 0.9, worse], 2) == 2
    assert epoch_of([0.9, worse, near, worse], 1) == 3
    assert epoch_of([0.9, near, None, worse], 1) == 2  # not every epoch is validated
    assert epoch_of([0.7, 0.8, 0.9], 3) == 3
    assert epoch_of([1.0, 0.995], 1) == 2  # one mistake more: a perfect score has noise too


@pytest.mark.parametrize("schedule", ["linear", "cosine", "onecycle", "polynomial"])
def test_each_schedule_that_falls_has_an_end(schedule: str) -> None:
    assert epoch_of([0.9, 0.899], 1, schedule=schedule) == 2


def test_training_without_an_end_stops_at_its_best_epoch() -> None:
    assert epoch_of([0.9, 0.899], 1, schedule="constant") == 1
    assert epoch_of([0.9, 0.899], 1, epochs=5, patience=1) == 1  # patience ended it
    assert epoch_of([0.9, 0.899], 1, epochs=5, stop_epoch=2) == 2


def test_a_score_of_unknown_noise_must_be_as_good() -> None:
    assert epoch_of([0.9, 0.899], 1, count=0) == 1
    assert epoch_of([0.9, 0.9], 1, count=0) == 2
    assert epoch_of([0.3, 0.301], 1, sign=-1) == 1  # a loss
    assert epoch_of([0.3, 0.3], 1, sign=-1) == 2


def carry_out(c: Coordinator, job: Job) -> Outcome:
    """The second of three epochs is the best one, and the third as good within noise."""
    scores = (0.8, 0.9, 0.895)[: job.argument.run.recipe.epochs]
    epochs = [
        Epoch(number, 1.0, {"accuracy": score}, 0.1, float(number), (number / 4,))
        for number, score in enumerate(scores, 1)
    ]
    for epoch in epochs:
        c.report(job, epoch)
    return Outcome("done", TrialResult("complete", tuple(epochs), min(2, len(epochs)), {}, 0.1))


@pytest.mark.parametrize(("retrain", "has_time"), [(True, True), (True, False), (False, True)])
def test_an_export_has_the_temperature_and_thresholds_of_its_epoch(
    retrain: bool, has_time: bool
) -> None:
    """Where search.time leaves no time to train it again, its epoch is the best one."""
    space = make_space(trials=2, retrain=str(retrain).lower())
    c = make_coordinator(space)
    history.keep_split_sizes(c.study, 500, COUNT)
    run_all_jobs(c, carry_out)
    default = history.default_trial(c.study)
    assert default is not None and len(default.intermediate_values) == 3
    attributes, last = default.user_attrs, 3 if retrain else 2
    assert attributes[history.BEST_EPOCH] == 2 and default.value == 0.9
    assert retrained_epochs(default) == last
    assert attributes[history.TEMPERATURE] == last
    assert attributes[history.THRESHOLDS] == [last / 4]
    run = history.run_of_trial(space, c.study, default)
    settings = space.settings.search
    is_retrained = retrain and has_time
    chosen = choose_export(c.study, default, run, None, settings, retrain=is_retrained)
    exported = last if is_retrained else 2
    assert chosen.run.recipe.stop_epoch == exported * (2 / 3 if is_retrained else 1)
    assert chosen.outputs.calibrate == exported
    stated = (scale_probability(exported / 4, exported),)
    assert chosen.run.task.options["thresholds"] == stated
