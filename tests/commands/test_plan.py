"""`tuner plan`: what a search will take, from some measured steps."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL, CommandResult
from tests.helpers.instant_engine import make_space
from tuner.commands.plan import first_runs_of, number_of_trials
from tuner.config.parsing import apply_overrides, parse_space
from tuner.config.yaml_document import parse_document
from tuner.messages import DepthCost, TrainingProfile
from tuner.search.study_cost import draw_runs, estimate_study, mean_of_dearer


def test_plan_measures_each_depth_and_makes_no_study(
    tuner: Callable[..., CommandResult], small: Path
) -> None:
    said = tuner("plan", small, "recipe.freeze_depth={low: 0, high: 5, step: 5}", "--json")
    assert said.code == 0, said.err
    plan = json.loads(said.out)
    depths = plan["models"]["resnet18_slim"]["depths"]
    assert [cost["depth"] for cost in depths] == [0, 5]
    assert depths[0]["train_seconds"] > depths[1]["train_seconds"] > 0
    assert not depths[0]["is_cached"] and depths[0]["cached_bytes"] == 0
    assert plan["trials"] == 4 and plan["seconds_low"] <= plan["seconds"] <= plan["seconds_high"]
    assert plan["peak_bytes"] > 5e7 and plan["disk_bytes"] > 4 * 0.7e6
    assert not (small.parent / "studies").exists()


def test_plan_says_it_in_words(tuner: Callable[..., CommandResult], small: Path) -> None:
    said = tuner("plan", small, "recipe.freeze_depth=5")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("study   about ") and "for 4 trials on 1 worker" in lines[0]
    assert {line.split()[0] for line in lines} >= {"model", "depth", "5", "memory", "disk"}
    head, row = lines[3:5]
    assert re.fullmatch(r"depth   [1-3] epochs?  +an epoch  cache", head), head
    place = head.index("cache")
    assert row[place - 3 : place] == "s  " and row[place] != " "


def test_a_study_costs_its_trials_and_the_trainings_after_them() -> None:
    space = make_space(trials=30, confirm="{top: 2, repeats: 3}")
    runs = draw_runs(space)
    first = first_runs_of(space, runs)
    assert [run.recipe.freeze_depth for run in first] == [5, 0]
    cost = estimate_study(space, runs, first, 30, lambda run: 2.0)
    assert cost.low == cost.middle == cost.high == 2.0 * (30 + 2 * 3 + 2)
    cost = estimate_study(space, runs, first, 30, lambda run: float(run.recipe.epochs))
    assert 30 < cost.low < cost.middle < cost.high < 3 * 38


def test_a_sampler_that_has_learned_proposes_longer_trainings() -> None:
    def middle(sampler: str, trials: int) -> float:
        space = make_space(trials=trials, sampler=sampler, confirm="none")
        runs = draw_runs(space)
        first = first_runs_of(space, runs)
        return estimate_study(space, runs, first, trials, lambda r: float(r.recipe.epochs)).middle

    assert middle("tpe", 4) == middle("random", 4)  # there is nothing to learn from yet
    # of 1, 2 or 3 epochs the mean is 2, and that of the greater of two is 22 / 9
    learned = middle("tpe", 40) - middle("random", 40)
    assert learned == pytest.approx((40 - 8) * (22 / 9 - 2), abs=5)
    assert mean_of_dearer([1.0, 2.0, 3.0]) == pytest.approx(22 / 9)


def test_the_trials_of_a_grid_are_its_combinations() -> None:
    document = parse_document(SMALL, "small.yaml")
    words = ["search.trials=20", "search.sampler=grid", "recipe.lr=[0.001, 0.01]"]
    words += ["recipe.momentum=0.9", "recipe.freeze_depth=0", "recipe.epochs=1"]
    space = parse_space(apply_overrides(document, words))
    assert number_of_trials(space, [], lambda run: 1.0, 0.0, 1) in (4, 5)  # with the default recipe
    hour = parse_space(apply_overrides(document, ["search.time=1h"]))
    assert number_of_trials(hour, draw_runs(hour), lambda run: 1.0, 0.0, 1) in (4, 5)


def test_the_trials_of_a_time_are_those_that_fit_it() -> None:
    space = make_space(time="100s", trials=1000)
    runs = draw_runs(space)
    assert number_of_trials(space, runs, lambda run: 2.0, 20.0, 1) == (100 - 20 - 4) // 2
    assert number_of_trials(make_space(trials=7), runs, lambda run: 2.0, 20.0, 1) == 7


@pytest.mark.parametrize(("depth", "seconds"), [(0, 1 + 3 * (100 * 0.1 + 10 * 0.05)), (4, 1 + 3.3)])
def test_a_training_costs_its_epochs_at_its_depth(depth: int, seconds: float) -> None:
    depths = (DepthCost(0, 0.1, 0.05, 0, 0, False), DepthCost(5, 0.01, 0.01, 0.02, 8, True))
    profile = TrainingProfile(depths, 5.0, 1.0, {"train": 100, "valid": 10, "test": 10}, 1)
    assert profile.seconds_of_training(depth, 3) == pytest.approx(seconds)
    assert profile.seconds_to_fill(5) == pytest.approx(110 * 0.02)
