"""What tasks share that give each example one class: images and texts differ in few places."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree, relative_difference
from tuner.core.losses import class_cross_entropy, weights_of_classes
from tuner.core.targets import split_weights
from tuner.core.types import Batch, Mistake, Prediction, Task
from tuner.tasks._classification_reports import (
    concatenate_pairs,
    confusion_matrix,
    describe_probabilities,
    per_class_scores,
)
from tuner.tasks._classification_scores import (
    classification_results,
    classification_scores,
    defined_metrics,
    score_classes,
)
from tuner.tasks._temperature import fit_temperature


def class_weights_of(recipe: Recipe, class_counts: Tensor | None) -> Tensor | None:
    """The weight of each class in the loss, float (classes,); None: classes are not weighted.

    Args:
        recipe: How the model is trained.
        class_counts: int64 (classes,), how many training examples each class has.
    """
    return None if class_counts is None else weights_of_classes(class_counts, recipe.class_weights)


class Classifier(Task):
    """Gives each example a class, and is trained by cross-entropy.

    y is int64 (n,), perhaps with weights; predictions are logits, float32 (n, classes).

    Args:
        classes: The names of the classes.
        label_smoothing: The share of each target that is spread over all classes.
        class_weights: float (classes,); None: classes are not weighted.
        focal_gamma: Of the focal loss; 0: cross-entropy.
    """

    named_metrics: ClassVar[tuple[str, ...]]  # METRICS of the task's file
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
        self.metrics = defined_metrics(self.named_metrics, len(classes))

    @abstractmethod
    def logits(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        """The logits of a net or of an export for a batch of inputs, float (n, classes)."""

    def loss(self, net: Callable[[TensorTree], TensorTree], batch: Batch) -> Tensor:
        classes, example_weights = split_weights(batch.y)
        assert isinstance(classes, Tensor)
        return class_cross_entropy(
            self.logits(net, batch.x),
            classes,
            self.label_smoothing,
            self.class_weights,
            self.focal_gamma,
            example_weights,
        )

    def predict(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        return self.logits(net, x).float()

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        scores = classification_scores(*concatenate_pairs(pairs))
        return {name: scores[name] for name in self.metrics}

    def fit_temperature(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        """Fitted by plain log loss, also where the loss weighs classes or hard examples: such
        losses are miscalibrated on purpose.
        """
        return fit_temperature(*concatenate_pairs(pairs))

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and number of examples of each class."""
        logits, truth = concatenate_pairs(pairs)
        matrix = confusion_matrix(logits.argmax(1), truth, len(self.classes))
        return per_class_scores(matrix, self.classes)

    def list_mistakes(self, pairs: Sequence[tuple[Any, Any]]) -> list[Mistake]:
        logits, truth = concatenate_pairs(pairs)
        confidence, predicted = logits.softmax(1).max(1)
        wrong = (predicted != truth).nonzero().flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
        columns = (wrong, truth[wrong], predicted[wrong], confidence[wrong])
        return [
            Mistake(index, self.classes[true], self.classes[given], probability)
            for index, true, given, probability in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        return classification_results(pairs)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        scores = score_classes(results, counts, len(self.classes))
        return {name: scores[name] for name in self.metrics if name in scores}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        return [
            describe_probabilities(self.classes, probabilities)
            for probabilities in self.logits(function, x).softmax(1).tolist()
        ]
