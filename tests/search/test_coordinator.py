"""The coordinator against an engine that answers at once: budget, retries, repeats, pruning, ends and resumes."""

from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.conftest import SMALL
from tests.helpers.instant_engine import (
    RecordingListener,
    carry_out_without_training,
    make_coordinator,
    make_space,
    run_all_jobs,
)
from tuner.config import parsing, yaml_document
from tuner.config.space import Space
from tuner.errors import DataError, NoUsableTrial
from tuner.jobs import Job, Outcome
from tuner.messages import Epoch, TrialResult
from tuner.search import history
from tuner.search.coordinator import Coordinator
from tuner.search.pruners import PRUNERS
from tuner.search.samplers import derive_seed

optuna.logging.set_verbosity(optuna.logging.ERROR)


def states(c: Coordinator) -> list[str]:
    return [t.state.name for t in c.study.get_trials()]


def test_budget_counts_ended_trials_and_is_not_exceeded_on_resume() -> None:
    storage = optuna.storages.InMemoryStorage()
    c = make_coordinator(make_space(trials=5), storage)
    run_all_jobs(c)
    assert len(c.study.trials) == 5
    assert run_all_jobs(make_coordinator(make_space(trials=5), storage)) == []
    run_all_jobs(make_coordinator(make_space(trials=7), storage))
    assert len(c.study.get_trials()) == 7


def test_trial_0_is_the_default_recipe_as_far_as_the_space_allows() -> None:
    c = make_coordinator(make_space(trials=1))
    run_all_jobs(c)
    assert c.study.trials[0].params == {
        "optimizer": "adamw",
        "lr": 0.0005,
        "freeze_depth": 0,
        "epochs": 3,
    }


def test_the_first_trial_is_the_cheap_truth_and_the_second_the_default_recipe_which_is_never_pruned() -> (
    None
):
    c = make_coordinator(make_space(trials=3, pruner="successive-halving"))
    run_all_jobs(c)
    cheap, default = c.study.trials[:2]
    assert cheap.params == {
        "optimizer": "adamw",
        "lr": 0.0005,
        "freeze_depth": 5,
        "epochs": 1,
    }
    assert (
        default.params == c.space.default_params()
        and default.user_attrs[history.IS_DEFAULT_RECIPE]
        and not cheap.user_attrs.get(history.IS_DEFAULT_RECIPE)
    )
    found = history.default_trial(c.study)
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
    s = parsing.parse_space(
        parsing.apply_overrides(
            yaml_document.parse_document(SMALL, "small.yaml"), [*words, "search.trials=3"]
        )
    )
    c = make_coordinator(s)
    run_all_jobs(c)
    assert (
        c.study.trials[0].params == s.default_params()
        and c.study.trials[0].user_attrs[history.IS_DEFAULT_RECIPE]
    )
    assert sum(t.params == s.default_params() for t in c.study.trials) == 1


def test_a_budget_of_one_is_the_default_recipe_and_more_of_it_does_not_ask_for_it_again() -> None:
    storage = optuna.storages.InMemoryStorage()
    run_all_jobs(make_coordinator(make_space(trials=1), storage))
    c = make_coordinator(make_space(trials=4), storage)
    run_all_jobs(c)
    assert [t.params == c.space.default_params() for t in c.study.trials] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("drawn", [True, False])
def test_a_killed_and_continued_search_draws_what_an_undisturbed_one_draws(
    sampler: str, drawn: bool
) -> None:
    calm = make_coordinator(make_space(trials=14, sampler=sampler))
    run_all_jobs(calm)
    storage = optuna.storages.InMemoryStorage()
    for _ in range(14):  # each process carries out one trial, and dies holding the next
        c = make_coordinator(make_space(trials=14, sampler=sampler), storage)
        run_all_jobs(c, most=1)
        if c.has_budget_left():
            c.next_job() if drawn else c.proposer.propose_trial(
                c.ledger.proposal_count
            )  # with its parameters drawn, or not yet
    c = make_coordinator(make_space(trials=14, sampler=sampler), storage)
    run_all_jobs(c)

    def roots(study: optuna.Study) -> list[tuple[Any, ...]]:
        draw = history.proposal_numbers(study)
        ended = [
            t for t in study.get_trials() if t.state in (TrialState.COMPLETE, TrialState.PRUNED)
        ]
        return [
            (draw[t.number], t.params, t.value, history.run_of_trial(c.space, study, t).seed)
            for t in ended
        ]

    assert roots(c.study) == roots(calm.study)
    assert "RUNNING" not in states(c) and "WAITING" not in states(c)


