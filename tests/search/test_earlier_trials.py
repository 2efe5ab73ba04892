"""`search.from`: finished trials of earlier studies become trials of a study."""

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.conftest import SMALL, CommandResult
from tests.helpers import postgres_server
from tests.helpers.instant_engine import make_coordinator, make_space, run_all_jobs
from tuner import cli
from tuner.commands.session import Session
from tuner.config import parsing, yaml_document
from tuner.errors import SpaceError
from tuner.messages import DatasetReport
from tuner.search import history, storage
from tuner.search.earlier_trials import EarlierStudy, read_trials, take_over

Tuner = Callable[..., CommandResult]
optuna.logging.set_verbosity(optuna.logging.ERROR)


def earlier_study(**search: Any) -> EarlierStudy:
    """A finished search that trained nothing."""
    space = make_space(**search)
    coordinator = make_coordinator(space)
    run_all_jobs(coordinator)
    return read_trials(space, coordinator.study, "a")


def empty_study() -> optuna.Study:
    """A study under the name that `make_coordinator` opens."""
    return optuna.create_study(
        study_name="t", storage=optuna.storages.InMemoryStorage(), direction="maximize"
    )


def own_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [t for t in study.trials if history.TAKEN_FROM not in t.user_attrs]


def test_trials_that_fit_teach_the_search_and_cost_no_budget() -> None:
    earlier, space, study = earlier_study(trials=12), make_space(trials=5, seed=7), empty_study()
    (result,) = take_over(study, space, [earlier])
    assert (result.taken, result.known, result.left_out.total()) == (12, 0, 0)
    coordinator = make_coordinator(space, study._storage)
    jobs = run_all_jobs(coordinator)
    assert (coordinator.budget_used, len(jobs), len(study.trials)) == (5, 5, 17)
    taken = study.trials[:12]
    for trial, original in zip(taken, earlier.trials, strict=True):
        assert (trial.params, trial.values, trial.state) == (
            original.params,
            original.values,
            original.state,
        )
        assert trial.intermediate_values == original.intermediate_values
        assert trial.user_attrs["tuner:from"] == f"a #{original.number}"
        run = history.run_of_trial(space, study, trial)
        assert run.seed == earlier.seeds[original.number]
    default = history.default_trial(study)  # that of the earlier study: it is not trained again
    assert default is not None and default.number < 12
    assert default.params == space.default_params()
    best, _ = history.best_trial(study)
    assert best.value == max(t.value for t in study.trials if t.value is not None)
    assert set(history.own_proposals(study)) == set(range(5))
    # TPE learns from them at once: its first trials are not the Sobol points of a new search
    fresh = {job.argument.run.recipe.lr for job in run_all_jobs(make_coordinator(space))}
    assert not fresh & {t.params["lr"] for t in own_trials(study)}


def test_what_does_not_fit_is_counted_by_its_reason() -> None:
    earlier = earlier_study(trials=12, sampler="random", pruner="none")
    words = ["recipe.lr={low: 1e-3, high: 1e-2, log: true}", "recipe.optimizer=adamw"]
    document, study = yaml_document.parse_document(SMALL, "small.yaml"), empty_study()
    space = parsing.apply_overrides(document, [*words, "recipe.momentum=0.9"])
    (result,) = take_over(study, parsing.parse_space(space), [earlier])
    fitting = [
        t
        for t in earlier.trials
        if t.params["optimizer"] == "adamw" and 1e-3 <= t.params["lr"] <= 1e-2
    ]
    assert 0 < len(fitting) == result.taken == len(study.trials)
    assert all("optimizer" not in t.params for t in study.trials)
    outside = sum(not 1e-3 <= t.params["lr"] <= 1e-2 for t in earlier.trials)
    assert result.left_out["with lr outside its range"] == outside
    assert result.left_out["with another optimizer"] == 12 - outside - len(fitting)
    line = result.describe()
    assert line.startswith(f"{len(fitting)} of 12 trials were taken over from study 'a'; left out:")
    assert f"{outside} with lr outside its range" in line


def test_an_interrupted_take_over_is_continued_and_nothing_is_entered_twice() -> None:
    earlier, space, study = earlier_study(trials=6), make_space(trials=2), empty_study()
    half = EarlierStudy("a", earlier.space, earlier.trials[:3], earlier.seeds)
    take_over(study, space, [half])
    (result,) = take_over(study, space, [earlier])
    assert (result.taken, result.known) == (3, 3)
    run_all_jobs(make_coordinator(space, study._storage))
    (again,) = take_over(study, space, [earlier])
    assert (again.taken, again.known) == (0, 6) and len(study.trials) == 8
    numbers = [t.user_attrs["tuner:root"] for t in study.trials[:6]]
    assert numbers == [-1, -2, -3, -4, -5, -6]


def test_a_default_recipe_that_is_being_trained_is_not_taken_over() -> None:
    earlier, space, study = earlier_study(trials=4), make_space(trials=3), empty_study()
    run_all_jobs(make_coordinator(space, study._storage), most=1)
    killed = make_coordinator(space, study._storage)
    assert killed.next_job() is not None  # the default recipe begins, and the command is killed
    (result,) = take_over(study, space, [earlier])
    assert (result.taken, result.known) == (2, 2)  # the probe is known, and the default its own
    run_all_jobs(make_coordinator(space, study._storage))
    default = history.default_trial(study)
    assert default is not None and history.BEST_EPOCH in default.user_attrs
    assert history.TAKEN_FROM not in default.user_attrs


