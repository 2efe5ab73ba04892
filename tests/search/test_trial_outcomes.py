"""What becomes of trials that fail, are killed, refused or ended by somebody else, and what becomes of the search."""

from pathlib import Path

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
    score_of_run,
)
from tuner.config import parsing, yaml_document
from tuner.config.run import Run
from tuner.config.space import Space
from tuner.dashboard.artifacts import write_note
from tuner.errors import DataError, SpaceError, StorageError
from tuner.jobs import Job, Outcome
from tuner.messages import Epoch, TrialResult
from tuner.search import history, storage
from tuner.search.coordinator import Coordinator

optuna.logging.set_verbosity(optuna.logging.ERROR)

KILLED = Outcome("lost", reason="worker ended by SIGKILL (out of memory?)", loss_cause="memory")
DIED = Outcome("lost", reason="worker ended by SIGSEGV", loss_cause="died")


def written(*changes: str) -> Space:
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SMALL, "small.yaml"), changes)
    )


def scored(c: Coordinator, job: Job, score: float) -> Outcome:
    """A trial whose epochs all have one score."""
    epochs: list[Epoch] = []
    for number in range(1, job.argument.run.recipe.epochs + 1):
        epochs.append(Epoch(number, 1.0, {"accuracy": score}, 0.1))
        if not c.report(job, epochs[-1]):
            return Outcome("done", TrialResult("stopped", tuple(epochs), number, {}, 0.1))
    return Outcome("done", TrialResult("complete", tuple(epochs), 1, {}, 0.1))


def refused(kind: type[Exception], problem: str, code: int) -> Outcome:
    return Outcome("refused", reason=kind.__name__, problems=(problem,), exit_code=code)


def ends(c: Coordinator) -> list[tuple[str, str]]:
    """The state and the reason of each trial that counts."""
    return [
        (t.state.name, t.user_attrs.get("tuner:reason", ""))
        for t in c.study.get_trials(deepcopy=False)
        if t.number in c.ledger.counted_numbers
    ]


def test_healthy_pruned_trials_end_a_row_of_failures() -> None:
    plan = "CCCCCCPPPFPPPPFPPPPF"

    def carry(c: Coordinator, job: Job) -> Outcome:
        if plan[job.number] == "F":
            return Outcome("failed", reason="ValueError: one example in a million")
        return scored(c, job, 0.9 if plan[job.number] == "C" else 0.1)

    c = make_coordinator(
        written("recipe.epochs=4", f"search.trials={len(plan)}", "search.sampler=random")
    )
    run_all_jobs(c, carry)
    states = {"COMPLETE": "C", "PRUNED": "P", "FAIL": "F"}
    assert "".join(states[state] for state, _ in ends(c)) == plan
    assert c.fatal_error is None


@pytest.mark.parametrize(("epochs", "state"), [(2, "COMPLETE"), (3, "PRUNED")])
def test_the_pruner_is_not_asked_after_the_last_epoch(epochs: int, state: str) -> None:
    c = make_coordinator(
        written(f"recipe.epochs={epochs}", "search.trials=8", "search.sampler=random")
    )
    run_all_jobs(c, lambda c, job: scored(c, job, 0.1 if job.number == 7 else 0.9))
    assert ends(c)[7] == (state, "")  # the pruner judges from the second epoch on


# -- workers that a memory limit ends


def test_a_trial_that_a_memory_limit_kills_is_pruned_and_the_sampler_learns_from_it() -> None:
    jobs: list[tuple[int, int, int]] = []

    def carry(c: Coordinator, job: Job) -> Outcome:
        size = job.argument.run.recipe.batch_size
        jobs.append(
            (history.proposal_numbers(c.study)[job.number], size, job.argument.micro_batches)
        )
        return KILLED if size > 128 else carry_out_without_training(c, job)

    sizes = "recipe.batch_size={low: 16, high: 512}"
    c = make_coordinator(written(sizes, "search.trials=40", "search.pruner=none"))
    run_all_jobs(c, carry)
    assert c.fatal_error is None and c.budget_used == 40
    proposals = {proposal: size for proposal, size, _ in jobs}
    big = {proposal for proposal, size in proposals.items() if size > 128}
    assert big and all(
        [parts for proposal, _, parts in jobs if proposal == one] == [1, 1, 4] for one in big
    )
    reasons = {reason for state, reason in ends(c) if state == "PRUNED"}
    assert reasons == {"oom: worker ended by SIGKILL (out of memory?), in each of 3 attempts"}
    assert len(big) < 20  # of 40, though three quarters of all sizes are too big


