"""The coordinator against an engine that answers at once: budget, retries, repeats, pruning, ends and resumes."""

from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.conftest import SMALL
from tests.helpers.instant_engine import Silent, coordinator, drive, space, train
from tuner.config import parsing, yaml_document
from tuner.config.space import Space
from tuner.errors import DataError, NoUsableTrial
from tuner.jobs import Job, Outcome
from tuner.messages import Epoch, Result
from tuner.search import history
from tuner.search.coordinator import Coordinator
from tuner.search.samplers import PRUNERS, mix

optuna.logging.set_verbosity(optuna.logging.ERROR)


def states(c: Coordinator) -> list[str]:
    return [t.state.name for t in c.study.get_trials()]


def test_budget_counts_ended_trials_and_is_not_exceeded_on_resume() -> None:
    storage = optuna.storages.InMemoryStorage()
    c = coordinator(space(trials=5), storage)
    drive(c)
    assert len(c.study.trials) == 5
    assert drive(coordinator(space(trials=5), storage)) == []
    drive(coordinator(space(trials=7), storage))
    assert len(c.study.get_trials()) == 7


def test_trial_0_is_the_default_recipe_as_far_as_the_space_allows() -> None:
    c = coordinator(space(trials=1))
    drive(c)
    assert c.study.trials[0].params == {
        "optimizer": "sgd",
        "lr": 0.001,
        "momentum": 0.9,
        "freeze_depth": 0,
        "epochs": 3,
    }


def test_the_first_trial_is_the_cheap_truth_and_the_second_the_default_recipe_which_is_never_pruned() -> (
    None
):
    c = coordinator(space(trials=3, pruner="successive-halving"))
    drive(c)
    cheap, default = c.study.trials[:2]
    assert cheap.params == {
        "optimizer": "sgd",
        "lr": 0.001,
        "momentum": 0.9,
        "freeze_depth": 5,
        "epochs": 1,
    }
    assert (
        default.params == c.space.default()
        and default.user_attrs[history.DEFAULT]
        and not cheap.user_attrs.get(history.DEFAULT)
    )
    found = history.default(c.study)
    assert found is not None and found.number == 1 and len(found.intermediate_values) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["recipe.head=fresh"],
        ["model.weights=none"],
        ["recipe.freeze_depth=3"],
        ["search.sampler=grid", "recipe.lr=[0.1]", "recipe.momentum=0.9"],
    ],
)
def test_where_a_probe_says_nothing_the_default_recipe_is_first(words: list[str]) -> None:
    s = parsing.parse(
        parsing.override(yaml_document.parse(SMALL, "small.yaml"), [*words, "search.trials=3"])
    )
    c = coordinator(s)
    drive(c)
    assert c.study.trials[0].params == s.default() and c.study.trials[0].user_attrs[history.DEFAULT]
    assert sum(t.params == s.default() for t in c.study.trials) == 1


def test_a_budget_of_one_is_the_default_recipe_and_more_of_it_does_not_ask_for_it_again() -> None:
    storage = optuna.storages.InMemoryStorage()
    drive(coordinator(space(trials=1), storage))
    c = coordinator(space(trials=4), storage)
    drive(c)
    assert [t.params == c.space.default() for t in c.study.trials] == [True, False, False, False]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("drawn", [True, False])
def test_a_killed_and_continued_search_draws_what_an_undisturbed_one_draws(
    sampler: str, drawn: bool
) -> None:
    calm = coordinator(space(trials=14, sampler=sampler))
    drive(calm)
    storage = optuna.storages.InMemoryStorage()
    for _ in range(14):  # each process carries out one trial, and dies holding the next
        c = coordinator(space(trials=14, sampler=sampler), storage)
        drive(c, most=1)
        if c.wanted():
            c.next_job() if drawn else c.asker.ask(
                c.ledger.roots
            )  # with its parameters drawn, or not yet
    c = coordinator(space(trials=14, sampler=sampler), storage)
    drive(c)

    def roots(study: optuna.Study) -> list[tuple[Any, ...]]:
        draw = history.roots(study)
        ended = [
            t for t in study.get_trials() if t.state in (TrialState.COMPLETE, TrialState.PRUNED)
        ]
        return [
            (draw[t.number], t.params, t.value, history.run_of(c.space, study, t).seed)
            for t in ended
        ]

    assert roots(c.study) == roots(calm.study)
    assert "RUNNING" not in states(c) and "WAITING" not in states(c)


