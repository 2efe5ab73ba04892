"""How a search begins: evenly spread points that follow seed and number alone, and after a fifth of the budget TPE."""

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from tests.helpers.instant_engine import (
    carry_out_without_training,
    make_coordinator,
    make_space,
    run_all_jobs,
)
from tuner.config import parsing, yaml_document
from tuner.config.space import Space
from tuner.jobs import Job, Outcome
from tuner.search import quasi_random, samplers
from tuner.search.coordinator import Coordinator
from tuner.search.quasi_random import MAX_COORDINATES, sobol_point
from tuner.search.samplers import make_startup, value_at

optuna.logging.set_verbosity(optuna.logging.ERROR)


# -- the sequence


def test_without_scrambling_the_points_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    qmc = pytest.importorskip("scipy.stats.qmc")
    known = qmc.Sobol(MAX_COORDINATES, scramble=False, bits=32).random_base2(7)
    monkeypatch.setattr(quasi_random, "_scramble", lambda bits, coordinate, seed: bits)
    # SciPy counts in Gray code
    found = [sobol_point(i ^ (i >> 1), MAX_COORDINATES, 0) for i in range(128)]
    assert np.array_equal(found, known)


@pytest.mark.parametrize("count", [2, 4, 8, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_coordinate_of_the_first_points_has_one_in_each_equal_part(
    count: int, seed: int
) -> None:
    points = np.array([sobol_point(i, MAX_COORDINATES, seed) for i in range(count)])
    parts = np.sort(np.floor(points * count), axis=0)
    assert (parts == np.arange(count)[:, None]).all()


def test_the_seed_decides_the_points_and_further_coordinates_are_random() -> None:
    assert sobol_point(3, 30, 1) == sobol_point(3, 30, 1) != sobol_point(3, 30, 2)
    point, other = sobol_point(3, 30, 1), sobol_point(4, 30, 1)
    assert len(point) == 30 and all(0 <= x < 1 for x in point)
    assert len({*point, *other}) == 60
    assert sobol_point(3, 5, 1) == point[:5]


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (CategoricalDistribution(("a", "b")), ["a", "a", "b", "b"]),
        (FloatDistribution(1.0, 3.0), [1.0, 1.5, 2.0, 2.5]),
        (FloatDistribution(1e-4, 1.0, log=True), [1e-4, 1e-3, 1e-2, 1e-1]),
        (FloatDistribution(0.0, 0.75, step=0.25), [0.0, 0.25, 0.5, 0.75]),
        (IntDistribution(2, 9), [2, 4, 6, 8]),
        (IntDistribution(1, 10, step=3), [1, 4, 7, 10]),
        (IntDistribution(1, 1000, log=True), [1, 3, 22, 150]),
    ],
)
def test_equal_parts_of_a_coordinate_are_equal_parts_of_a_domain(
    distribution: Any, values: list[Any]
) -> None:
    found = [value_at(coordinate, distribution) for coordinate in (0.0, 0.25, 0.5, 0.75)]
    assert found == pytest.approx(values) if not isinstance(values[0], str) else found == values
    assert [type(v) for v in found] == [type(v) for v in values]
    assert distribution._contains(distribution.to_internal_repr(value_at(1 - 1e-9, distribution)))


# -- the beginning of a search


@pytest.mark.parametrize(
    ("budget", "trials"), [(1, 4), (12, 4), (20, 4), (24, 4), (30, 6), (50, 10), (1000, 10)]
)
def test_a_fifth_of_the_budget_ends_before_tpe_learns(budget: int, trials: int) -> None:
    assert make_startup(budget, ["lr"], 0, 0).trials == trials


def first_params(budget: int, seed: int = 0, sampler: str = "tpe") -> list[dict[str, Any]]:
    c = make_coordinator(make_space(trials=budget, seed=seed, sampler=sampler, pruner="none"))
    run_all_jobs(c)
    return [t.params for t in c.study.get_trials()]


