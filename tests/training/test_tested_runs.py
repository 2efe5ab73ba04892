"""Two models on the same test examples: the interval of their difference is a paired bootstrap's."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.config import plugins
from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.types import Task
from tuner.files.tested_run_files import find_tested_run, keep_tested_run
from tuner.training.tested_runs import DRAWS, PLAIN_DRAWS, TestedRun, compare_tested_runs

COUNT = 400


def task() -> Task:
    built: Task = plugins.load_plugin("task", "classification")(("a", "b"), Recipe())
    return built


def make_tested(is_right: Tensor) -> TestedRun:
    """A run that is right about these examples, all of them of class 1."""
    truth = torch.ones(len(is_right), dtype=torch.int64)
    logits = torch.stack([1.0 - is_right.float(), is_right.float()], 1)
    pairs = [(logits, truth)]
    results = task().example_results(pairs)
    return TestedRun("run", "data", task().score(pairs), {}, len(is_right), results)


def two_runs() -> tuple[Tensor, Tensor]:
    """The default is right about 80 %; the winner differs in 12 %, mostly to the better."""
    generator = torch.Generator().manual_seed(0)
    default = torch.rand(COUNT, generator=generator) < 0.8
    changed = torch.rand(COUNT, generator=generator) < 0.12
    return default ^ (
        changed & (~default | (torch.rand(COUNT, generator=generator) < 0.2))
    ), default


def compare(winner: Tensor, default: Tensor, seed: int = 0) -> dict[str, Any]:
    return compare_tested_runs(task(), "accuracy", make_tested(winner), make_tested(default), seed)


def test_the_interval_is_that_of_paired_differences() -> None:
    winner, default = two_runs()
    found = compare(winner, default)
    per_example = winner.double() - default.double()
    mean, error = float(per_example.mean()), float(per_example.std()) / math.sqrt(COUNT)
    assert found["difference"] == pytest.approx(mean)
    low, high = found["interval"]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    shares = [float(right.double().mean()) for right in (winner, default)]
    unpaired = math.sqrt(sum(share * (1 - share) / COUNT for share in shares))
    assert high - low < 0.75 * (2 * 1.96 * unpaired)
    assert found["draws"] == DRAWS and found["confidence"] == 0.95


def test_equal_models_have_no_difference_and_the_seed_decides_the_draws() -> None:
    winner, default = two_runs()
    assert compare(winner, winner)["interval"] == [0.0, 0.0]
    first, again, other = (compare(winner, default, seed) for seed in (1, 1, 2))
    assert first == again and first["interval"] != other["interval"]


def test_a_tested_run_is_read_back_as_it_was() -> None:
    run = make_tested(two_runs()[0])
    back = TestedRun.from_bytes(run.to_bytes())
    assert (back.run_digest, back.scores, back.count) == (run.run_digest, run.scores, COUNT)
    assert all(torch.equal(back.results[name], run.results[name]) for name in run.results)
    empty = TestedRun("r", "d", {"accuracy": 0.5}, {}, 3, {})
    assert TestedRun.from_bytes(empty.to_bytes()) == empty


class Own(type(task())):  # type: ignore[misc]
    """A task of one's own, which only has `score`."""

    example_results = Task.example_results
    score_results = Task.score_results


class Refusing(Own):
    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        raise ValueError("one class is not enough")


def test_a_task_of_ones_own_is_scored_on_fewer_draws_or_on_none() -> None:
    pairs = [
        (torch.randn(40, 2, generator=torch.Generator().manual_seed(i)), torch.arange(40) % 2)
        for i in (0, 1)
    ]
    own, refusing = Own(("a", "b"), 0.0), Refusing(("a", "b"), 0.0)
    runs = [
        TestedRun("r", "d", own.score([pair]), {}, 40, own.example_results([pair]))
        for pair in pairs
    ]
    found = compare_tested_runs(own, "accuracy", runs[0], runs[1], 0)
    low, high = found["interval"]
    assert found["draws"] == PLAIN_DRAWS and low < found["difference"] < high
    refused = compare_tested_runs(refusing, "accuracy", runs[0], runs[1], 0)
    assert refused["interval"] is None and refused["difference"] == found["difference"]
    nothing = TestedRun("r", "d", runs[0].scores, {}, 40, {})
    assert compare_tested_runs(own, "accuracy", nothing, runs[1], 0)["interval"] is None


def test_a_kept_test_is_of_a_run_a_temperature_and_flips(tmp_path: Path) -> None:
    tested = TestedRun("r", "d", {"accuracy": 0.5}, {}, 3, {}, temperature=1.25)
    keep_tested_run(tmp_path, tested.to_bytes())
    wanted = {"run_digest": "r", "temperature": 1.25, "test_flips": False}
    assert find_tested_run(tmp_path, wanted) == tested.to_bytes()
    for other in ({"run_digest": "q"}, {"temperature": None}, {"test_flips": True}):
        assert find_tested_run(tmp_path, wanted | other) is None