def test_an_orphan_is_failed_with_its_reason_and_asked_again_with_the_same_seed() -> None:
    storage = optuna.storages.InMemoryStorage()
    first = coordinator(space(trials=2), storage).next_job()
    again = coordinator(space(trials=2), storage)
    second = again.next_job()
    assert first is not None and second is not None
    assert second.argument.run == first.argument.run  # the seed follows the root trial
    assert states(again)[:2] == ["FAIL", "RUNNING"]
    assert again.study.trials[0].user_attrs["tuner:reason"].startswith("orphaned")
    assert again.study.trials[1].user_attrs["tuner:root"] == 0


def test_a_lost_worker_costs_its_trial_an_attempt_and_the_third_is_the_last() -> None:
    c = coordinator(space(trials=2))
    drive(
        c,
        lambda c, job: (
            Outcome("lost", reason="worker ended by SIGKILL")
            if history.roots(c.study)[job.number] == 0
            else train(c, job)
        ),
    )
    zero = [t for t in c.study.trials if history.roots(c.study)[t.number] == 0]
    assert [t.state.name for t in zero] == ["FAIL"] * 3
    assert [t.user_attrs.get("tuner:attempt", 1) for t in zero] == [1, 2, 3]
    assert {t.user_attrs["tuner:reason"] for t in zero} == {"worker ended by SIGKILL"}
    assert c.closed == 2 and states(c)[-1] == "COMPLETE"


def test_equal_parameters_are_not_trained_twice() -> None:
    s = parsing.parse(
        parsing.override(
            yaml_document.parse(SMALL, "x"),
            [
                "recipe.lr=[0.01, 0.1]",
                "recipe.epochs=1",
                "recipe.freeze_depth=0",
                "recipe.optimizer=adamw",
                "recipe.momentum=0.9",
                "search.trials=6",
            ],
        )
    )
    listener = Silent()
    c = coordinator(s, listener=listener)
    jobs = drive(c)
    assert len(jobs) == 2 and len(c.study.trials) == 6 and listener.ends == list(range(6))
    repeated = [t for t in c.study.trials if "tuner:same_as" in t.user_attrs]
    assert len(repeated) == 4
    assert all(t.value == c.study.trials[t.user_attrs["tuner:same_as"]].value for t in repeated)


def test_a_twin_of_a_running_trial_waits_for_its_result() -> None:
    s = parsing.parse(
        parsing.override(
            yaml_document.parse(SMALL, "x"),
            [
                "recipe.lr=[0.01]",
                "recipe.epochs=1",
                "recipe.freeze_depth=0",
                "recipe.optimizer=adamw",
                "recipe.momentum=0.9",
                "search.trials=3",
            ],
        )
    )
    c = coordinator(s)
    job = c.next_job()
    assert job is not None and c.next_job() is None  # both others follow the running one
    c.ended(job, train(c, job))
    assert states(c) == ["COMPLETE"] * 3 and c.closed == 3


def gridded() -> Space:
    """2 learning rates x (2 momenta under sgd + adamw) = 6 points; the default (lr 0.001) is clipped into the grid."""
    words = [
        "recipe.lr=[0.01, 0.1]",
        "recipe.momentum.low=0.8",
        "recipe.momentum.high=0.9",
        "recipe.momentum.step=0.1",
        "recipe.epochs=1",
        "recipe.freeze_depth=0",
        "search.sampler=grid",
        "search.trials=100",
    ]
    return parsing.parse(parsing.override(yaml_document.parse(SMALL, "x"), words))


def test_grid_asks_each_combination_once_and_then_ends() -> None:
    c = coordinator(gridded())
    drive(c)
    keys = [history.key_of(t.params) for t in c.study.trials]
    assert len(keys) == len(set(keys)) == 6