def test_tpe_sees_the_history_as_soon_as_the_start_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[int] = []
    plain = optuna.samplers.TPESampler._sample

    def sample(self: Any, study: Any, trial: Any, space: Any) -> Any:
        if study.study_name == "t":  # and not a study that tries Optuna's inner names
            learnt.append(trial.number)
        return plain(self, study, trial, space)

    monkeypatch.setattr(optuna.samplers.TPESampler, "_sample", sample)
    first_params(20)
    assert min(learnt) == 4 and {*learnt} == {*range(4, 20)}
    learnt.clear()
    first_params(40)
    assert min(learnt) == 8


def test_the_start_follows_seed_and_number_and_not_the_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = make_space(trials=50, pruner="none")
    runs = []
    for sign in (1, -1):

        def score(c: Coordinator, job: Job, sign: int = sign) -> Outcome:
            monkeypatch.setattr(
                "tests.helpers.instant_engine.score_of_run", lambda run: sign * run.recipe.lr
            )
            return carry_out_without_training(c, job)

        c = make_coordinator(space)
        run_all_jobs(c, score, most=14)
        runs.append([t.params for t in c.study.get_trials()])
    assert runs[0][:10] == runs[1][:10] and runs[0][10:] != runs[1][10:]
    assert first_params(12, seed=1)[2:4] != runs[0][2:4]


def test_the_start_is_spread_over_every_range() -> None:
    """Of the eight points after linear probe and default, two lie in each quarter of each range."""
    drawn = first_params(50)[2:10]
    for key, low, high in [("lr", 1e-4, 1e-1)]:
        quarters = [int(4 * math.log(p[key] / low) / math.log(high / low)) for p in drawn]
        assert sorted(quarters) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(p["optimizer"] for p in drawn) == ["adamw"] * 4 + ["sgd"] * 4
    assert sorted(p["freeze_depth"] // 3 for p in drawn) == [0] * 4 + [1] * 4


def test_a_start_with_many_workers_repeats_no_point() -> None:
    c = make_coordinator(make_space(trials=100))
    jobs = [c.next_job() for _ in range(60)]
    assert all(jobs) and len({t.params["lr"] for t in c.study.get_trials()}) == 59
    assert all(t.state == TrialState.RUNNING for t in c.study.get_trials())


def several_ranges(**search: Any) -> Space:
    text = """
task: classification
data: digits
model: {name: resnet18_slim, weights: bundled}
recipe:
  optimizer: [sgd, adamw]
  lr: [{low: 1e-3, high: 1e-1, log: true, when: {optimizer: sgd}}, {low: 1e-5, high: 1e-3, log: true, when: {optimizer: adamw}}]
  momentum: {low: 0.8, high: 0.99, when: {optimizer: sgd}}
  freeze_depth: {low: 0, high: 5}
  epochs: {low: 1, high: 2}
"""
    words = [f"search.{key}={value}" for key, value in search.items()]
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(text, "several.yaml"), words)
    )


def test_a_killed_search_over_several_ranges_continues_as_an_undisturbed_one() -> None:
    space = several_ranges(trials=16)
    calm = make_coordinator(space)
    run_all_jobs(calm)
    storage = optuna.storages.InMemoryStorage()
    for _ in range(16):  # each process carries out one trial, and dies holding the next
        c = make_coordinator(space, storage)
        run_all_jobs(c, most=1)
        if c.has_budget_left():
            c.next_job()
    run_all_jobs(c := make_coordinator(space, storage))

    def ended(study: optuna.Study) -> list[tuple[dict[str, Any], float | None]]:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return [(t.params, t.value) for t in study.get_trials(states=states)]

    assert ended(c.study) == ended(calm.study) and len(ended(calm.study)) == 16
    names = {name for params, _ in ended(calm.study) for name in params}
    assert names == {"optimizer", "lr[sgd]", "lr[adamw]", "momentum", "freeze_depth", "epochs"}
    for params, _ in ended(calm.study):
        other = {"sgd": "adamw", "adamw": "sgd"}[params["optimizer"]]
        assert f"lr[{other}]" not in params


def test_many_dimensions_need_no_more_than_a_seed() -> None:
    names = [f"key{i}" for i in range(40)]
    startup = make_startup(100, names, 0, 5)
    assert list(startup.point) == names and startup.trials == samplers.MAX_STARTUP
