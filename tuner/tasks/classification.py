"""Image classification: one class per image, and cross-entropy."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree
from tuner.core.losses import class_cross_entropy, weights_of_classes
from tuner.core.types import Batch, Dataset, Prediction, Task, relative_difference
from tuner.tasks._classification_reports import (
    classification_artifacts,
    concatenate_pairs,
    describe_probabilities,
    mistakes_artifact,
    per_class_scores,
)
from tuner.tasks._classification_scores import (
    classification_results,
    classification_scores,
    defined_metrics,
    score_classes,
)

METRICS = (
    "accuracy",
    "balanced_accuracy",
    "f1",
    "log_likelihood",
    "auroc",
    "average_precision",
    "kappa",
    "quadratic_kappa",
    "top_3",
    "top_5",
    "log_loss",
    "expected_calibration_error",
)
MINIMISED = ("log_loss", "expected_calibration_error")
RECIPE_KEYS = ("class_weights", "sampling", "focal_gamma")


def build(classes: tuple[str, ...], recipe: Recipe, class_counts: Tensor | None = None) -> Task:
    """The task for these classes.

    Args:
        classes: the names of the classes.
        recipe: how the model is trained; the loss follows it.
        class_counts: int64 (classes,), how many training examples each class has, on the device of
            the training; None: classes are not weighted.
    """
    weights = (
        None if class_counts is None else weights_of_classes(class_counts, recipe.class_weights)
    )
    return Classification(classes, recipe.label_smoothing, weights, recipe.focal_gamma)


class Classification(Task):
    """Gives each example a class: y is int64 (n,); predictions are logits, float32 (n, classes)."""

    output_description = "logits in the order of the classes; softmax gives probabilities"

    def __init__(
        self,
        classes: tuple[str, ...],
        label_smoothing: float,
        class_weights: Tensor | None = None,
        focal_gamma: float = 0.0,
    ) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing
        self.class_weights, self.focal_gamma = class_weights, focal_gamma
        self.metrics = defined_metrics(METRICS, len(classes))

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch.y, Tensor)
        return class_cross_entropy(
            net(batch.x), batch.y, self.label_smoothing, self.class_weights, self.focal_gamma
        )

    def predict(self, net: nn.Module, x: TensorTree) -> Tensor:
        return net(x).float()  # type: ignore[no-any-return]

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        scores = classification_scores(*concatenate_pairs(pairs))
        return {name: scores[name] for name in self.metrics}

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and number of examples of each class."""
        matrix = multiclass_confusion_matrix(*concatenate_pairs(pairs), len(self.classes))
        return per_class_scores(matrix, self.classes)

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        return classification_results(pairs)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        scores = score_classes(results, counts, len(self.classes))
        return {name: scores[name] for name in self.metrics if name in scores}

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        logits, truth = concatenate_pairs(pairs)
        return classification_artifacts(logits, truth, self.classes) | mistakes_artifact(
            logits, truth, self.classes, data.valid
        )

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
