"""How models did on the test examples, and how far two of them differ on the same ones.

The interval of the difference is that of a paired bootstrap (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13): test examples are drawn with replacement, both models are
scored on each draw, and the interval has the middle 95 % of the differences. It is paired because
both models find the same examples hard.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from tuner.core.example_results import ExampleResults
from tuner.core.types import Task
from tuner.files.tested_run_files import FIELDS_KEY, read_fields

DRAWS = 1000
PLAIN_DRAWS = 200  # where each draw is scored by the task's whole `score`, which may take long
CONFIDENCE = 0.95

ScoreDraw = Callable[[Task, ExampleResults, Tensor], dict[str, float]]


@dataclass(frozen=True)
class TestedRun:
    """The scores of one run's model on the test examples, those of each class by its name, and what
    each of `count` examples adds.

    `results` is empty where the task keeps none. Scores and results are of the logits divided by
    `temperature`, where there is one, and with `test_flips` of the mean over each image and its
    mirror image.
    """

    __test__ = False  # it is no test of pytest's

    run_digest: str
    data_digest: str
    scores: dict[str, float]
    per_class: dict[str, dict[str, float]]
    count: int
    results: ExampleResults
    temperature: float | None = None
    test_flips: bool = False

    def to_bytes(self) -> bytes:
        """A safetensors file: the results, and the other fields as its metadata.

        Equal runs give equal bytes. The metadata are one text, because safetensors writes several
        in any order.
        """
        fields = {
            "run_digest": self.run_digest,
            "data_digest": self.data_digest,
            "scores": self.scores,
            "per_class": self.per_class,
            "count": self.count,
            "temperature": self.temperature,
            "test_flips": self.test_flips,
        }
        tensors = {name: value.contiguous() for name, value in self.results.items()}
        return save(tensors, {FIELDS_KEY: json.dumps(fields)})

    @staticmethod
    def from_bytes(content: bytes) -> "TestedRun":
        """What `to_bytes` wrote."""
        return TestedRun(**read_fields(content), results=load(content))


def compare_tested_runs(
    task: Task, metric: str, winner: TestedRun, default: TestedRun, seed: int
) -> dict[str, Any]:
    """The winner's score minus the default recipe's on the same test examples.

    Args:
        task: The task of both runs.
        metric: The score that is compared.
        winner: The winner's test.
        default: The default recipe's test.
        seed: Of the draws.

    Returns:
        What the manifest says: `metric`, `default_scores`, `difference`, `confidence`, `draws`,
        and `interval`, [low, high], or None where the task keeps no results of single examples.
    """
    differences = draw_differences(task, metric, winner, default, seed)
    interval = None
    if len(differences) and bool(differences.isfinite().all()):
        tail = (1 - CONFIDENCE) / 2
        bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        interval = torch.quantile(differences, bounds).tolist()
    return {
        "metric": metric,
        "default_scores": default.scores,
        "difference": winner.scores[metric] - default.scores[metric],
        "interval": interval,
        "confidence": CONFIDENCE,
        "draws": len(differences),
    }


def draw_differences(
    task: Task, metric: str, winner: TestedRun, default: TestedRun, seed: int
) -> Tensor:
    """The difference of the scores on each draw of test examples, float64 (draws,).

    Empty where results of single examples are missing, or cannot be scored.
    """
    if not winner.results or not default.results:
        return torch.zeros(0, dtype=torch.float64)
    try:
        return _draw_differences(task, metric, winner, default, seed)
    except Exception:  # a user's own task may not score a draw; the export must not fail by it
        return torch.zeros(0, dtype=torch.float64)


def _draw_differences(
    task: Task, metric: str, winner: TestedRun, default: TestedRun, seed: int
) -> Tensor:
    score = choose_score(task, metric, winner.results, winner.count)
    generator = torch.Generator().manual_seed(seed)
    differences = []
    for _ in range(PLAIN_DRAWS if score == plain_score else DRAWS):
        rows = torch.randint(0, winner.count, (winner.count,), generator=generator)
        counts = torch.bincount(rows, minlength=winner.count)
        scores = [
            score(task, tested.results, counts).get(metric, math.nan)
            for tested in (winner, default)
        ]
        differences.append(scores[0] - scores[1])
    return torch.tensor(differences, dtype=torch.float64)


def plain_score(task: Task, results: ExampleResults, counts: Tensor) -> dict[str, float]:
    """The scores of a draw by the task's whole `score`."""
    return Task.score_results(task, results, counts)


def quick_score(task: Task, results: ExampleResults, counts: Tensor) -> dict[str, float]:
    """The scores of a draw by the task's own way."""
    return task.score_results(results, counts)


def choose_score(task: Task, metric: str, results: ExampleResults, count: int) -> ScoreDraw:
    """The task's own way to score a draw of `count` examples, where it has one that gives the
    metric.
    """
    if type(task).score_results is Task.score_results:
        return plain_score
    all_once = torch.ones(count, dtype=torch.int64)
    return quick_score if metric in quick_score(task, results, all_once) else plain_score
