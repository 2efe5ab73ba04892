"""Tests an export with data that its study never saw.

The intervals are those of a bootstrap over the examples (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13): examples are drawn with replacement, the model is scored on each
draw, and the interval has the middle 95 % of the scores. They say how far the scores may be off
because of which examples were at hand, and nothing about data of another kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.config import plugins
from tuner.config.run import Run
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree
from tuner.core.targets import split_weights
from tuner.core.types import Dataset, Task
from tuner.errors import DataError, suggest_names
from tuner.preprocessing.splits import all_for_testing
from tuner.training.inference import Predictor
from tuner.training.own_metric import score_own_metric
from tuner.training.tested_runs import (
    CONFIDENCE,
    DRAWS,
    PLAIN_DRAWS,
    ScoreDraw,
    choose_score,
    plain_score,
)

MAX_RANKED = 2000  # examples of which each gets a score of its own; more would take long
DRAW_SEED = 0


@dataclass(frozen=True)
class NewData:
    """Data for a test: every split of the dataset has all examples.

    `names` are the examples as a person knows them: paths or texts.
    """

    dataset: Dataset
    names: tuple[str, ...]


@dataclass(frozen=True)
class NewDataTest:
    """How an export did on new data.

    `intervals` are [low, high] by score, for those that can be drawn. `pairs` are (prediction,
    target) of each batch, as `Task.score` takes them. `example_scores` are the scores of single
    examples by the study's metric, None where there are too many or the metric is not defined for
    one. `artifacts` are the task's files that show right and wrong.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: dict[str, dict[str, float]]
    count: int
    pairs: list[tuple[Any, Any]]
    example_scores: list[float] | None
    artifacts: dict[str, bytes]


def read_new_data(
    run: Run, input_spec: InputSpec, home: Path, source: str, options: Mapping[str, Any]
) -> NewData:
    """Reads data as the examples of a run are read, all of them for the test.

    Args:
        run: The run of the export, whose keys of images apply: size, normalisation.
        input_spec: That of the export.
        home: The folder with the caches.
        source: The data source, such as `folder`.
        options: Its keys, such as `path`.

    Raises:
        DataError: The data cannot be used.
    """
    kept = {**options, "augment": "none", "folds": 1, "fold": 0}
    if isinstance(input_spec, ImageInputSpec):
        kept |= {name: getattr(input_spec, name) for name in ("size", "resize", "interpolation")}
        kept |= {"mean": input_spec.mean, "std": input_spec.std}
    keys = plugins.read_keys("data", source)
    known = {
        name: kept[name] if name in kept else key.get_default(call_default_factory=True)
        for name, key in keys.fields.items()
        if name in kept or not key.is_required()
    }
    load = plugins.load_plugin("data", source)
    with all_for_testing() as new:
        dataset = load(home, input_spec, run.task.name, **keys.to_arguments(known))
    names = tuple(_name(example) for example in new.examples)
    if len(names) != len(dataset.test):  # a source of the user's own, which splits by itself
        names = tuple(f"example {number}" for number in range(len(dataset.test)))
    return NewData(dataset, names)


def _name(example: Any) -> str:
    """An example as a person knows it: a path, a text, or the texts of a pair."""
    return " | ".join(example) if isinstance(example, tuple) else str(example)


def class_table(model_classes: Sequence[str], data_classes: Sequence[str]) -> Tensor:
    """The class of the model for each class of the data, by name: int64 (data classes,).

    Raises DataError where the model does not know a class.
    """
    unknown = [name for name in data_classes if name not in model_classes]
    if unknown:
        raise DataError(
            f"the new data have the class {unknown[0]!r}, which the model does not know"
            f"{suggest_names(unknown[0], model_classes)}; rename it, or leave its examples out"
        )
    return torch.tensor([model_classes.index(name) for name in data_classes], dtype=torch.int64)


