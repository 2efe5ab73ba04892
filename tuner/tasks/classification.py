"""One class per example: cross-entropy, and scores by torchmetrics."""

import csv
import io
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix, multiclass_f1_score

from tuner import figures
from tuner.core import Batch, Task, Tree
from tuner.run import Recipe

METRICS = ("accuracy", "balanced_accuracy", "f1", "log_likelihood")


def build(outputs: int, recipe: Recipe) -> Task:
    return Classification(outputs, recipe.label_smoothing)


class Classification(Task):
    """y is int64, (n,); predictions are logits, float32 (n, classes)."""

    metrics = METRICS

    def __init__(self, classes: int, label_smoothing: float) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch.x), batch.y, label_smoothing=self.label_smoothing)

    def predict(self, net: nn.Module, x: Tree) -> Tensor:
        return net(x).float()  # type: ignore[no-any-return]

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Accuracy, its mean over classes, macro F1, and the mean log-likelihood of the true class."""
        logits, truth = _joined(pairs)
        n = self.classes
        return {
            "accuracy": float(multiclass_accuracy(logits, truth, n, average="micro")),
            "balanced_accuracy": float(multiclass_accuracy(logits, truth, n, average="macro")),
            "f1": float(multiclass_f1_score(logits, truth, n, average="macro")),
            "log_likelihood": -float(F.cross_entropy(logits, truth)),
        }

    def show(self, pairs: Iterable[tuple[Any, Any]], classes: tuple[str, ...]) -> dict[str, bytes]:
        logits, truth = _joined(pairs)
        matrix = multiclass_confusion_matrix(logits, truth, self.classes)
        return {
            "confusion.png": figures.later("confusion", matrix=matrix.tolist(), classes=classes),
            "per_class.csv": _per_class(matrix, classes),
        }


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
