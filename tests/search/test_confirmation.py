"""Confirmation: the best trials again, with other seeds and validation examples; nothing is made twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.helpers.instant_engine import make_coordinator, make_space, run_all_jobs
from tuner.config.run import ConfirmSettings, PluginConfig, SearchSettings
from tuner.errors import DataError
from tuner.files.checkpoint_files import checkpoint_name
from tuner.jobs import Job, Outcome
from tuner.messages import Assignment, Epoch, TrialResult
from tuner.search import history
from tuner.search.confirmation import (
    Candidate,
    Confirmation,
    choose_winner,
    fold_count,
    read_confirmed,
    run_of_repeat,
    settings_for,
)

SPACE = make_space(trials=12, sampler="random", pruner="none", confirm="{top: 3, repeats: 2}")
SETTINGS = ConfirmSettings(top=3, repeats=2)
Told = list[tuple[int, int, float | None, str]]


@pytest.fixture
def study() -> optuna.Study:
    coordinator = make_coordinator(SPACE)
    run_all_jobs(coordinator)
    return coordinator.study


def confirmation(
    study: optuna.Study,
    told: Told | None = None,
    checkpoints: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Confirmation:
    log: Told = [] if told is None else told
    return Confirmation(
        study,
        SPACE,
        SETTINGS,
        (140, 30),
        lambda run: Assignment(run, "accuracy", SPACE.settings.engine, "home"),
        checkpoints,
        lambda *values: log.append(values),
        stop,
    )


def result(score: float, state: Any = "complete", reason: str = "") -> Outcome:
    epochs = (Epoch(1, 1.0, {"accuracy": score}, 0.1),)
    return Outcome("done", TrialResult(state, epochs, 1, {}, 0.5, reason))


def answer_all(
    c: Confirmation, answer: Callable[[Job], Outcome] = lambda job: result(0.5)
) -> list[Job]:
    jobs = []
    while (job := c.next_job()) is not None:
        jobs.append(job)
        c.on_job_end(job, answer(job))
    return jobs


def by_seed(job: Job) -> Outcome:
    return result(job.argument.run.seed % 1000 / 1000)


def best_numbers(study: optuna.Study) -> list[int]:
    ranks = [
        rank for t in study.trials if (rank := history.trial_rank(t, study.direction)) is not None
    ]
    return [number for _, _, number in sorted(ranks)[:3]]


# -- which trials are repeated, and how


@pytest.mark.parametrize(
    ("trials", "expected"), [(29, None), (30, (2, 2)), (99, (2, 2)), (100, (3, 3)), (500, (3, 3))]
)
def test_the_number_of_trials_decides(trials: int, expected: tuple[int, int] | None) -> None:
    found = settings_for(SearchSettings(), trials)
    assert (found and (found.top, found.repeats)) == expected
    assert settings_for(SearchSettings(confirm="none"), trials) is None
    assert settings_for(SearchSettings(confirm=SETTINGS), 1) == SETTINGS


def test_the_best_trials_are_repeated_alike_but_for_seed_and_fold(study: optuna.Study) -> None:
    c = confirmation(study)
    assert c.trial_numbers == best_numbers(study) and c.count == 6
    runs = [job.argument.run for job in answer_all(c)]
    originals = [history.run_of_trial(SPACE, study, study.trials[n]) for n in c.trial_numbers]
    for repeat in (0, 1):
        for original, run in zip(originals, runs[3 * repeat : 3 * repeat + 3], strict=True):
            epoch = c.epochs[c.trial_numbers[originals.index(original)]]
            recipe = original.recipe.model_copy(update={"stop_epoch": epoch})
            assert (run.recipe, run.model, run.task) == (recipe, original.model, original.task)
            assert run.seed == runs[3 * repeat].seed  # the same for all of them: paired
            assert (run.data.options["folds"], run.data.options["fold"]) == (6, repeat)
    assert len({run.seed for run in runs} | {o.seed for o in originals}) == 2 + len(originals)


@pytest.mark.parametrize(
    ("folds", "repeats", "train", "valid", "expected"),
    [
        (1, 2, 140, 30, 6),  # validation keeps its share
        (1, 9, 140, 30, 9),  # each repeat has a fold of its own
        (6, 2, 140, 30, 7),  # not the folds of the search
        (20, 2, 1000, 10, 19),
        (1, 2, 10_000, 10, 20),
        (1, 5, 3, 1, 2),
    ],
)
def test_the_number_of_folds(
    folds: int, repeats: int, train: int, valid: int, expected: int
) -> None:
    run = SPACE.make_run({("data", "folds"): folds})
    assert fold_count(run, repeats, train, valid) == expected


def test_a_data_source_without_folds_is_repeated_with_another_seed() -> None:
    run = SPACE.make_run({}, seed=5)
    own = run.__class__(run.task, PluginConfig("own:load", {"path": "x"}), run.model, run.recipe, 5)
    repeated = run_of_repeat(own, 2, 1, 6, seed=0)
    assert repeated.data == own.data and repeated.seed != own.seed
    assert repeated.recipe.stop_epoch == 2


# -- who wins


def candidate(trial: int, scores: list[float | None], epochs: int = 3, depth: int = 0) -> Candidate:
    frozen = optuna.trial.create_trial(value=0.0, user_attrs={history.BEST_EPOCH: epochs})
    frozen.number = trial
    run = SPACE.make_run({("recipe", "freeze_depth"): depth})
    return Candidate(frozen, run, tuple(scores))


def winner_of(*candidates: Candidate) -> tuple[int, bool]:
    confirmed = choose_winner(list(candidates))
    assert confirmed is not None and confirmed.candidates == candidates
    return confirmed.winner.trial.number, confirmed.is_cheaper


def test_the_highest_mean_wins() -> None:
    assert winner_of(candidate(4, [0.8, 0.7, 0.8]), candidate(7, [0.9, 0.85, 0.88])) == (7, False)


def test_of_trials_that_are_equal_within_noise_the_cheaper_wins() -> None:
    best = candidate(4, [0.80, 0.90, 0.82], epochs=9)
    near = candidate(7, [0.84, 0.85, 0.82], epochs=3)  # 0.0033 lower, standard error 0.026
    assert winner_of(best, near) == (7, True)
    deeper = candidate(8, [0.80, 0.91, 0.80], epochs=9, depth=2)  # as many epochs, fewer stages
    assert winner_of(best, deeper) == (8, True)
    dearer = candidate(9, [0.80, 0.91, 0.80], epochs=10)
    assert winner_of(best, dearer) == (4, False)
    lower = candidate(9, [0.70, 0.80, 0.73], epochs=1)  # always lower: not noise
    assert winner_of(best, lower) == (4, False)


@pytest.mark.parametrize("tie", [0.9298, 0.9, 0.1, 1 / 3])
def test_of_two_repeats_the_cheaper_must_be_better_in_one(tie: float) -> None:
    best = candidate(4, [0.9123, tie], epochs=9)
    assert winner_of(best, candidate(7, [0.8947, tie], epochs=3)) == (4, False)
    assert winner_of(best, candidate(7, [0.8947, tie + 0.001], epochs=3)) == (7, True)


def test_costs_of_different_models_are_not_compared() -> None:
    best, near = candidate(4, [0.8, 0.9], epochs=9), candidate(7, [0.9, 0.79], epochs=3)
    other = PluginConfig("vgg11", near.run.model.options)
    foreign = Candidate(
        near.trial, near.run.__class__(near.run.task, near.run.data, other, near.run.recipe, 0), near.scores
    )  # fmt: skip
    assert winner_of(best, near) == (7, True)
    assert winner_of(best, foreign) == (4, False)


def test_one_repeat_has_no_noise() -> None:
    best, near = candidate(4, [0.8], epochs=9), candidate(7, [0.79], epochs=3)
    assert winner_of(best, near) == (4, False) and best.deviation is None
    assert winner_of(best, candidate(7, [0.8], epochs=3)) == (7, True)


def test_a_trial_that_could_not_be_repeated_cannot_win() -> None:
    assert winner_of(candidate(4, [0.9, None]), candidate(7, [0.5, 0.5])) == (7, False)
    assert choose_winner([candidate(4, [0.9, None]), candidate(7, [None, None])]) is None


# -- killed and continued


def test_what_a_killed_command_has_kept_is_not_made_again(study: optuna.Study) -> None:
    undisturbed = make_coordinator(SPACE)
    run_all_jobs(undisturbed)
    answer_all(confirmation(undisturbed.study), by_seed)
    first = confirmation(study)
    for _ in range(2):
        job = first.next_job()
        assert job is not None
        first.on_job_end(job, by_seed(job))
    first.next_job()  # killed while this one runs
    assert read_confirmed(study, SPACE) is None  # not all repeats are there
    second = confirmation(study)
    assert second.count == 4
    jobs = answer_all(second, by_seed)
    assert len(jobs) == 4 and confirmation(study).count == 0
    found, expected = (read_confirmed(s, SPACE) for s in (study, undisturbed.study))
    assert found is not None and expected is not None
    assert found.to_dict("accuracy") == expected.to_dict("accuracy")


def test_a_repeat_is_tried_again_as_a_trial_is(study: optuna.Study) -> None:
    told: Told = []
    c = confirmation(study, told)
    micro_batches = []

    def answer(job: Job) -> Outcome:
        if job.number != c.trial_numbers[0] * SETTINGS.repeats:
            return result(0.5)
        micro_batches.append(job.argument.micro_batches)
        return Outcome("lost", reason="killed", loss_cause="memory")

    assert len(answer_all(c, answer)) == 6 + SPACE.settings.search.retries
    assert micro_batches == [1, 1, 4]  # the last attempt takes less memory
    assert [values for values in told if values[2] is None] == [
        (c.trial_numbers[0], 0, None, "killed")
    ]
    confirmed = read_confirmed(study, SPACE)
    assert confirmed is not None and confirmed.winner.trial.number != c.trial_numbers[0]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (result(0.1, "diverged", "loss nan"), "diverged: loss nan"),
        (result(0.1, "oom", "no memory"), "oom: no memory"),
        (Outcome("failed", reason="ValueError: x"), "ValueError: x"),
    ],
)
def test_a_repeat_without_a_score_says_why(
    outcome: Outcome, reason: str, study: optuna.Study
) -> None:
    told: Told = []
    answer_all(confirmation(study, told), lambda job: outcome)
    assert len(told) == 6 and {values[2:] for values in told} == {(None, reason)}
    assert read_confirmed(study, SPACE) is None


def test_a_refusal_ends_the_confirmation_and_an_interruption_keeps_nothing(
    study: optuna.Study,
) -> None:
    c = confirmation(study)
    refused = Outcome("refused", reason="DataError", problems=("gone",), exit_code=3)
    assert len(answer_all(c, lambda job: refused)) == 1 and isinstance(c.error, DataError)
    stopping: list[bool] = []
    c = confirmation(study, stop=lambda: bool(stopping))
    job = c.next_job()
    assert job is not None and c.report(job, Epoch(1, 1.0, {"accuracy": 0.5}, 0.1))
    stopping.append(True)
    assert not c.report(job, Epoch(2, 1.0, {"accuracy": 0.5}, 0.1))
    c.on_job_end(job, result(0.5, "stopped"))
    assert c.next_job() is None
    lost = Outcome("lost", reason="interrupted", loss_cause="interrupted")
    c.on_job_end(job, lost)
    assert confirmation(study).count == 6


def test_checkpoints_stay_until_the_result_is_kept(study: optuna.Study, tmp_path: Path) -> None:
    c = confirmation(study, checkpoints=tmp_path / "checkpoints")
    job = c.next_job()
    assert job is not None
    folder = Path(job.argument.checkpoint_folder)
    folder.mkdir(parents=True)
    (folder / checkpoint_name("000001", b"x")).write_bytes(b"x")
    assert job.folders_to_keep == (str(folder),)
    c.on_job_end(job, Outcome("lost", reason="died", loss_cause="died"))
    assert folder.exists()
    again = c.next_job()
    assert again is not None and again.argument.checkpoint_folder == str(folder)
    c.on_job_end(again, result(0.5))
    assert not folder.exists()


def test_the_time_is_estimated_by_that_of_the_trials(study: optuna.Study) -> None:
    c = confirmation(study)
    seconds = {t.number: t.user_attrs["seconds"] for t in study.trials}
    expected = 2 * sum(seconds[number] for number in c.trial_numbers)
    assert c.estimate_seconds(1) == pytest.approx(expected)
    assert c.estimate_seconds(3) == pytest.approx(expected / 3)
