"""Limits on what a model may cost, and the choice of the cheapest nearly-best model."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from tests.conftest import SMALL, CommandResult
from tuner.commands import export
from tuner.commands.console import Console
from tuner.commands.export import parse_share
from tuner.config.search_settings import LimitSettings
from tuner.errors import SpaceError
from tuner.search import history
from tuner.training import model_costs
from tuner.training.model_costs import describe_excess

Tuner = Callable[..., CommandResult]
# 0.70 and 0.35 million parameters
TWO_MODELS = SMALL.replace(
    "model: {name: resnet18_slim, weights: bundled}",
    "model: {name: [resnet18_slim, shufflenet_v2_x0_5], weights: none}",
).replace("freeze_depth: {low: 0, high: 5}", "freeze_depth: 0")


def test_counts_may_have_a_unit() -> None:
    assert LimitSettings(parameters="5M", megabytes=30).values() == {
        "megabytes": 30.0,
        "parameters": 5e6,
    }
    assert LimitSettings(parameters="1.2B").values() == {"parameters": 1.2e9}
    assert LimitSettings(parameters=300).values() == {"parameters": 300.0}


def test_an_excess_is_said_with_its_limit() -> None:
    costs = {"parameters": 25_000_000.0, "megabytes": 100.0, "milliseconds": 8.0}
    assert describe_excess(costs, {"parameters": 5e6, "milliseconds": 20.0}) == (
        "25,000,000 parameters, at most 5,000,000"
    )
    assert describe_excess(costs, {"megabytes": 100.0}) is None


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ("{parameters: 5Q}", "search.limits"),
        ("{megabytes: 0}", "search.limits.megabytes"),
        ("{milisec: 3}", "search.limits.milisec"),
    ],
)
def test_limits_that_are_none_are_refused(
    tuner: Tuner, small: Path, limits: str, problem: str
) -> None:
    said = tuner("check", small, f"search.limits={limits}")
    assert said.code == 2 and problem in said.err


def test_shares_are_read_and_others_refused() -> None:
    assert (parse_share("1%"), parse_share("0.02"), parse_share("0 %")) == (0.01, 0.02, 0.0)
    for text in ("much", "-1%", "100%"):
        with pytest.raises(SpaceError, match="write a share"):
            parse_share(text)


def test_a_model_beyond_a_limit_is_not_trained_and_cannot_win(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(TWO_MODELS)
    said = tuner(
        "run",
        "two.yaml",
        "search.limits={parameters: 500k, milliseconds: 60000}",
        "search.trials=5",
        "search.sampler=random",
        "search.retrain=false",
    )
    assert said.code == 0, said.err
    manifest = json.loads((tmp_path / "studies/two/export/manifest.json").read_text())
    assert manifest["run"]["model"]["name"] == "shufflenet_v2_x0_5"
    study = optuna.load_study(
        study_name="two", storage=f"sqlite:///{tmp_path}/studies/two/study.db"
    )
    trials = study.get_trials()
    over = [t for t in trials if t.user_attrs["tuner:costs"]["parameters"] > 500_000]
    assert 0 < len(over) < len(trials)
    for trial in trials:
        assert (trial in over) == (trial.constraints["parameters"] > 0)
        assert (trial in over) == (not trial.intermediate_values)
        assert trial.constraints["milliseconds"] < 0
    assert all("parameters, at most 500,000" in t.user_attrs["tuner:reason"] for t in over)
    assert all(t.state == optuna.trial.TrialState.PRUNED for t in over)


def test_a_best_trial_that_did_not_win_is_exported_as_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default recipe has won within the noise, and no export says so yet."""
    text = SMALL.replace("winner: best", "name: two, winner: beyond-noise, direction: maximise")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "space.yaml").write_text(text)
    storage = f"sqlite:///{tmp_path}/two/study.db"
    study = optuna.create_study(study_name="two", storage=storage, direction="maximize")
    study.set_user_attr(history.SPLIT_SIZES, [42, 9])
    space = export.load_study_space(tmp_path / "two")
    for lr, value in ((0.001, 0.8), (0.01, 0.81)):
        trial = optuna.trial.FixedTrial(space.default_params() | {"lr": lr})
        space.sample(trial)
        marks = {history.BEST_EPOCH: 1, history.IS_DEFAULT_RECIPE: lr == 0.001}
        study.add_trial(
            optuna.trial.create_trial(
                value=value,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=marks,
            )
        )
    session = SimpleNamespace(
        run_job=lambda _, runs: [{"parameters": 1.0} for _ in runs], make_assignment=lambda run: run
    )
    monkeypatch.setattr(export, "open_session", lambda *_: contextlib.nullcontext(session))
    console = Console("quiet")
    assert export.choose_cheapest(tmp_path, "two", 0.0, "parameters", console) == 1
    assert export._choose_trial(study, space, None).number == 0


def test_a_cost_without_a_share_is_refused_and_nothing_is_exported(
    tuner: Tuner, studied: Path
) -> None:
    before = (studied / "export/manifest.json").read_bytes()
    said = tuner("export", "small", "--by", "parameters")
    assert said.code == 2 and "--within 1%" in said.err
    assert (studied / "export/manifest.json").read_bytes() == before


@pytest.mark.slow
def test_the_cheapest_of_the_nearly_best_is_exported(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(TWO_MODELS)
    said = tuner("run", "two.yaml", "search.trials=5", "search.sampler=random")
    assert said.code == 0, said.err
    said = tuner("export", "two", "--within", "99%", "--by", "parameters")
    assert said.code == 0 and "has the least parameters" in said.out
    exported = list((tmp_path / "studies/two").glob("export*/manifest.json"))
    names = {json.loads(p.read_text())["run"]["model"]["name"] for p in exported}
    assert "shufflenet_v2_x0_5" in names
    assert tuner("export", "two", "--within", "1%", "--by", "beauty").code == 2
    assert tuner("export", "two", "--within", "1%", "--trial", "0").code == 2


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 30), (0.3, 5), (5.0, 1)])
def test_slow_calls_are_timed_less_often(
    seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(model_costs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call() -> None:
        now[0] += seconds

    milliseconds, calls = model_costs.median_milliseconds(call, 30)
    assert (milliseconds, calls) == (pytest.approx(1000 * seconds), expected)