@pytest.mark.parametrize(("retries", "parts"), [(0, [1]), (1, [1, 4]), (2, [1, 1, 4])])
def test_the_last_attempt_after_nothing_but_kills_takes_its_batches_in_parts(
    retries: int, parts: list[int]
) -> None:
    seen: list[int] = []

    def carry(c: Coordinator, job: Job) -> Outcome:
        seen.append(job.argument.micro_batches)
        return (
            KILLED
            if job.argument.micro_batches == 1 and len(seen) <= retries
            else carry_out_without_training(c, job)
        )

    c = make_coordinator(make_space(trials=1, retries=retries))
    run_all_jobs(c, carry)
    assert seen == parts and ends(c) == [("COMPLETE", "")]


def test_a_worker_that_also_died_in_another_way_fails_its_trial() -> None:
    attempts = iter([KILLED, DIED, KILLED])
    seen: list[int] = []

    def carry(c: Coordinator, job: Job) -> Outcome:
        seen.append(job.argument.micro_batches)
        return next(attempts)

    c = make_coordinator(make_space(trials=1))
    run_all_jobs(c, carry)
    assert seen == [1, 1, 1] and ends(c) == [("FAIL", KILLED.reason)]


# -- trials that a worker refuses


def odd(run: Run) -> bool:
    return bool(run.recipe.optimizer == "sgd")


def test_a_trial_that_is_refused_for_its_own_parameters_is_pruned_and_the_search_goes_on() -> None:
    problem = refused(SpaceError, "recipe.optimizer: sgd does not go with this loss", 2)
    c = make_coordinator(
        make_space(trials=12, sampler="random", seed=1), listener=(listener := RecordingListener())
    )
    jobs = run_all_jobs(
        c, lambda c, job: problem if odd(job.argument.run) else carry_out_without_training(c, job)
    )
    assert c.fatal_error is None and c.budget_used == 12
    bad = [job.number for job in jobs if odd(job.argument.run)]
    assert bad and all(
        c.study.trials[n].user_attrs["tuner:reason"] == f"refused: {problem.problems[0]}"
        and c.study.trials[n].state == TrialState.PRUNED
        for n in bad
    )
    assert sorted(listener.ends) == list(range(12))


def test_what_concerns_all_trials_stops_the_search_after_three_of_them() -> None:
    database = optuna.storages.InMemoryStorage()
    gone = refused(DataError, "data: gone", 3)
    c = make_coordinator(make_space(trials=6), database)
    jobs = run_all_jobs(
        c, lambda c, job: gone if job.number >= 2 else carry_out_without_training(c, job)
    )
    assert len(jobs) == 5 and isinstance(c.fatal_error, DataError) and c.budget_used == 2
    again = make_coordinator(make_space(trials=6), database)  # the data are back
    run_all_jobs(again)
    assert again.fatal_error is None and [state for state, _ in ends(again)].count("COMPLETE") >= 3
    assert again.budget_used == 6 and not any("refused" in reason for _, reason in ends(again))


def test_a_full_disk_stops_the_search_at_once() -> None:
    database = optuna.storages.InMemoryStorage()
    full = refused(StorageError, "disk full", 4)
    for _ in range(3):  # as often as it is run
        c = make_coordinator(make_space(trials=6), database)
        jobs = run_all_jobs(
            c,
            lambda c, job: full if len(c.study.trials) > 2 else carry_out_without_training(c, job),
        )
        assert isinstance(c.fatal_error, StorageError) and len(jobs) <= 3 and c.budget_used == 2


def test_the_last_trial_is_refused_and_the_next_run_ends_the_search() -> None:
    database = optuna.storages.InMemoryStorage()
    last = refused(DataError, "data: no example is as long", 3)

    def carry(c: Coordinator, job: Job) -> Outcome:
        return (
            last
            if history.proposal_numbers(c.study)[job.number] == 3
            else carry_out_without_training(c, job)
        )

    c = make_coordinator(make_space(trials=4, pruner="none"), database)
    run_all_jobs(c, carry)
    assert (
        isinstance(c.fatal_error, DataError) and c.budget_used == 3
    )  # nothing left to compare it with
    again = make_coordinator(make_space(trials=4, pruner="none"), database)
    run_all_jobs(again, carry)
    assert again.fatal_error is None and again.budget_used == 4
    assert ends(again)[-1] == ("PRUNED", "refused: data: no example is as long")


def test_a_trial_that_was_begun_before_the_refusal_proves_nothing() -> None:
    c = make_coordinator(make_space(trials=4))
    early, suspect = c.next_job(), c.next_job()
    assert early and suspect
    c.on_job_end(suspect, refused(DataError, "data: gone", 3))
    c.on_job_end(early, carry_out_without_training(c, early))  # it had its data in memory
    assert c.study.trials[suspect.number].state == TrialState.RUNNING
    for _ in range(2):
        late = c.next_job()
        assert late is not None
        c.on_job_end(late, refused(DataError, "data: gone", 3))
    assert isinstance(c.fatal_error, DataError) and c.budget_used == 1 and c.next_job() is None
    retries = c.study.get_trials(states=(TrialState.WAITING,))
    assert sorted(t.user_attrs["tuner:root"] for t in retries) == [1, 2, 3]


