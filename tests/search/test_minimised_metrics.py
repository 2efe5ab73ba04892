"""A metric of which lower values are better: everything is decided as with its negative values."""

from typing import Any

import optuna
import pytest

from tests.helpers.instant_engine import (
    carry_out_without_training,
    make_coordinator,
    make_space,
    run_all_jobs,
)
from tuner.config.objective import Direction, is_improvement
from tuner.errors import SpaceError
from tuner.jobs import Job, Outcome
from tuner.messages import Epoch
from tuner.search import history, storage, windowed_study
from tuner.search.coordinator import Coordinator
from tuner.search.pruners import PRUNERS

optuna.logging.set_verbosity(optuna.logging.ERROR)
MIRRORED = ("log_likelihood", "log_loss")  # the second is the negative of the first


def carry_out(c: Coordinator, job: Job) -> Outcome:
    """What a worker would do: each epoch has a log-likelihood and a log loss."""

    class Reporting:
        def report(self, job: Job, epoch: Epoch) -> bool:
            value = epoch.scores["accuracy"] - 1
            epoch.scores.update(log_likelihood=value, log_loss=-value)
            return c.report(job, epoch)

    return carry_out_without_training(Reporting(), job)  # type: ignore[arg-type]


def search(metric: str, pruner: str, *, killed_after: int | None = None) -> Coordinator:
    """A search of 40 trials, killed once if wanted; random for the median, which ends none of TPE's here."""
    sampler = "random" if pruner == "median" else "tpe"
    space = make_space(metric=metric, pruner=pruner, sampler=sampler, trials=40)
    database = optuna.storages.InMemoryStorage()
    coordinator = make_coordinator(space, database)
    if killed_after is not None:
        run_all_jobs(coordinator, carry_out, most=killed_after)
        coordinator.next_job()  # and it dies with a trial that runs
        coordinator = make_coordinator(space, database)
    run_all_jobs(coordinator, carry_out)
    return coordinator


def told(c: Coordinator) -> list[Any]:
    """Every trial that ended, as its proposal, and how far it came; those of killed workers not."""
    proposals = history.proposal_numbers(c.study)
    ended = [t for t in c.study.get_trials() if t.state.name != "FAIL"]
    return [
        (proposals[t.number], t.params, t.state.name, len(t.intermediate_values)) for t in ended
    ]


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_a_study_that_minimises_is_the_mirror_image_of_one_that_maximises(pruner: str) -> None:
    upwards, downwards = (search(metric, pruner) for metric in MIRRORED)
    assert told(upwards) == told(downwards)
    if pruner == "median":
        assert any(state == "PRUNED" for _, _, state, _ in told(downwards))
    (winner, tied), (mirrored, mirrored_tied) = (
        history.best_trial(c.study) for c in (upwards, downwards)
    )
    assert (winner.number, tied) == (mirrored.number, mirrored_tied)
    assert mirrored.value == min(t.value for t in history.completed_trials(downwards.study))
    assert history.ended_proposals(upwards.study) == history.ended_proposals(downwards.study)


def test_a_killed_study_that_minimises_goes_on_as_an_undisturbed_one() -> None:
    calm, killed = search("log_loss", "median"), search("log_loss", "median", killed_after=9)
    assert told(killed) == told(calm)
    assert history.best_trial(killed.study)[0].params == history.best_trial(calm.study)[0].params


def test_the_window_keeps_the_lowest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed_study, "MAX_BEST", 2)
    monkeypatch.setattr(windowed_study, "MAX_LATEST", 3)
    study = optuna.create_study(direction="minimize")
    for value in (5.0, 1.0, 4.0, 2.0, 9.0, 8.0, 7.0):
        study.add_trial(optuna.trial.create_trial(value=value))
    windowed = windowed_study.WindowedStudy(study)
    with windowed.window():
        seen = windowed.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert [trial.value for trial in seen] == [1.0, 2.0, 9.0, 8.0, 7.0]


def test_of_equal_losses_the_trial_with_fewer_epochs_wins() -> None:
    study = optuna.create_study(direction="minimize")
    for value, epoch in ((0.3, 3), (0.3, 2), (0.4, 1)):
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs={"best_epoch": epoch}))
    best, tied = history.best_trial(study)
    assert (best.number, tied) == (1, [0])


@pytest.mark.parametrize(("first", "then"), [("maximise", "minimise"), ("minimise", "maximise")])
def test_a_study_keeps_its_direction(first: Direction, then: Direction) -> None:
    database = optuna.storages.InMemoryStorage()

    def open_it(direction: Direction) -> optuna.Study:
        sampler, pruner = optuna.samplers.RandomSampler(), optuna.pruners.NopPruner()
        identity = {"search": {"metric": "own:cost", "seed": 0}}
        return storage.open_study(
            database, "s", sampler, pruner, identity, "data", direction=direction
        )

    assert open_it(first).direction.name.lower() == storage.OPTUNA_DIRECTIONS[first]
    with pytest.raises(SpaceError, match=f"this file {then}s; use another search.name"):
        open_it(then)


def test_an_equal_value_is_no_improvement() -> None:
    assert is_improvement(2, 1, "maximise") and is_improvement(1, 2, "minimise")
    assert not is_improvement(1, 2, "maximise") and not is_improvement(2, 1, "minimise")
    assert not is_improvement(1, 1, "maximise") and not is_improvement(1, 1, "minimise")
