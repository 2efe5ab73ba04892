"""What the tasks share that give each example any number of labels; of images and of texts."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree, relative_difference
from tuner.core.losses import weighted_mean
from tuner.core.targets import split_weights
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.errors import SpaceError
from tuner.preprocessing.tokenization import trim_padding
from tuner.tasks._classification_reports import concatenate_pairs
from tuner.tasks._csv_tables import encode_csv
from tuner.tasks._multilabel_scores import (
    binary_loss,
    decide,
    fit_thresholds,
    label_scores,
    multilabel_results,
    multilabel_scores,
    ranking_scores,
)
from tuner.tasks._temperature import fit_temperature

Thresholds = float | tuple[float, ...] | None


class MultilabelTask(Task):
    """Gives each example any number of labels, and is trained by binary cross-entropy.

    y is float32 (n, labels), 1 or 0, perhaps with weights; predictions are logits, float32
    (n, labels). `f1` and the other scores of decisions are at `thresholds`; without them at those
    that are best for the examples that are scored.

    Args:
        labels: The names of the labels.
        recipe: Its label smoothing and focal gamma.
        thresholds: The probability from which on an example has a label: one for all, or one for
            each; None: those that are best.

    Raises:
        SpaceError: There are not as many thresholds as labels.
    """

    output_description = "logits in the order of the labels; sigmoid gives probabilities"

    def __init__(self, labels: tuple[str, ...], recipe: Recipe, thresholds: Thresholds) -> None:
        self.labels = labels
        self.label_smoothing, self.focal_gamma = recipe.label_smoothing, recipe.focal_gamma
        self.thresholds: Tensor | None = None
        if thresholds is not None:
            each = thresholds if isinstance(thresholds, tuple) else (thresholds,) * len(labels)
            if len(each) != len(labels):
                raise SpaceError(
                    f"task.thresholds: {len(each)}, but there are {len(labels)} labels "
                    f"({', '.join(labels[:20])}); write one number, or one for each"
                )
            self.thresholds = torch.tensor(each, dtype=torch.float64)

    def logits(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        """The logits of a net or of an export for a batch of inputs, float (n, labels)."""
        logits = net(trim_padding(x))
        assert isinstance(logits, Tensor)
        return logits

    def loss(self, net: Callable[[TensorTree], TensorTree], batch: Batch) -> Tensor:
        truth, example_weights = split_weights(batch.y)
        assert isinstance(truth, Tensor)
        losses = binary_loss(
            self.logits(net, batch.x), truth, self.label_smoothing, self.focal_gamma
        )
        return weighted_mean(losses, example_weights)

    def predict(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        return self.logits(net, x).float()

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        logits, truth = concatenate_pairs(pairs)
        results = multilabel_results([(logits, truth)], self.thresholds)
        scores = multilabel_scores(results, torch.ones(len(logits), dtype=torch.int64))
        scores |= ranking_scores(logits, truth)
        return {name: scores[name] for name in self.metrics}

    def fit_temperature(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        """The temperature of all labels: each decision is one between two classes."""
        logits, truth = concatenate_pairs(pairs)
        of_two = torch.stack([torch.zeros_like(logits), logits], 2).flatten(0, 1)
        return fit_temperature(of_two, truth.flatten().long())

    def fit_thresholds(self, pairs: Sequence[tuple[Any, Any]]) -> tuple[float, ...] | None:
        if self.thresholds is not None:
            return None
        thresholds: list[float] = fit_thresholds(*concatenate_pairs(pairs)).tolist()
        return tuple(thresholds)

    def at_thresholds(self, thresholds: Sequence[float]) -> Task:
        same = copy.copy(self)
        same.thresholds = torch.tensor(tuple(thresholds), dtype=torch.float64)
        return same

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """Precision, recall, F1, average precision, threshold and number of examples, by label."""
        logits, truth = concatenate_pairs(pairs)
        thresholds = fit_thresholds(logits, truth) if self.thresholds is None else self.thresholds
        return label_scores(logits, truth, self.labels, thresholds)

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        return multilabel_results(pairs, self.thresholds)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        return multilabel_scores(results, counts)

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """The scores of each label."""
        columns = ["precision", "recall", "f1", "average_precision", "threshold", "examples"]
        rows = [
            [name, *(f"{scores[c]:.4f}" for c in columns[:-1]), int(scores["examples"])]
            for name, scores in self.class_scores(pairs).items()
        ]
        return {"per_label.csv": encode_csv(["label", *columns], rows)}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """The labels of each example, and the probabilities of all, most likely first."""
        logits = self.logits(function, x)
        half = torch.full((len(self.labels),), 0.5, dtype=torch.float64)
        given = decide(logits, half if self.thresholds is None else self.thresholds)
        return [
            self._describe(probabilities, which)
            for probabilities, which in zip(logits.sigmoid().tolist(), given.tolist(), strict=True)
        ]

    def _describe(self, probabilities: Sequence[float], given: Sequence[bool]) -> Prediction:
        ranked = sorted(zip(self.labels, probabilities, given, strict=True), key=lambda r: -r[1])
        named = [f"{name} {probability:.3f}" for name, probability, has in ranked if has]
        return Prediction(
            "  ".join(named) or "no label",
            {
                "labels": [name for name, _, has in ranked if has],
                "probabilities": {name: probability for name, probability, _ in ranked},
            },
        )
