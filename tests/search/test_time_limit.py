"""`search.time`, `search.stop` and `search.target`: when a search ends before its trials are spent."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.helpers.instant_engine import make_coordinator, make_space, run_all_jobs, score_of_run
from tuner.commands.finishing_times import FinishingTimes
from tuner.config.search_settings import AS_MANY_AS_FIT
from tuner.errors import SpaceError
from tuner.jobs import Job, Outcome
from tuner.messages import DatasetReport, Epoch, ModelSurvey, TrialResult
from tuner.search import history
from tuner.search.coordinator import Coordinator
from tuner.search.retraining import training_seconds
from tuner.search.stop_rules import DUPLICATES_IN_A_ROW
from tuner.search.time_limit import SLACK, TimeLimit

optuna.logging.set_verbosity(optuna.logging.ERROR)
FINISHING = 7.0  # seconds


class Clock:
    """A clock that only trainings move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def limited(seconds: float, clock: Clock, storage: Any = None, **search: Any) -> Coordinator:
    space = make_space(
        **{"time": f"{seconds}s", "trials": 200, "pruner": "none", "confirm": "none"} | search
    )
    c = make_coordinator(space, storage)
    c.time_limit = TimeLimit(seconds, clock.now, FINISHING, 1, clock)
    c._read_trials()
    return c


def train_on(clock: Clock, held_up: float = 0.0) -> Any:
    """What a worker would do, when an epoch takes 1 s and 1 s more for each stage that is trained.

    The machine holds up the third trial for so many seconds.
    """

    def carry_out(c: Coordinator, job: Job) -> Outcome:
        run, begun = job.argument.run, clock.now
        clock.now += held_up if job.number == 2 else 0.0
        epochs: list[Epoch] = []
        for number in range(1, run.recipe.epochs + 1):
            seconds = 6.0 - run.recipe.freeze_depth
            clock.now += seconds
            score = score_of_run(run) * number / run.recipe.epochs
            epochs.append(Epoch(number, 1.0, {"accuracy": score}, seconds))
            if not c.report(job, epochs[-1]):
                break
        state: Any = "complete" if len(epochs) == run.recipe.epochs else "stopped"
        best = len(epochs)
        return Outcome("done", TrialResult(state, tuple(epochs), best, {}, clock.now - begun))

    return carry_out


def seconds_after(c: Coordinator) -> float:
    """What follows the search: the winner and the default recipe are trained again."""
    best, _ = history.best_trial(c.study)
    default = history.default_trial(c.study)
    assert default is not None
    run = history.run_of_trial(c.space, c.study, best)  # every run of these has one fold
    again = training_seconds(default, run) if default.number != best.number else 0.0
    return training_seconds(best, run) + again + FINISHING


@pytest.mark.parametrize("seconds", [92, 124, 200, 431])
def test_a_search_ends_so_that_the_whole_command_ends_in_time(seconds: int) -> None:
    clock = Clock()
    c = limited(seconds, clock)
    run_all_jobs(c, train_on(clock))
    whole = clock.now + seconds_after(c)
    assert whole <= seconds
    # what is left is less than the slack, an epoch of the slowest trial, and one that was not trained
    assert whole >= seconds * (1 - SLACK) - 6.0 - 6.0


def test_a_trial_that_the_machine_held_up_does_not_end_the_search_early() -> None:
    clock = Clock()
    c = limited(431, clock)
    run_all_jobs(c, train_on(clock, held_up=60.0))
    assert history.best_trial(c.study)[0].number != 2
    whole = clock.now + seconds_after(c)
    assert 431 * (1 - SLACK) - 6.0 - 6.0 <= whole <= 431


def test_a_trial_that_the_time_ends_counts_with_its_best_epoch_so_far() -> None:
    clock = Clock()
    c = limited(92, clock)
    run_all_jobs(c, train_on(clock))
    cut = [t for t in c.study.trials if "search.time" in str(t.user_attrs.get(history.REASON))]
    assert cut and all(t.state == TrialState.COMPLETE for t in cut)
    for trial in cut:
        assert len(trial.intermediate_values) < trial.params["epochs"]
        assert trial.value == max(trial.intermediate_values.values())
    assert c.is_past_timeout() and c.next_job() is None


def test_without_its_weights_a_trial_that_the_time_ends_waits_for_the_next_command() -> None:
    waiting: list[optuna.trial.FrozenTrial] = []
    for seconds in range(40, 60):  # in one of these the time is up within a trial
        clock, storage = Clock(), optuna.storages.InMemoryStorage()
        c = limited(seconds, clock, storage, retrain="false")
        run_all_jobs(c, train_on(clock))
        waiting = [t for t in c.study.trials if t.state == TrialState.WAITING]
        if waiting:
            break
    assert len(waiting) == 1 and waiting[0].user_attrs[history.ATTEMPT] == 1
    more = limited(100, clock, storage, retrain="false")
    job = more.next_job()
    assert job is not None and job.number == waiting[0].number


def test_the_first_trial_begins_however_little_time_there_is_and_no_second_one() -> None:
    clock = Clock()
    c = limited(1, clock)
    assert len(run_all_jobs(c, train_on(clock))) == 1
    assert c.must_end_now()


def test_running_epochs_are_ended_when_the_reserve_is_touched() -> None:
    clock = Clock()
    c = limited(300, clock)
    assert not c.must_end_now()
    run_all_jobs(c, train_on(clock), most=3)
    assert not c.must_end_now()
    clock.now = 299.0
    assert c.must_end_now()


