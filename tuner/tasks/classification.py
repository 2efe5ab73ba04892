"""Image classification: one class per image, cross-entropy, and scores by torchmetrics."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree
from tuner.core.types import Batch, Dataset, Prediction, Task, relative_difference
from tuner.tasks._classification_reports import (
    classification_artifacts,
    classification_results,
    concatenate_pairs,
    describe_probabilities,
    score_classes,
)

METRICS = ("accuracy", "balanced_accuracy", "f1", "log_likelihood")


def build(classes: tuple[str, ...], recipe: Recipe) -> Task:
    return Classification(classes, recipe.label_smoothing)


class Classification(Task):
    """Gives each example a class: y is int64 (n,); predictions are logits, float32 (n, classes)."""

    metrics = METRICS

    output_description = "logits in the order of the classes; softmax gives probabilities"

    def __init__(self, classes: tuple[str, ...], label_smoothing: float) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch.y, Tensor)
        return F.cross_entropy(net(batch.x), batch.y, label_smoothing=self.label_smoothing)

    def predict(self, net: nn.Module, x: TensorTree) -> Tensor:
        return net(x).float()  # type: ignore[no-any-return]

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Accuracy, balanced accuracy, macro F1, and the true class's mean log-likelihood."""
        logits, truth = concatenate_pairs(pairs)
        n = len(self.classes)
        return {
            "accuracy": float(multiclass_accuracy(logits, truth, n, average="micro")),
            "balanced_accuracy": float(multiclass_accuracy(logits, truth, n, average="macro")),
            "f1": float(multiclass_f1_score(logits, truth, n, average="macro")),
            "log_likelihood": -float(F.cross_entropy(logits, truth)),
        }

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        return classification_results(pairs)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        scores = score_classes(results, counts, len(self.classes))
        return {name: scores[name] for name in METRICS}

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        return classification_artifacts(*concatenate_pairs(pairs), self.classes)

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        logits = function(x)
        assert isinstance(logits, Tensor)
        return [
            describe_probabilities(self.classes, probabilities)
            for probabilities in logits.softmax(1).tolist()
        ]
