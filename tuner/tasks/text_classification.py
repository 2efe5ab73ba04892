"""One class per text, and cross-entropy."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.input_spec import TensorTree
from tuner.core.types import Dataset, Task
from tuner.preprocessing.tokenization import decode_texts, trim_padding
from tuner.tasks._classification import Classifier, class_weights_of
from tuner.tasks._classification_reports import classification_artifacts, concatenate_pairs
from tuner.tasks._csv_tables import encode_csv

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
COUNTED = ("accuracy", "balanced_accuracy", "f1", "top_3", "top_5")
MACRO = ("balanced_accuracy", "f1")
MINIMISED = ("log_loss", "expected_calibration_error")
RECIPE_KEYS = ("class_weights", "sampling", "focal_gamma")
SEARCH_KEYS = ("calibrate",)
MAX_MISTAKES = 50  # listed, the most confident first


def build(classes: tuple[str, ...], recipe: Recipe, class_counts: Tensor | None = None) -> Task:
    """The task for these classes.

    Args:
        classes: the names of the classes.
        recipe: how the model is trained; the loss follows it.
        class_counts: int64 (classes,), how many training examples each class has, on the device of
            the training; None: classes are not weighted.
    """
    weights = class_weights_of(recipe, class_counts)
    return TextClassification(classes, recipe.label_smoothing, weights, recipe.focal_gamma)


class TextClassification(Classifier):
    """Gives each text a class. Batches are cut to their longest text before the net sees them."""

    named_metrics = METRICS

    def logits(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        logits = net(trim_padding(x))
        assert isinstance(logits, Tensor)
        return logits

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