def test_a_grid_that_the_budget_cuts_is_spread_over_its_values_by_the_seed_and_said() -> None:
    def asked(seed: int, trials: int) -> tuple[list[str], Coordinator]:
        ranges = ["recipe.lr={low: 0.01, high: 1, step: 0.01}", "recipe.epochs={low: 1, high: 100}"]
        fixed = ["recipe.optimizer=[sgd, adamw]", "recipe.momentum=0.9", "recipe.freeze_depth=0"]
        search = ["search.sampler=grid", f"search.seed={seed}", f"search.trials={trials}"]
        document = yaml_document.parse(SMALL, "x")
        c = coordinator(parsing.parse(parsing.override(document, [*ranges, *fixed, *search])))
        for _ in range(min(trials, 12)):
            c.next_job()
        return [history.key_of(t.params) for t in c.study.trials], c

    keys, c = asked(0, 12)
    assert keys == asked(0, 20_000)[0]  # a larger budget begins alike
    assert keys[1:] != asked(1, 12)[0][1:] and len(set(keys)) == 12
    params = [t.params for t in c.study.trials]
    assert {p["optimizer"] for p in params} == {"sgd", "adamw"}
    assert len({p["lr"] for p in params}) > 8 and len({p["epochs"] for p in params}) > 8
    assert c.asker.warning() == (
        "search.trials: the grid has 20,000 combinations, of which 12 are tried, drawn by search.seed; "
        "for all of them set search.trials to 20000"
    )
    assert asked(0, 20_000)[1].asker.warning() is None
    grid = c.asker.grid
    assert c.asker.budget() == 12 and c.asker.grid is grid  # it is made once


def test_a_grid_point_that_was_asked_for_and_is_not_drawn_yet_is_not_asked_for_again() -> None:
    """As by another coordinator, which draws the parameters outside of the lock."""
    c = coordinator(gridded())
    asked = [c.asker.ask(draw) for draw in range(7)]
    points = {history.key_of(history.asked(t)) for t in c.study.get_trials(deepcopy=False)}
    assert asked.index(None) == 6 and len(points) == 6


def test_a_retry_of_a_trial_that_ended_at_that_moment_is_withdrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = optuna.storages.InMemoryStorage()
    first = coordinator(space(trials=2), storage)
    job = first.next_job()
    assert job is not None

    def end(point: str) -> None:
        if point == "search.requeued":  # the retry waits, the end of the trial is not told
            first.ended(job, train(first, job))

    monkeypatch.setattr("tuner.search.ledger.crash", end)
    second = coordinator(space(trials=2), storage)
    assert states(second) == ["COMPLETE", "FAIL"] and second.closed == 1
    monkeypatch.undo()
    drive(second)
    assert states(second) == ["COMPLETE", "FAIL", "COMPLETE"] and second.closed == 2
    assert second.study.trials[1].user_attrs[history.REASON].startswith("withdrawn")


@pytest.mark.parametrize("ended", [False, True])
def test_a_retry_whose_first_attempt_lives_after_all_is_withdrawn(ended: bool) -> None:
    """As after a coordinator that was killed between the retry and the end of the trial it took over."""
    c = coordinator(space(trials=3))
    job = c.next_job()
    assert job is not None
    c.study.enqueue_trial(c.running[0].trial.params, {history.ROOT: 0})
    if ended:
        c.ended(job, train(c, job))
    c.ledger.read(c.held())
    assert states(c) == ["COMPLETE" if ended else "RUNNING", "FAIL"]
    if not ended:
        c.ended(job, train(c, job))
    drive(c)
    assert c.closed == 3 and states(c).count("COMPLETE") == 3


def test_the_median_pruner_stops_a_bad_trial_which_ends_pruned() -> None:
    c = coordinator(space(trials=25))
    drive(c)
    pruned = [t for t in c.study.trials if t.state == TrialState.PRUNED]
    assert pruned and all(t.last_step < t.params["epochs"] or t.last_step >= 2 for t in pruned)


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_sampler_and_pruner_carries_a_search(sampler: str, pruner: str) -> None:
    c = coordinator(space(trials=12, sampler=sampler, pruner=pruner))
    drive(c)
    assert c.closed == 12 and history.best(c.study)[0].value is not None


def test_a_diverged_trial_is_pruned_with_a_reason_and_never_the_best() -> None:
    def carry(c: Coordinator, job: Job) -> Outcome:
        if job.number != 1:
            return train(c, job)
        c.report(job, Epoch(1, 1.0, {"accuracy": 0.99}, 0.1))
        return Outcome(
            "done",
            Result(
                "diverged",
                (Epoch(1, 1.0, {"accuracy": 0.99}, 0.1),),
                1,
                {},
                0.1,
                "loss nan in epoch 2",
            ),
        )

    c = coordinator(space(trials=4))
    drive(c, carry)
    assert c.study.trials[1].state == TrialState.PRUNED
    assert c.study.trials[1].user_attrs["tuner:reason"] == "diverged: loss nan in epoch 2"
    assert history.best(c.study)[0].number != 1


