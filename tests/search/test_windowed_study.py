"""What makes ten thousand trials cheap changes nothing: proposals, prunings, rows and notes are Optuna's own."""

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from tuner.dashboard.artifacts import write_note
from tuner.search import storage, windowed_study
from tuner.search.pruners import PRUNERS
from tuner.search.samplers import SAMPLERS, Startup
from tuner.search.windowed_study import WindowedStudy

optuna.logging.set_verbosity(optuna.logging.ERROR)
EPOCHS = 6
STARTUP = Startup(5)  # without a point: the first trials are TPE's own prior


def step(study: optuna.Study, number: int, sampler: str) -> tuple[dict[str, Any], int]:
    """One trial, told epoch by epoch: its parameters, and after how many epochs it was pruned (or all of them)."""
    study.sampler = SAMPLERS[sampler](number, STARTUP)
    windowed = study if isinstance(study, WindowedStudy) else None
    if windowed:
        with windowed.window():
            trial = windowed.ask()
            lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
            kind = trial.suggest_categorical("optimizer", ["sgd", "adamw"])
    else:
        trial = study.ask()
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        kind = trial.suggest_categorical("optimizer", ["sgd", "adamw"])
    chance = random.Random(number)
    value = 0.0
    for epoch in range(1, EPOCHS + 1):
        value = (
            1 / (1 + abs(lr - 0.01) * 50) * (1 - 0.5**epoch)
            + 0.1 * chance.random()
            + 0.05 * (kind == "sgd")
        )
        trial.report(value, epoch)
        if windowed.should_prune(trial) if windowed else trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return trial.params, epoch
    trial.set_user_attr("seconds", 1.5)
    study.tell(trial, value)
    return trial.params, EPOCHS


def fresh(folder: Path | None, pruner: str) -> optuna.Study:
    place = storage.open_storage(None, folder) if folder else optuna.storages.InMemoryStorage()
    return optuna.create_study(
        storage=place, study_name="s", direction="maximize", pruner=PRUNERS[pruner](EPOCHS)
    )


@pytest.mark.parametrize(
    ("pruner", "sampler", "on_disk"),
    [
        *((pruner, sampler, False) for pruner in sorted(PRUNERS) for sampler in sorted(SAMPLERS)),
        ("projection", "tpe", True),  # a database hands out what the memory does, whoever prunes
        ("hyperband", "tpe", True),
    ],
)
def test_a_window_that_holds_all_proposes_and_prunes_as_optuna_does(
    pruner: str, sampler: str, on_disk: bool, tmp_path: Path
) -> None:
    plain = fresh(None, pruner)
    windowed = WindowedStudy(fresh(tmp_path if on_disk else None, pruner))
    ours = [step(windowed, n, sampler) for n in range(30)]
    assert ours == [step(plain, n, sampler) for n in range(30)]
    if pruner != "none":
        assert any(epochs < EPOCHS for _, epochs in ours)


def test_the_median_of_few_trials_prunes_nothing() -> None:
    study = fresh(None, "median")
    for epochs in (2, 2, 2, 2, 2, 2, 5, 5, 5, 5):  # only four are longer than two epochs
        trial = study.ask()
        for epoch in range(1, epochs + 1):
            trial.report(0.5, epoch)
        study.tell(trial, 0.5)
    trial = study.ask()
    trial.report(0.1, 3)
    assert not trial.should_prune()
    short = study.ask()
    short.report(0.1, 2)
    assert short.should_prune()


def test_what_lies_outside_the_window_is_not_shown_and_what_is_best_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(windowed_study, "MAX_BEST", 3)
    monkeypatch.setattr(windowed_study, "MAX_LATEST", 5)
    study = WindowedStudy(fresh(None, "none"))
    for n in range(20):
        step(study, n, "random")
    seen = [t.number for t in in_window(study)]
    everything = study.get_trials(deepcopy=False)
    best = sorted(everything[:15], key=lambda t: (-(t.value or 0), t.number))[:3]
    assert seen == sorted([*(t.number for t in best), *range(15, 20)]) and len(everything) == 20
    again = WindowedStudy(study)  # a search that was killed and continued
    assert [t.number for t in in_window(again)] == seen


def in_window(study: WindowedStudy) -> list[optuna.trial.FrozenTrial]:
    with study.window():
        return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def test_a_running_trial_and_one_that_waits_are_seen() -> None:
    study = WindowedStudy(fresh(None, "none"))
    study.enqueue_trial({"lr": 0.02})
    assert study.peek_enqueued() is not None
    trial = study.ask()
    assert trial.suggest_float("lr", 1e-4, 1e-1, log=True) == 0.02 and study.peek_enqueued() is None
    with study.window():
        assert [t.params for t in study.get_trials(states=(TrialState.RUNNING,))] == [{"lr": 0.02}]


def test_of_many_running_trials_the_latest_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed_study, "MAX_RUNNING", 3)
    study = WindowedStudy(fresh(None, "none"))
    asked = [study.ask() for _ in range(6)]
    elsewhere = study.ask()
    study.running_elsewhere = [study.running_trials.pop(elsewhere.number)._cached_frozen_trial]
    study.tell(asked[4], 0.5)
    with study.window():
        assert [t.number for t in study.get_trials(states=(TrialState.RUNNING,))] == [3, 5, 6]
        assert [
            t.number for t in study.get_trials(states=(TrialState.COMPLETE, TrialState.RUNNING))
        ] == [3, 4, 5, 6]
    assert (
        len(study.get_trials(states=(TrialState.RUNNING,))) == 6
    )  # outside of the window they all are


