"""One class per text, and cross-entropy."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_matthews_corrcoef,
)

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree
from tuner.core.losses import class_cross_entropy, weights_of_classes
from tuner.core.types import Batch, Dataset, Prediction, Task, relative_difference
from tuner.preprocessing.tokenization import decode_texts, trim_padding
from tuner.tasks._classification_reports import (
    classification_artifacts,
    concatenate_pairs,
    describe_probabilities,
    encode_csv,
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
    "f1",
    "matthews",
    "balanced_accuracy",
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
MAX_MISTAKES = 50  # listed, the most confident first


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
    return TextClassification(classes, recipe.label_smoothing, weights, recipe.focal_gamma)


class TextClassification(Task):
    """Gives each text a class.

    y is int64 (n,); predictions are logits, float32 (n, classes). Batches are cut to their longest
    text before the net sees them.
    """

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
        logits = net(trim_padding(batch.x))
        return class_cross_entropy(
            logits, batch.y, self.label_smoothing, self.class_weights, self.focal_gamma
        )

    def predict(self, net: nn.Module, x: TensorTree) -> Tensor:
        return net(trim_padding(x)).float()  # type: ignore[no-any-return]

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Those of images, and Matthews' correlation."""
        logits, truth = concatenate_pairs(pairs)
        matthews = float(multiclass_matthews_corrcoef(logits, truth, len(self.classes)))
        scores = {**classification_scores(logits, truth), "matthews": matthews}
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
        """The confusion matrix, the scores of each class, and the most confident mistakes.

        The texts of the mistakes are as the model saw them.
        """
        logits, truth = concatenate_pairs(pairs)
        confidence, predicted = logits.softmax(1).max(1)
        errors = (predicted != truth).nonzero().flatten()
        by_confidence = confidence[errors].argsort(descending=True, stable=True)
        errors = errors[by_confidence][:MAX_MISTAKES]
        texts = decode_texts(data.input_spec, data.valid.take(errors, 0).x) if len(errors) else []
        rows = [
            [self.classes[truth[i]], self.classes[predicted[i]], f"{confidence[i]:.4f}", text]
            for i, text in zip(errors.tolist(), texts, strict=True)
        ]
        mistakes = encode_csv(["truth", "predicted", "probability", "text"], rows)
        return {**classification_artifacts(logits, truth, self.classes), "mistakes.csv": mistakes}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        logits = function(trim_padding(x))
        assert isinstance(logits, Tensor)
        return [
            describe_probabilities(self.classes, probabilities)
            for probabilities in logits.softmax(1).tolist()
        ]
