"""Descriptions and artifacts of predictions that give each example one class."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from tuner import deferred_figures
from tuner.core.example_results import ExampleResults
from tuner.core.types import Prediction

MAX_CLASSES_NAMED = 3  # classes that a line names


def describe_probabilities(classes: Sequence[str], probabilities: Sequence[float]) -> Prediction:
    """The prediction of one example: the classes with their probabilities, most likely first."""
    ranked = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])
    return Prediction(
        "  ".join(f"{name} {p:.3f}" for name, p in ranked[:MAX_CLASSES_NAMED]),
        {"classes": dict(ranked)},
    )


def concatenate_pairs(pairs: Iterable[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Logits, float32 (n, classes), and true classes, int64 (n,), of all batches, on the CPU."""
    logits, truth = zip(*pairs, strict=True)
    return torch.cat(logits).cpu(), torch.cat(truth).cpu()


def classification_results(pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
    """`truth` and `predicted`, classes as int64 (n,), and the true class's `log_likelihood`,
    float32 (n,).
    """
    logits, truth = concatenate_pairs(pairs)
    return {
        "truth": truth,
        "predicted": logits.argmax(1),
        "log_likelihood": -F.cross_entropy(logits, truth, reduction="none"),
    }


def score_classes(results: ExampleResults, counts: Tensor, class_count: int) -> dict[str, float]:
    """The scores of classification tasks, as torchmetrics defines them, of counted examples.

    Means over classes leave out a class that is neither true nor predicted. Matthews' correlation
    is 0 where all examples have, or get, one class.

    Args:
        results: What `classification_results` gave for n examples.
        counts: int64 (n,), how often each example is there.
        class_count: The number of classes.
    """
    weights = counts.double()
    cells = results["truth"] * class_count + results["predicted"]
    matrix = torch.bincount(cells, weights, class_count**2).view(class_count, class_count)
    hits, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    seen, total = (true + predicted) > 0, matrix.sum()
    covariance = hits.sum() * total - (true * predicted).sum()
    deviations = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
    scores = {
        "accuracy": hits.sum() / total,
        "balanced_accuracy": (hits / true.clamp(min=1))[seen].mean(),
        "f1": (2 * hits / (true + predicted).clamp(min=1))[seen].mean(),
        "matthews": covariance / deviations.sqrt() if deviations > 0 else deviations,
        "log_likelihood": (results["log_likelihood"] * weights).sum() / total,
    }
    return {name: float(value) for name, value in scores.items()}


def classification_artifacts(
    logits: Tensor, truth: Tensor, classes: tuple[str, ...]
) -> dict[str, bytes]:
    """The confusion matrix as a plot, and each class's scores as CSV."""
    matrix = multiclass_confusion_matrix(logits, truth, len(classes))
    return {
        "confusion.png": deferred_figures.defer_figure(
            "confusion", matrix=matrix.tolist(), classes=classes
        ),
        "per_class.csv": per_class_csv(matrix, classes),
    }


def per_class_csv(matrix: Tensor, classes: tuple[str, ...]) -> bytes:
    """Precision, recall, F1 and count of each class, as CSV."""
    columns = (matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist())
    rows: list[list[Any]] = []
    for name, hits, true_count, predicted_count in zip(classes, *columns, strict=True):
        precision = hits / max(1, predicted_count)
        recall = hits / max(1, true_count)
        f1 = 2 * hits / max(1, predicted_count + true_count)
        rows.append([name, f"{precision:.4f}", f"{recall:.4f}", f"{f1:.4f}", true_count])
    return encode_csv(["class", "precision", "recall", "f1", "examples"], rows)


def encode_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """CSV in UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode(errors="replace")