def test_three_alike_failures_in_a_row_stop_the_search_and_name_the_cause() -> None:
    c = coordinator(space(trials=20))
    drive(
        c, lambda c, job: Outcome("failed", reason="ValueError: no such layer", trace="Traceback …")
    )
    assert (
        c.closed == 3
        and isinstance(c.error, NoUsableTrial)
        and "ValueError: no such layer" in str(c.error)
    )
    assert c.study.trials[0].user_attrs["tuner:trace"] == "Traceback …"


def test_ten_failures_of_any_kind_stop_the_search_when_none_completed() -> None:
    c = coordinator(space(trials=50))
    drive(
        c,
        lambda c, job: Outcome(
            "done", Result("diverged", (), 0, {}, 0.1, f"loss nan in trial {job.number}")
        ),
    )
    assert c.closed == 10 and "10 trials failed and none completed" in str(c.error)
    with pytest.raises(NoUsableTrial, match="no trial completed"):
        history.best(c.study)


def test_failures_between_successes_do_not_stop_the_search() -> None:
    c = coordinator(space(trials=12))
    drive(
        c,
        lambda c, job: (
            Outcome("failed", reason="ValueError: x") if job.number % 2 else train(c, job)
        ),
    )
    assert c.error is None and c.closed == 12


def test_refused_data_ends_the_search_and_leaves_the_trial_to_be_asked_again() -> None:
    storage = optuna.storages.InMemoryStorage()
    c = coordinator(space(trials=3), storage)
    drive(
        c, lambda c, job: Outcome("refused", reason="DataError", problems=("data: gone",), code=3)
    )
    assert isinstance(c.error, DataError) and c.closed == 0
    again = coordinator(space(trials=3), storage)
    drive(again)
    assert again.closed == 3 and history.default(again.study) is not None


def test_an_interrupted_trial_is_asked_again_without_costing_an_attempt() -> None:
    storage = optuna.storages.InMemoryStorage()
    for _ in range(5):
        c = coordinator(space(trials=2), storage)
        job = c.next_job()
        assert job is not None
        c.stopping = lambda: True
        assert c.report(job, Epoch(1, 1.0, {"accuracy": 0.5}, 0.1)) is False
        c.ended(job, Outcome("done", Result("stopped", (), 1, {}, 0.1)))
        assert c.next_job() is None
    drive(c := coordinator(space(trials=2), storage))
    assert c.closed == 2 and history.default(c.study) is not None
    assert all(t.user_attrs.get("tuner:attempt", 1) == 1 for t in c.study.trials)


@pytest.mark.parametrize(
    ("found", "winner", "tied"),
    [
        ([(0.9, 3), (0.9, 2), (0.8, 1)], 1, [0]),  # equal values: fewer epochs
        ([(0.9, 2), (0.9, 2)], 0, [1]),  # and equal epochs: the lower number
        ([(0.5, 1), (0.7, 3)], 1, []),
    ],
)
def test_the_winner_by_value_then_epochs_then_number(
    found: list[tuple[float, int]], winner: int, tied: list[int]
) -> None:
    study = optuna.create_study(direction="maximize")
    for value, epoch in found:
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs={"best_epoch": epoch}))
    best, others = history.best(study)
    assert (best.number, others) == (winner, tied)


def test_a_timeout_stops_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    now: Iterator[float] = iter([0.0, *([10.0] * 2), *([95.0] * 20)])
    monkeypatch.setattr("tuner.search.coordinator.time.monotonic", lambda: next(now))
    c = coordinator(space(trials=50, timeout="90s"))
    assert len(drive(c)) == 2


def test_the_run_of_a_finished_trial_is_the_run_it_was_given() -> None:
    c = coordinator(space(trials=6))
    jobs = drive(c)
    assert [history.run_of(c.space, c.study, t) for t in c.study.trials] == [
        job.argument.run for job in jobs
    ]


def test_mix_depends_on_every_part() -> None:
    assert len({mix(0, 0), mix(0, 1), mix(1, 0), mix(1, 1)}) == 4
    assert mix(3, 4) == mix(3, 4) < 2**32