def test_a_proposal_reads_no_trial_from_the_database_but_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = WindowedStudy(fresh(tmp_path, "none"))
    for n in range(12):
        step(study, n, "tpe")

    def read(*_: Any, **named: Any) -> Any:
        raise AssertionError("all trials were read")

    monkeypatch.setattr(type(study._storage), "get_all_trials", read)
    for n in range(12, 15):
        assert study.peek_enqueued() is None
        step(study, n, "tpe")


def test_parameters_that_not_all_trials_have_are_proposed_as_by_optuna() -> None:
    def trial(study: optuna.Study, number: int) -> dict[str, Any]:
        study.sampler = SAMPLERS["tpe"](number, STARTUP)
        found = study.ask()
        if found.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
            found.suggest_float("momentum", 0.0, 1.0)
        found.suggest_float("lr", 1e-4, 1e-1, log=True)
        study.tell(found, abs(found.params["lr"] - 0.01) + found.params.get("momentum", 0.3))
        return found.params

    plain, windowed = fresh(None, "none"), WindowedStudy(fresh(None, "none"))
    expected = [trial(plain, n) for n in range(40)]
    with windowed.window():
        assert [trial(windowed, n) for n in range(40)] == expected
    assert len(windowed.one_of_each_kind) == 2


def rows(folder: Path) -> dict[str, list[str]]:
    """All that a study's database holds of its trials, times apart."""
    engine = sqlalchemy.create_engine(f"sqlite:///{folder / 'study.db'}")
    found = {}
    with engine.connect() as connection:
        for table in sqlalchemy.inspect(engine).get_table_names():
            if table.startswith("trial"):
                cells = connection.execute(sqlalchemy.text(f"SELECT * FROM {table}")).mappings()
                found[table] = sorted(
                    repr(
                        [
                            (k, v)
                            for k, v in cell.items()
                            if not k.endswith("_id") and "datetime" not in k
                        ]
                    )
                    for cell in cells
                )
    engine.dispose()
    return found


def test_what_is_written_at_once_is_what_optuna_writes_one_by_one(tmp_path: Path) -> None:
    for name in ("ours", "plain"):
        (tmp_path / name).mkdir()
    windowed, plain = (
        WindowedStudy(fresh(tmp_path / "ours", "median")),
        fresh(tmp_path / "plain", "median"),
    )
    for study in (windowed, plain):
        for n in range(8):
            step(study, n, "random")
        trial = study.ask()
        trial.suggest_int("epochs", 1, 4)
        for number, value in enumerate((float("nan"), float("inf"), -1.0), 1):
            trial.report(value, number)
        trial.set_user_attr("reason", {"words": "ä", "list": [1, None]})
        trial.storage.set_trial_system_attr(
            trial._trial_id, "artifacts:1", '{"filename": "curve.png"}'
        )
        study.tell(trial, state=TrialState.FAIL)
    assert rows(tmp_path / "ours") == rows(tmp_path / "plain")


def test_what_a_running_trial_tells_reaches_the_database_within_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = WindowedStudy(fresh(tmp_path, "none"))
    trial = study.ask()
    trial.report(0.5, 1)
    study.flush_writes(trial)
    assert study.trials[0].intermediate_values == {}  # it waits
    monkeypatch.setattr("tuner.search.write_buffer.MAX_DELAY", 0.0)
    study.flush_writes(trial)
    assert study.trials[0].intermediate_values == {1: 0.5}


def test_a_trial_that_somebody_else_ended_is_told_apart_from_a_wrong_call(tmp_path: Path) -> None:
    study = WindowedStudy(fresh(tmp_path, "none"))
    trial, other = study.ask(), study.ask()
    for one in (trial, other):
        study.flush_writes(one, now=True)
    optuna.load_study(study_name="s", storage=storage.open_storage(None, tmp_path)).tell(0, 0.5)
    with pytest.raises(UpdateFinishedTrialError):
        study.tell(trial, 0.7)
    with pytest.raises(ValueError, match="nan is not acceptable"):
        study.tell(other, float("nan"), state=TrialState.COMPLETE)
    assert study.trials[0].value == 0.5


@pytest.mark.parametrize("length", [0, 10, 2045, 2046, 9000])
def test_a_note_is_the_one_that_the_dashboard_reads(length: int, tmp_path: Path) -> None:
    from optuna_dashboard import get_note

    study = fresh(tmp_path, "none")
    trial, body = study.ask(), ("# Ä\n" + "x" * length)[:length]
    write_note(study, None, body)
    write_note(study, trial, body[::-1])
    assert (get_note(study), get_note(trial)) == (body, body[::-1])


def test_a_note_that_was_collected_is_there_when_the_trial_has_ended(tmp_path: Path) -> None:
    study = WindowedStudy(fresh(tmp_path, "none"))

    def notes() -> list[Any]:
        return [
            v
            for k, v in study._storage.get_study_system_attrs(study._study_id).items()
            if "note_str" in k
        ]

    trial = study.ask()
    write_note(study, trial, "how it went")
    assert notes() == []
    study.tell(trial, 0.5)
    assert notes() == ["how it went"]