def test_an_orphan_is_failed_with_its_reason_and_asked_again_with_the_same_seed() -> None:
    storage = optuna.storages.InMemoryStorage()
    first = make_coordinator(make_space(trials=2), storage).next_job()
    again = make_coordinator(make_space(trials=2), storage)
    second = again.next_job()
    assert first is not None and second is not None
    assert second.argument.run == first.argument.run  # the seed follows the root trial
    assert states(again)[:2] == ["FAIL", "RUNNING"]
    assert again.study.trials[0].user_attrs["tuner:reason"].startswith("orphaned")
    assert again.study.trials[1].user_attrs["tuner:root"] == 0


def test_a_lost_worker_costs_its_trial_an_attempt_and_the_third_is_the_last() -> None:
    c = make_coordinator(make_space(trials=2))
    run_all_jobs(
        c,
        lambda c, job: (
            Outcome("lost", reason="worker ended by SIGKILL")
            if history.proposal_numbers(c.study)[job.number] == 0
            else carry_out_without_training(c, job)
        ),
    )
    zero = [t for t in c.study.trials if history.proposal_numbers(c.study)[t.number] == 0]
    assert [t.state.name for t in zero] == ["FAIL"] * 3
    assert [t.user_attrs.get("tuner:attempt", 1) for t in zero] == [1, 2, 3]
    assert {t.user_attrs["tuner:reason"] for t in zero} == {"worker ended by SIGKILL"}
    assert c.budget_used == 2 and states(c)[-1] == "COMPLETE"


