"""How long a search goes on, by what its trials cost at each freeze depth."""

from typing import Any

import optuna
import pytest

from tests.helpers.instant_engine import make_space
from tuner.config.run import Run
from tuner.messages import DepthCost, Epoch, TrainingProfile
from tuner.search.running_trial import RunningTrial
from tuner.search.time_left import TimeLeft

optuna.logging.set_verbosity(optuna.logging.ERROR)
PLAIN = {"confirm": "none", "compare": "none"}
MODEL = "resnet18_slim"


def time_left(workers: int = 1, profiles: Any = None, **search: Any) -> TimeLeft:
    return TimeLeft(make_space(**search), {MODEL: 5}, workers, profiles or {})


def run_of(depth: int, epochs: int) -> Run:
    params = {"optimizer": "adamw", "lr": 0.01, "freeze_depth": depth, "epochs": epochs}
    return make_space().sample(optuna.trial.FixedTrial(params))


def train(clock: TimeLeft, number: int, run: Run, seconds: float, *, ends: bool = True) -> None:
    """Epochs of so many seconds each, and one second beside them."""
    trial: Any = optuna.trial.FixedTrial({}, number=number)
    running = RunningTrial(trial, run, number, 1, "", 1)
    for epoch in range(1, run.recipe.epochs + 1):
        clock.on_epoch(running, Epoch(epoch, 1.0, {}, seconds))
    if ends:
        clock.on_trial_end(number, run, run.recipe.epochs * seconds + 1)


def test_nothing_is_known_before_the_first_epoch() -> None:
    assert time_left(**PLAIN).estimate(4, 4) is None


def test_a_training_costs_its_epochs_at_the_nearest_depth_that_is_known() -> None:
    clock = time_left(**PLAIN)
    train(clock, 0, run_of(5, 2), 1.0)
    train(clock, 1, run_of(0, 3), 10.0)
    assert clock.seconds_of(run_of(5, 3)) == 1 + 3 * 1.0
    assert clock.seconds_of(run_of(4, 3)) == 1 + 3 * 1.0
    assert clock.seconds_of(run_of(1, 2)) == 1 + 2 * 10.0


def test_the_rest_is_trials_and_the_trainings_after_them() -> None:
    clock = time_left(confirm="{top: 2, repeats: 3}", sampler="random")
    train(clock, 0, run_of(0, 2), 1.0)
    mean = (clock.estimate(0, 4) or 0) / (2 * 3 + 2)  # the repeats, the winner, the default recipe
    assert 1 + 1 <= mean <= 1 + 3  # seconds of 1 to 3 epochs
    assert clock.estimate(10, 14) == pytest.approx((10 + 8) * mean, rel=0.1)
    two = time_left(workers=2, **PLAIN)
    train(two, 0, run_of(0, 2), 1.0)
    one = time_left(**PLAIN)
    train(one, 0, run_of(0, 2), 1.0)
    after = one.estimate(0, 14) or 0
    assert (two.estimate(10, 14) or 0) - after == pytest.approx(
        ((one.estimate(10, 14) or 0) - after) / 2
    )


def test_what_a_running_trial_has_trained_is_not_left() -> None:
    clock = time_left(**PLAIN)
    train(clock, 0, run_of(0, 2), 1.0)
    before = clock.estimate(3, 4)
    train(clock, 1, run_of(0, 2), 1.0, ends=False)
    assert clock.estimate(3, 4) == pytest.approx((before or 0) - 2.0)


def test_trials_that_are_ended_early_shorten_the_rest() -> None:
    clock = time_left(**PLAIN)
    train(clock, 0, run_of(0, 3), 1.0)
    before = clock.estimate(20, 21) or 0
    run = run_of(0, 3)
    trial: Any = optuna.trial.FixedTrial({}, number=1)
    clock.on_epoch(RunningTrial(trial, run, 1, 1, "", 1), Epoch(1, 1.0, {}, 1.0))
    clock.on_trial_end(1, run, 2.0)  # pruned after one epoch of three
    assert clock.estimate(20, 21) == pytest.approx(before * (4 + 2) / (4 + 4), rel=0.05)


def test_until_a_trial_has_trained_the_plans_measurement_counts() -> None:
    depths = (DepthCost(0, 0.1, 0.05, 0, 0, False), DepthCost(5, 0.01, 0.01, 0.02, 8, True))
    profile = TrainingProfile(depths, 5.0, 1.0, {"train": 100, "valid": 10, "test": 10}, 1)
    clock = time_left(profiles={MODEL: profile}, **PLAIN)
    assert clock.seconds_of(run_of(0, 3)) == pytest.approx(profile.seconds_of_training(0, 3))
    assert clock.estimate(4, 4) is not None
    train(clock, 0, run_of(0, 3), 20.0)
    assert clock.seconds_of(run_of(0, 3)) == pytest.approx(1.0 + 60.0)
    assert clock.seconds_of(run_of(5, 3)) == pytest.approx(profile.seconds_of_training(5, 3))