def rename_classes(y: TensorTree, table: Tensor, count: int) -> TensorTree:
    """Targets whose classes are those of the data, with the `count` classes of the model instead.

    Values beyond the table (pixels that do not count, rows without an object) stay. A class that
    the data lack is a column of zeros, where a target has a column for each class.
    """
    if isinstance(y, dict):
        return {k: _look_up(v, table) if k == "labels" else v for k, v in y.items()}
    if y.is_floating_point():
        columns = torch.zeros(len(y), count, dtype=y.dtype)
        columns[:, table] = y
        return columns
    return _look_up(y, table)


def _look_up(labels: Tensor, table: Tensor) -> Tensor:
    known = (labels >= 0) & (labels < len(table))
    index = torch.where(known, labels.long(), torch.zeros((), dtype=torch.int64))
    return torch.where(known, table[index], labels.long()).to(labels.dtype)


@torch.no_grad()
def test_on(predictor: Predictor, data: NewData, metric: str, batch_size: int) -> NewDataTest:
    """Scores an export on new data.

    Raises DataError where the data have a class that the model does not know, SpaceError where a
    metric of the user's own fails.
    """
    task, classes = predictor.task, predictor.published.manifest["classes"]
    source = data.dataset.test
    table = class_table(classes, data.dataset.classes) if classes else None
    pairs = []
    for index in torch.split(torch.arange(len(source)), batch_size):
        x, y = source.take(index, 0)
        predicted = task.predict(
            predictor.function,  # type: ignore[arg-type]  # it is called as a module is
            predictor.input_spec.to_export_input(x),
        )
        y, _ = split_weights(y)  # weights count in the loss alone
        pairs.append((predicted, y if table is None else rename_classes(y, table, len(classes))))
    scores = task.score(pairs) | score_own_metric(metric, pairs)
    results = task.example_results(pairs)
    return NewDataTest(
        scores,
        bootstrap_intervals(task, scores, results, len(source)),
        task.class_scores(pairs),
        len(source),
        pairs,
        score_examples(task, metric, results, len(source)),
        task.make_artifacts(pairs, data.dataset),
    )


def bootstrap_intervals(
    task: Task, scores: Mapping[str, float], results: ExampleResults, count: int
) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each score over draws of the examples; without scores that no draw can
    give.
    """
    if not results:
        return {}
    ways: dict[ScoreDraw, list[str]] = {}
    for name in scores:
        ways.setdefault(choose_score(task, name, results, count), []).append(name)
    intervals: dict[str, tuple[float, float]] = {}
    for score, names in ways.items():
        try:
            drawn = draw_scores(task, score, names, results, count)
        except Exception:  # a user's own task may not score a draw
            continue
        tail = (1 - CONFIDENCE) / 2
        bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        for name, column in zip(names, drawn.T, strict=True):
            if bool(column.isfinite().all()):
                low, high = torch.quantile(column, bounds).tolist()
                intervals[name] = (low, high)
    return intervals


def draw_scores(
    task: Task, score: ScoreDraw, names: Sequence[str], results: ExampleResults, count: int
) -> Tensor:
    """The scores of each draw, float64 (draws, names)."""
    generator = torch.Generator().manual_seed(DRAW_SEED)
    rows = []
    for _ in range(PLAIN_DRAWS if score == plain_score else DRAWS):
        drawn = torch.randint(0, count, (count,), generator=generator)
        scores = score(task, results, torch.bincount(drawn, minlength=count))
        rows.append([scores.get(name, float("nan")) for name in names])
    return torch.tensor(rows, dtype=torch.float64)


def score_examples(
    task: Task, metric: str, results: ExampleResults, count: int
) -> list[float] | None:
    """The score of each example alone; None where that cannot be said."""
    if not results or count > MAX_RANKED:
        return None
    alone = torch.eye(count, dtype=torch.int64)
    try:
        score = choose_score(task, metric, results, count)
        scores = [score(task, results, row).get(metric) for row in alone]
    except Exception:  # a score such as AUROC is not defined for one example
        return None
    return None if None in scores else [float(value or 0) for value in scores]