def test_equal_parameters_are_not_trained_twice() -> None:
    s = parsing.parse_space(
        parsing.apply_overrides(
            yaml_document.parse_document(SMALL, "x"),
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
    listener = RecordingListener()
    c = make_coordinator(s, listener=listener)
    jobs = run_all_jobs(c)
    assert len(jobs) == 2 and len(c.study.trials) == 6 and listener.ends == list(range(6))
    repeated = [t for t in c.study.trials if "tuner:same_as" in t.user_attrs]
    assert len(repeated) == 4
    assert all(t.value == c.study.trials[t.user_attrs["tuner:same_as"]].value for t in repeated)


def test_a_twin_of_a_running_trial_waits_for_its_result() -> None:
    s = parsing.parse_space(
        parsing.apply_overrides(
            yaml_document.parse_document(SMALL, "x"),
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
    c = make_coordinator(s)
    job = c.next_job()
    assert job is not None and c.next_job() is None  # both others follow the running one
    c.on_job_end(job, carry_out_without_training(c, job))
    assert states(c) == ["COMPLETE"] * 3 and c.budget_used == 3


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
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SMALL, "x"), words)
    )


def test_grid_asks_each_combination_once_and_then_ends() -> None:
    c = make_coordinator(gridded())
    run_all_jobs(c)
    keys = [history.params_key(t.params) for t in c.study.trials]
    assert len(keys) == len(set(keys)) == 6


def test_a_grid_that_the_budget_cuts_is_spread_over_its_values_by_the_seed_and_said() -> None:
    def asked(seed: int, trials: int) -> tuple[list[str], Coordinator]:
        ranges = ["recipe.lr={low: 0.01, high: 1, step: 0.01}", "recipe.epochs={low: 1, high: 100}"]
        fixed = ["recipe.optimizer=[sgd, adamw]", "recipe.momentum=0.9", "recipe.freeze_depth=0"]
        search = ["search.sampler=grid", f"search.seed={seed}", f"search.trials={trials}"]
        document = yaml_document.parse_document(SMALL, "x")
        c = make_coordinator(
            parsing.parse_space(parsing.apply_overrides(document, [*ranges, *fixed, *search]))
        )
        for _ in range(min(trials, 12)):
            c.next_job()
        return [history.params_key(t.params) for t in c.study.trials], c

    keys, c = asked(0, 12)
    assert keys == asked(0, 20_000)[0]  # a larger budget begins alike
    assert keys[1:] != asked(1, 12)[0][1:] and len(set(keys)) == 12
    params = [t.params for t in c.study.trials]
    assert {p["optimizer"] for p in params} == {"sgd", "adamw"}
    assert len({p["lr"] for p in params}) > 8 and len({p["epochs"] for p in params}) > 8
    assert c.proposer.warning() == (
        "search.trials: the grid has 20,000 combinations, of which 12 are tried, drawn by search.seed; "
        "for all of them set search.trials to 20000"
    )
    assert asked(0, 20_000)[1].proposer.warning() is None
    grid = c.proposer.grid
    assert c.proposer.trial_budget() == 12 and c.proposer.grid is grid  # it is made once


def test_a_grid_point_that_was_asked_for_and_is_not_drawn_yet_is_not_asked_for_again() -> None:
    """As by another coordinator, which draws the parameters outside of the lock."""
    c = make_coordinator(gridded())
    asked = [c.proposer.propose_trial(draw) for draw in range(7)]
    points = {
        history.params_key(history.requested_params(t)) for t in c.study.get_trials(deepcopy=False)
    }
    assert asked.index(None) == 6 and len(points) == 6


def test_a_retry_of_a_trial_that_ended_at_that_moment_is_withdrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = optuna.storages.InMemoryStorage()
    first = make_coordinator(make_space(trials=2), storage)
    job = first.next_job()
    assert job is not None

    def end(point: str) -> None:
        if point == "search.requeued":  # the retry waits, the end of the trial is not told
            first.on_job_end(job, carry_out_without_training(first, job))

    monkeypatch.setattr("tuner.search.ledger.crash_point", end)
    second = make_coordinator(make_space(trials=2), storage)
    assert states(second) == ["COMPLETE", "FAIL"] and second.budget_used == 1
    monkeypatch.undo()
    run_all_jobs(second)
    assert states(second) == ["COMPLETE", "FAIL", "COMPLETE"] and second.budget_used == 2
    assert second.study.trials[1].user_attrs[history.REASON].startswith("withdrawn")


@pytest.mark.parametrize("ended", [False, True])
def test_a_retry_whose_first_attempt_lives_after_all_is_withdrawn(ended: bool) -> None:
    """As after a coordinator that was killed between the retry and the end of the trial it took over."""
    c = make_coordinator(make_space(trials=3))
    job = c.next_job()
    assert job is not None
    c.study.enqueue_trial(c.running[0].trial.params, {history.PROPOSAL: 0})
    if ended:
        c.on_job_end(job, carry_out_without_training(c, job))
    c.ledger.read_history(c.running_numbers())
    assert states(c) == ["COMPLETE" if ended else "RUNNING", "FAIL"]
    if not ended:
        c.on_job_end(job, carry_out_without_training(c, job))
    run_all_jobs(c)
    assert c.budget_used == 3 and states(c).count("COMPLETE") == 3


def test_the_pruner_stops_a_bad_trial_which_ends_pruned() -> None:
    c = make_coordinator(make_space(trials=40, pruner="median", sampler="random"))
    run_all_jobs(c)
    pruned = [t for t in c.study.trials if t.state == TrialState.PRUNED]
    assert pruned and all(t.last_step < t.params["epochs"] or t.last_step >= 2 for t in pruned)


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_sampler_and_pruner_carries_a_search(sampler: str, pruner: str) -> None:
    c = make_coordinator(make_space(trials=12, sampler=sampler, pruner=pruner))
    run_all_jobs(c)
    assert c.budget_used == 12 and history.best_trial(c.study)[0].value is not None


def test_a_diverged_trial_is_pruned_with_a_reason_and_never_the_best() -> None:
    def carry(c: Coordinator, job: Job) -> Outcome:
        if job.number != 1:
            return carry_out_without_training(c, job)
        c.report(job, Epoch(1, 1.0, {"accuracy": 0.99}, 0.1))
        return Outcome(
            "done",
            TrialResult(
                "diverged",
                (Epoch(1, 1.0, {"accuracy": 0.99}, 0.1),),
                1,
                {},
                0.1,
                "loss nan in epoch 2",
            ),
        )

    c = make_coordinator(make_space(trials=4))
    run_all_jobs(c, carry)
    assert c.study.trials[1].state == TrialState.PRUNED
    assert c.study.trials[1].user_attrs["tuner:reason"] == "diverged: loss nan in epoch 2"
    assert history.best_trial(c.study)[0].number != 1


def test_three_alike_failures_in_a_row_stop_the_search_and_name_the_cause() -> None:
    c = make_coordinator(make_space(trials=20))
    run_all_jobs(
        c,
        lambda c, job: Outcome(
            "failed", reason="ValueError: no such layer", traceback="Traceback …"
        ),
    )
    assert (
        c.budget_used == 3
        and isinstance(c.fatal_error, NoUsableTrial)
        and "ValueError: no such layer" in str(c.fatal_error)
    )
    assert c.study.trials[0].user_attrs["tuner:trace"] == "Traceback …"


def test_ten_failures_of_any_kind_stop_the_search_when_none_completed() -> None:
    c = make_coordinator(make_space(trials=50))
    run_all_jobs(
        c,
        lambda c, job: Outcome(
            "done", TrialResult("diverged", (), 0, {}, 0.1, f"loss nan in trial {job.number}")
        ),
    )
    assert c.budget_used == 10 and "10 trials failed and none completed" in str(c.fatal_error)
    with pytest.raises(NoUsableTrial, match="no trial completed"):
        history.best_trial(c.study)


def test_failures_between_successes_do_not_stop_the_search() -> None:
    c = make_coordinator(make_space(trials=12))
    run_all_jobs(
        c,
        lambda c, job: (
            Outcome("failed", reason="ValueError: x")
            if job.number % 2
            else carry_out_without_training(c, job)
        ),
    )
    assert c.fatal_error is None and c.budget_used == 12


def test_a_linear_probe_that_ran_alone_is_not_taken_for_the_default_recipe() -> None:
    """The time was up before the default recipe; then there is none to compare with."""
    for words in ((), ("recipe.freeze=[null, 0.5, 1.0]", "recipe.freeze_depth=0")):
        document = yaml_document.parse_document(SMALL, "small.yaml")
        c = make_coordinator(parsing.parse_space(parsing.apply_overrides(document, words)))
        run_all_jobs(c, most=1)
        assert states(c) == ["COMPLETE"] and history.default_trial(c.study) is None


def test_refused_data_ends_the_search_and_leaves_the_trial_to_be_asked_again() -> None:
    storage = optuna.storages.InMemoryStorage()
    c = make_coordinator(make_space(trials=3), storage)
    run_all_jobs(
        c,
        lambda c, job: Outcome(
            "refused", reason="DataError", problems=("data: gone",), exit_code=3
        ),
    )
    assert isinstance(c.fatal_error, DataError) and c.budget_used == 0
    again = make_coordinator(make_space(trials=3), storage)
    run_all_jobs(again)
    assert again.budget_used == 3 and history.default_trial(again.study) is not None


def test_an_interrupted_trial_is_asked_again_without_costing_an_attempt() -> None:
    storage = optuna.storages.InMemoryStorage()
    for _ in range(5):
        c = make_coordinator(make_space(trials=2), storage)
        job = c.next_job()
        assert job is not None
        c.should_stop = lambda: True
        assert c.report(job, Epoch(1, 1.0, {"accuracy": 0.5}, 0.1)) is False
        c.on_job_end(job, Outcome("done", TrialResult("stopped", (), 1, {}, 0.1)))
        assert c.next_job() is None
    run_all_jobs(c := make_coordinator(make_space(trials=2), storage))
    assert c.budget_used == 2 and history.default_trial(c.study) is not None
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
    best, others = history.best_trial(study)
    assert (best.number, others) == (winner, tied)


def test_a_timeout_stops_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    now: Iterator[float] = iter([0.0, *([10.0] * 2), *([95.0] * 20)])
    monkeypatch.setattr("tuner.search.coordinator.time.monotonic", lambda: next(now))
    c = make_coordinator(make_space(trials=50, timeout="90s"))
    assert len(run_all_jobs(c)) == 2


def test_the_run_of_a_finished_trial_is_the_run_it_was_given() -> None:
    c = make_coordinator(make_space(trials=6))
    jobs = run_all_jobs(c)
    assert [history.run_of_trial(c.space, c.study, t) for t in c.study.trials] == [
        job.argument.run for job in jobs
    ]


def test_mix_depends_on_every_part() -> None:
    assert len({derive_seed(0, 0), derive_seed(0, 1), derive_seed(1, 0), derive_seed(1, 1)}) == 4
    assert derive_seed(3, 4) == derive_seed(3, 4) < 2**32


def test_the_pruner_hears_of_validated_epochs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["search.trials=3", "recipe.epochs=3"]
    doc = parsing.apply_overrides(yaml_document.parse_document(SMALL, "small.yaml"), words)
    c = make_coordinator(parsing.parse_space(doc))
    asked: list[int] = []

    def should_prune(trial: Any) -> bool:
        asked.append(trial.number)
        return bool(trial.number == 2)

    monkeypatch.setattr(c.study, "should_prune", should_prune)

    def validated_every_2nd(c: Coordinator, job: Job) -> Outcome:
        epochs: list[Epoch] = []
        for number in range(1, 4):
            scores = {"accuracy": 0.1 * number} if number > 1 else {}
            epochs.append(Epoch(number, 1.0, scores, 0.1))
            if not c.report(job, epochs[-1]):
                assert number == 2
                return Outcome("done", TrialResult("stopped", tuple(epochs), number, {}, 0.1))
        return Outcome("done", TrialResult("complete", tuple(epochs), 3, {}, 0.1))

    run_all_jobs(c, validated_every_2nd)
    assert states(c) == ["COMPLETE", "COMPLETE", "PRUNED"]
    heard = [list(trial.intermediate_values) for trial in c.study.get_trials()]
    assert heard == [[2, 3], [2, 3], [2]]
    assert asked == [0, 2]  # once each, after epoch 2; the default recipe is never asked about


def test_where_every_model_is_beyond_the_limits_more_trials_are_no_advice() -> None:
    c = make_coordinator(make_space(trials=3))
    beyond = TrialResult("over_limit", (), 0, {}, 0.1, "2.82 megabytes, at most 0.001")
    run_all_jobs(c, lambda c, job: Outcome("done", beyond))
    with pytest.raises(NoUsableTrial, match=r"search.limits \(2.82 megabytes.*raise them"):
        history.best_trial(c.study)


def test_a_trial_whose_condition_an_earlier_version_did_not_see_met_is_what_it_was() -> None:
    """It took 0.30000000000000004 for another value than 0.3."""
    text = SMALL.replace(
        "momentum: {low: 0.8, high: 0.99, when: {optimizer: sgd}}",
        "label_smoothing: {low: 0, high: 0.4, step: 0.1}\n"
        "  momentum: {low: 0.91, high: 0.99, when: {label_smoothing: 0.3}}",
    )
    space = parsing.parse_space(yaml_document.parse_document(text, "small.yaml"))
    study = optuna.create_study()
    params = {"optimizer": "sgd", "lr": 0.01, "label_smoothing": 0.1 * 3, "freeze_depth": 1}
    study.enqueue_trial({**params, "epochs": 2})
    trial = study.ask()
    for name, value in {**params, "epochs": 2}.items():
        trial.suggest_categorical(name, [value])
    study.tell(trial, 0.5)
    run = history.run_of_trial(space, study, study.trials[0])
    assert (run.recipe.momentum, run.recipe.label_smoothing) == (0.9, 0.1 * 3)
    later = study.trials[0]
    later.params = {**later.params, "momentum": 0.95}
    assert history.run_of_trial(space, study, later).recipe.momentum == 0.95