def test_pruned_failed_and_repeated_trials() -> None:
    earlier, space, study = earlier_study(trials=6), make_space(trials=2), empty_study()
    trials = [optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL)]
    for number, trial in enumerate(earlier.trials):
        copy = optuna.trial.create_trial(
            params=trial.params,
            distributions=trial.distributions,
            value=trial.value,
            intermediate_values=trial.intermediate_values,
            user_attrs={"tuner:same_as": 0} if number == 3 else trial.user_attrs,
        )
        copy.number = number
        if number in (1, 4, 5):  # 1 is the default recipe, 5 was ended before its first epoch
            copy.state, copy.values = optuna.trial.TrialState.PRUNED, None
        if number == 5:
            copy.intermediate_values = {}
        trials.append(copy)
    (result,) = take_over(study, space, [EarlierStudy("a", space, tuple(trials), earlier.seeds)])
    assert result.left_out == {
        "that failed": 1,
        "that repeat others": 1,
        "without a score": 1,
        "of the default recipe without a result": 1,
    }
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]


def test_limits_hold_for_trials_that_are_taken_over() -> None:
    earlier, study = earlier_study(trials=4), empty_study()
    for trial, megabytes in zip(earlier.trials, (2.0, 3.0, 20.0), strict=False):
        trial.user_attrs["tuner:costs"] = {"megabytes": megabytes}
    (result,) = take_over(study, make_space(limits="{megabytes: 10}"), [earlier])
    assert result.left_out == {
        "of a model beyond search.limits.megabytes": 1,
        "whose model's megabytes were not measured": 1,
    }
    assert [t.constraints for t in study.trials] == [
        {"megabytes": pytest.approx(-0.8)},
        {"megabytes": pytest.approx(-0.7)},
    ]


def test_a_search_goes_on_from_another_study(tuner: Tuner, studied: Path, small: Path) -> None:
    # with another range, and data that it may prepare in another way
    words = ["search.name=b", "search.from=[small]", "search.trials=1", "search.seed=5"]
    words += ["recipe.lr={low: 1e-5, high: 1, log: true}", "search.compare=none"]
    words += ["data.augment=[none, flip]"]
    said = tuner("run", small, *words)
    assert said.code == 0, said.err
    assert "from   2 of 2 trials were taken over from study 'small'\n" in said.out
    rows = [json.loads(line) for line in tuner("trials", "b", "--json").out.splitlines()]
    assert [row["from"] for row in rows] == ["small #0", "small #1", None]
    original = [json.loads(line) for line in tuner("trials", "small", "--json").out.splitlines()]
    assert [row["value"] for row in rows[:2]] == [row["value"] for row in original]
    assert "from small #1" in tuner("trials", "b").out
    manifest = json.loads((studied.parent / "b/export/manifest.json").read_text())
    assert manifest["scores"]["valid"]["accuracy"] == max(row["value"] for row in rows)
    again = tuner("run", small, *words)
    assert again.code == 0 and "taken over" not in again.out and "nothing left to do" in again.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search.from=[smal]"], "no study 'smal' in studies; did you mean 'small'?"),
        (["search.from=[b]"], "'b' is this study"),
        (
            ["search.from=[small]", "search.metric=log_loss"],
            "study 'small' has search.metric=accuracy, this file log_loss",
        ),
        (["search.from=[small]", "data.seed=3"], "study 'small' has data.seed=0, this file 3"),
        (["search.from=[small]", "search.retrain=false"], "needs search.retrain: true"),
        (["search.from=small"], "expected a list, got the string 'small'"),
    ],
)
def test_studies_that_do_not_compare_are_refused_before_anything_is_made(
    words: list[str], message: str, tuner: Tuner, studied: Path, small: Path
) -> None:
    if words == ["search.from=[b]"]:
        (studied.parent / "b").mkdir()
        (studied.parent / "b/space.yaml").write_text((studied / "space.yaml").read_text())
    said = tuner("run", small, "search.name=b", *words)
    assert said.code == 2 and message in said.err, said.err
    assert "command line: search.from: " in said.err and "Traceback" not in said.err
    assert not (studied.parent / "b/study.db").exists()


def test_a_check_finds_an_earlier_study_that_is_missing(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = DatasetReport("digest", (), {}, {}, 0)
    monkeypatch.setattr(Session, "survey_models", lambda _: None)
    monkeypatch.setattr(Session, "inspect_data", lambda *_, **__: facts)
    with pytest.raises(SpaceError, match=r"search.from: no study 'smal' in elsewhere"):
        cli.check(small, ["search.from=[smal]"], studies=Path("elsewhere"))


def test_a_study_whose_data_have_changed_since_is_refused(
    tuner: Tuner, studied: Path, small: Path
) -> None:
    with contextlib.closing(sqlite3.connect(studied / "study.db")) as database, database:
        database.execute(
            "UPDATE study_user_attributes SET value_json = '\"other\"' WHERE key = 'tuner:data'"
        )
    said = tuner("run", small, "search.name=b", "search.from=[small]")
    assert said.code == 2 and "study 'small' has other data: the examples" in said.err, said.err


@pytest.mark.slow
def test_on_a_server_trials_are_taken_over_once(
    tuner: Tuner, studied: Path, small: Path, postgres: postgres_server.TestServer
) -> None:
    name = postgres.database()
    url = postgres.url(name, postgres.password)
    words = ["search.name=b", "search.from=[small]", "search.trials=1", f"storage={url}"]
    try:
        for _ in range(2):
            said = tuner("run", small, *words)
            assert said.code == 0, said.err
        database = storage.open_storage(url, small.parent)
        found = optuna.load_study(study_name="b", storage=database).trials
        storage.close_storage(database)
        assert [t.user_attrs.get("tuner:from") for t in found] == [
            "small #0",
            "small #1",
            None,
        ]
    finally:
        postgres.query(f"DROP DATABASE {name} WITH (FORCE)")
