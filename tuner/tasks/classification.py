"""One class per example: cross-entropy, and scores by torchmetrics."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix, multiclass_f1_score

from tuner import figures
from tuner.core import Batch, Data, Task, Told, apart
from tuner.run import Recipe
from tuner.wanted import Tree, Wanted

METRICS = ("accuracy", "balanced_accuracy", "f1", "log_likelihood")


def build(classes: tuple[str, ...], recipe: Recipe) -> Task:
    return Classification(classes, recipe.label_smoothing)


class Classification(Task):
    """y is int64, (n,); predictions are logits, float32 (n, classes)."""

    metrics = METRICS

    output = "logits in the order of the classes; softmax gives probabilities"

    def __init__(self, classes: tuple[str, ...], label_smoothing: float) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch.y, Tensor)
        return F.cross_entropy(net(batch.x), batch.y, label_smoothing=self.label_smoothing)

    def predict(self, net: nn.Module, x: Tree) -> Tensor:
        return net(x).float()  # type: ignore[no-any-return]

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Accuracy, its mean over classes, macro F1, and the mean log-likelihood of the true class."""
        logits, truth = _joined(pairs)
        n = len(self.classes)
        return {
            "accuracy": float(multiclass_accuracy(logits, truth, n, average="micro")),
            "balanced_accuracy": float(multiclass_accuracy(logits, truth, n, average="macro")),
            "f1": float(multiclass_f1_score(logits, truth, n, average="macro")),
            "log_likelihood": -float(F.cross_entropy(logits, truth)),
        }

    def show(self, pairs: Sequence[tuple[Any, Any]], data: Data) -> dict[str, bytes]:
        logits, truth = _joined(pairs)
        matrix = multiclass_confusion_matrix(logits, truth, len(self.classes))
        return {
            "confusion.png": figures.later("confusion", matrix=matrix.tolist(), classes=self.classes),
            "per_class.csv": _per_class(matrix, self.classes),
        }

    def difference(self, expected: Tree, got: Tree) -> float:
        return apart(expected, got)

    def tell(self, function: Callable[[Tree], Tree], x: Tree, originals: Sequence[Any], wanted: Wanted) -> list[Told]:
        logits = function(x)
        assert isinstance(logits, Tensor)
        return [said(self.classes, probabilities) for probabilities in logits.softmax(1).tolist()]


SAID = 3  # classes that a line names


def said(classes: Sequence[str], probabilities: Sequence[float]) -> Told:
    """The classes with their probabilities, most likely first."""
    ranked = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])
    return Told("  ".join(f"{name} {p:.3f}" for name, p in ranked[:SAID]), {"classes": dict(ranked)})


def _joined(pairs: Iterable[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    logits, truth = zip(*pairs, strict=True)
    return torch.cat(logits).cpu(), torch.cat(truth).cpu()


def _per_class(matrix: Tensor, classes: tuple[str, ...]) -> bytes:
    """Precision, recall, F1 and count of each class, as CSV."""
    hits, true, said = matrix.diag(), matrix.sum(1), matrix.sum(0)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", "precision", "recall", "f1", "examples"])
    for name, hit, of_class, of_said in zip(classes, hits.tolist(), true.tolist(), said.tolist(), strict=True):
        values = (hit / max(1, of_said), hit / max(1, of_class), 2 * hit / max(1, of_said + of_class))
        writer.writerow([name, *(f"{v:.4f}" for v in values), of_class])
    return text.getvalue().encode()