def test_a_twin_of_a_refused_trial_shares_its_end() -> None:
    choices = ["recipe.lr=[0.01]", "recipe.epochs=1", "recipe.freeze_depth=0"]
    fixed = ["recipe.optimizer=adamw", "recipe.momentum=0.9", "search.trials=2"]
    c = make_coordinator(written(*choices, *fixed))
    job = c.next_job()
    assert job is not None
    c.on_job_end(job, refused(SpaceError, "recipe.lr: no", 2))
    assert c.next_job() is None  # the second trial has the same parameters
    assert isinstance(c.fatal_error, SpaceError) and c.budget_used == 0
    again = make_coordinator(written(*choices, *fixed), c.study._storage)
    run_all_jobs(again)
    assert again.budget_used == 2 and again.fatal_error is None


# -- trials that somebody else ends


class Noting(RecordingListener):
    """Writes each trial's note, as the dashboard's artifacts do."""

    study: optuna.Study
    browser: optuna.Study

    def save_artifacts(self, trial: optuna.Trial, run: Run, result: TrialResult) -> None:
        from optuna_dashboard import save_note

        write_note(self.study, trial, "how it went")
        if trial.number == 4:  # at the very moment at which the trial ends
            save_note(optuna.Trial(self.browser, trial._trial_id), "mine")


def test_what_is_clicked_in_the_dashboard_does_not_end_the_search(tmp_path: Path) -> None:
    from optuna_dashboard import get_note, save_note

    database = storage.open_storage(None, tmp_path)
    listener = Noting()
    c = make_coordinator(make_space(trials=5), database, listener)
    listener.study = c.study
    listener.browser = browser = optuna.load_study(
        study_name="t", storage=storage.open_storage(None, tmp_path)
    )

    def carry(c: Coordinator, job: Job) -> Outcome:
        if job.number == 1:
            browser.tell(1, state=TrialState.FAIL)
        outcome = carry_out_without_training(c, job)
        if job.number == 2:
            browser.tell(2, state=TrialState.FAIL)
        if job.number == 3:
            save_note(optuna.Trial(browser, browser.trials[3]._trial_id), "# mine")
        return outcome

    run_all_jobs(c, carry)
    trials = c.study.get_trials(deepcopy=False)
    assert c.fatal_error is None and c.budget_used == 5 and not c.running
    assert [t.number for t in trials if t.state == TrialState.FAIL] == [1, 2]  # and not tried again
    assert all(not t.intermediate_values for t in trials[1:2])  # nothing is written once it ended
    assert len(trials) == 7 and sorted(listener.ends) == list(range(7))
    notes = {t.number: get_note(optuna.Trial(browser, t._trial_id)) for t in trials}
    assert notes[3] == "# mine" and notes[0] == notes[4] == "how it went"


def test_a_retry_that_is_lost_to_the_dashboard_is_not_asked_again(tmp_path: Path) -> None:
    c = make_coordinator(make_space(trials=2), storage.open_storage(None, tmp_path))
    job = c.next_job()
    assert job is not None
    browser = optuna.load_study(study_name="t", storage=storage.open_storage(None, tmp_path))
    browser.tell(job.number, state=TrialState.FAIL)
    c.on_job_end(job, DIED)
    assert [t.state for t in c.study.trials] == [TrialState.FAIL]
    run_all_jobs(c)
    assert c.budget_used == 2


# -- attempts that were lost


@pytest.mark.parametrize("pruner", ["median", "projection", "successive-halving"])
def test_a_lost_attempt_does_not_compete_with_its_own_retry(pruner: str) -> None:
    def ended(seed: int, *, disturbed: bool) -> list[tuple[int, str, float | None]]:
        def carry(c: Coordinator, job: Job) -> Outcome:
            if not disturbed or job.number % 2 or c.running[job.number].attempt > 1:
                return carry_out_without_training(c, job)
            score = score_of_run(job.argument.run) / job.argument.run.recipe.epochs
            c.report(job, Epoch(1, 1.0, {"accuracy": score}, 0.1))
            return DIED

        changes = [
            f"search.pruner={pruner}",
            f"search.seed={seed}",
            "recipe.epochs={low: 3, high: 9}",
        ]
        c = make_coordinator(written("search.trials=20", "search.sampler=random", *changes))
        run_all_jobs(c, carry)
        proposals = history.proposal_numbers(c.study)
        return sorted(
            (proposals[t.number], t.state.name, t.value)
            for t in c.study.trials
            if t.state != TrialState.FAIL
        )

    for seed in range(3):
        calm = ended(seed, disturbed=False)
        assert ended(seed, disturbed=True) == calm
        assert any(state == "PRUNED" for _, state, _ in calm)