def test_with_a_time_the_number_of_trials_is_open_unless_it_is_written() -> None:
    assert make_space(time="1h", trials=30).settings.search.trials == 30
    open_budget = _space_without_trials(time="1h")
    assert open_budget.settings.search.trials == AS_MANY_AS_FIT
    assert _space_without_trials().settings.search.trials == 20


def _space_without_trials(**search: Any) -> Any:
    from tests.conftest import SMALL
    from tuner.config import parsing, yaml_document

    words = [f"search.{key}={value}" for key, value in search.items()]
    text = SMALL.replace("trials: 4, ", "")
    doc = yaml_document.parse_document(text, "small.yaml")
    return parsing.parse_space(parsing.apply_overrides(doc, words))


def test_an_open_budget_ends_when_nothing_new_is_proposed() -> None:
    clock = Clock()
    c = limited(1_000_000, clock, trials=4)
    c.duplicates_in_a_row = DUPLICATES_IN_A_ROW
    assert c.next_job() is not None  # trials: 4 is a budget
    c.search_settings = c.search_settings.model_copy(update={"trials": AS_MANY_AS_FIT})
    c.duplicates_in_a_row = DUPLICATES_IN_A_ROW
    assert c.next_job() is None and "repeated earlier ones" in str(c.end_reason)


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("log_loss", -1)])
def test_a_search_ends_when_it_finds_nothing_better(metric: str, sign: int) -> None:
    values = iter([sign * v for v in (0.5, 0.6, 0.601, 0.601, 0.6, 0.9, 0.9)])

    def carry_out(c: Coordinator, job: Job) -> Outcome:
        epoch = Epoch(1, 1.0, {metric: next(values)}, 0.1)
        c.report(job, epoch)
        return Outcome("done", TrialResult("complete", (epoch,), 1, {}, 0.1))

    stop = "{trials: 3, gain: 0.005}"
    space = make_space(trials=50, stop=stop, metric=metric, pruner="none")
    c = make_coordinator(space)
    assert len(run_all_jobs(c, carry_out)) == 5  # the last three gained 0.001
    assert "in the last 3 trials" in str(c.end_reason)
    again = make_coordinator(space, c.study._storage)
    assert again.next_job() is None  # the study's history decides


def test_a_search_ends_at_its_target() -> None:
    values = iter([0.5, 0.7, 0.8, 0.9])

    def carry_out(c: Coordinator, job: Job) -> Outcome:
        epoch = Epoch(1, 1.0, {"accuracy": next(values)}, 0.1)
        c.report(job, epoch)
        return Outcome("done", TrialResult("complete", (epoch,), 1, {}, 0.1))

    c = make_coordinator(make_space(trials=50, target=0.75, pruner="none"))
    assert len(run_all_jobs(c, carry_out)) == 3 and "search.target" in str(c.end_reason)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("time", "soon", "write a duration"),
        ("stop", "{gain: -1}", "search.stop.gain"),
        ("target", "high", "search.target"),
    ],
)
def test_limits_that_cannot_be_read_are_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make_space(**{key: value})


def test_a_run_makes_an_export_in_its_time_and_remembers_how_long_the_finishing_took(
    tuner: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_HOME", str(tmp_path / "home"))
    said = tuner("run", small, "--time", "1s")
    assert said.code == 0, said.err
    assert sum(line.startswith("#") for line in said.out.splitlines()) == 1
    assert (small.parent / "studies/small/export/manifest.json").is_file()
    (remembered,) = (tmp_path / "home/costs").glob("*.finishing.json")
    seconds = json.loads(remembered.read_text())["seconds"]
    assert seconds > 0
    remembered.unlink()
    said = tuner("run", small, "search.name=untimed", "search.trials=1")  # as any search does
    assert said.code == 0 and json.loads(remembered.read_text())["seconds"] > 0
    refused = tuner("run", small, "--time", "soon")
    assert refused.code == 2 and "--time 'soon': write a duration" in refused.err


def test_without_an_earlier_search_the_finishing_is_guessed_from_the_beginning(
    tmp_path: Path,
) -> None:
    survey = ModelSurvey({"resnet18_slim": 5}, 0)
    facts = DatasetReport("d", ("a", "b"), {"test": 100}, {}, 1000)

    def times(**search: str) -> FinishingTimes:
        return FinishingTimes(tmp_path, make_space(**search), survey, facts)

    alone, compared = times(compare="none"), times()
    assert 3.0 < alone.read(10.0) < compared.read(10.0) < compared.read(20.0) <= 120.0
    compared.write(7.5)
    assert compared.read(10.0) == 7.5 and alone.read(10.0) != 7.5


@pytest.mark.parametrize("seconds", range(21, 51, 3))
def test_the_default_recipe_comes_to_its_end_where_the_time_suffices_for_it_alone(
    seconds: int,
) -> None:
    """The probe takes 1 s, the default recipe 18 s. What was ended in its midst has no weights."""
    clock = Clock()
    c = limited(seconds, clock)
    run_all_jobs(c, train_on(clock))
    default = history.default_trial(c.study)
    assert default is not None
    is_whole = len(default.intermediate_values) == default.params["epochs"]
    assert is_whole == (seconds >= 27)
    run = history.run_of_trial(c.space, c.study, default)
    again = 0.0 if is_whole else training_seconds(default, run)
    assert clock.now + again + FINISHING <= seconds
    # where each result has to be trained again, the reserve is kept
    clock = Clock()
    c = limited(seconds, clock, retrain="true", keep=0)
    run_all_jobs(c, train_on(clock))
    assert clock.now + seconds_after(c) <= seconds
