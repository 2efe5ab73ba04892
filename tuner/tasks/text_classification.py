"""One class per text: cross-entropy, and scores by torchmetrics."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree
from tuner.core.types import Batch, Dataset, Prediction, Task, relative_difference
from tuner.preprocessing.tokenization import decode_texts, trim_padding
from tuner.tasks._classification_reports import (
    classification_artifacts,
    classification_results,
    concatenate_pairs,
    describe_probabilities,
    encode_csv,
    score_classes,
)

METRICS = ("accuracy", "f1", "matthews", "balanced_accuracy", "log_likelihood")
MAX_MISTAKES = 50  # listed, the most confident first


def build(classes: tuple[str, ...], recipe: Recipe) -> Task:
    return TextClassification(classes, recipe.label_smoothing)


class TextClassification(Task):
    """Gives each text a class.

    y is int64 (n,); predictions are logits, float32 (n, classes). Batches are cut to their longest
    text before the net sees them.
    """

    metrics = METRICS

    output_description = "logits in the order of the classes; softmax gives probabilities"

    def __init__(self, classes: tuple[str, ...], label_smoothing: float) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch.y, Tensor)
        return F.cross_entropy(
            net(trim_padding(batch.x)), batch.y, label_smoothing=self.label_smoothing
        )

    def predict(self, net: nn.Module, x: TensorTree) -> Tensor:
        return net(trim_padding(x)).float()  # type: ignore[no-any-return]

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Accuracy, macro F1, Matthews' correlation, balanced accuracy, mean log-likelihood."""
        logits, truth = concatenate_pairs(pairs)
        n = len(self.classes)
        return {
            "accuracy": float(multiclass_accuracy(logits, truth, n, average="micro")),
            "f1": float(multiclass_f1_score(logits, truth, n, average="macro")),
            "matthews": float(multiclass_matthews_corrcoef(logits, truth, n)),
            "balanced_accuracy": float(multiclass_accuracy(logits, truth, n, average="macro")),
            "log_likelihood": -float(F.cross_entropy(logits, truth)),
        }

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        return classification_results(pairs)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        scores = score_classes(results, counts, len(self.classes))
        return {name: scores[name] for name in METRICS}

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
