"""Image classification: one class per image, and cross-entropy."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.input_spec import TensorTree
from tuner.core.types import Dataset, Task
from tuner.tasks._classification import Classifier, class_weights_of
from tuner.tasks._classification_reports import (
    classification_artifacts,
    concatenate_pairs,
    mistakes_artifact,
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
COUNTED = ("accuracy", "balanced_accuracy", "f1", "top_3", "top_5")
MACRO = ("balanced_accuracy", "f1")
MINIMISED = ("log_loss", "expected_calibration_error")
RECIPE_KEYS = ("class_weights", "sampling", "focal_gamma")
SEARCH_KEYS = ("calibrate", "test_flips")


def build(classes: tuple[str, ...], recipe: Recipe, class_counts: Tensor | None = None) -> Task:
    """The task for these classes.

    Args:
        classes: the names of the classes.
        recipe: how the model is trained; the loss follows it.
        class_counts: int64 (classes,), how many training examples each class has, on the device of
            the training; None: classes are not weighted.
    """
    weights = class_weights_of(recipe, class_counts)
    return Classification(classes, recipe.label_smoothing, weights, recipe.focal_gamma)


class Classification(Classifier):
    """Gives each image a class."""

    named_metrics = METRICS

    def logits(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        logits = net(x)
        assert isinstance(logits, Tensor)
        return logits

    def mirror_output(self, output: TensorTree) -> TensorTree:
        """The logits as they are: a class has no left and right."""
        return output

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        logits, truth = concatenate_pairs(pairs)
        return classification_artifacts(logits, truth, self.classes) | mistakes_artifact(
            logits, truth, self.classes, data.valid
        )
