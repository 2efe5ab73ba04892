"""Descriptions and artifacts of predictions that give each example one class."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tuner import deferred_figures
from tuner.core.types import Prediction, Source
from tuner.tasks._annotated_images import image_of_pixels
from tuner.tasks._csv_tables import encode_csv

MAX_CLASSES_NAMED = 3  # classes that a line names
MISTAKES_SHOWN, MISTAKE_SIDE = 12, 128  # images, and pixels of their longer sides


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


def confusion_matrix(predicted: Tensor, truth: Tensor, class_count: int) -> Tensor:
    """How many examples of each true class (rows) are given each class (columns).

    Args:
        predicted: int64 (n,), the classes that are predicted.
        truth: int64 (n,), the true classes.
        class_count: How many classes there are.

    Returns:
        int64 (classes, classes).
    """
    pairs = torch.bincount(truth * class_count + predicted, minlength=class_count**2)
    return pairs.reshape(class_count, class_count)


def classification_artifacts(
    logits: Tensor, truth: Tensor, classes: tuple[str, ...]
) -> dict[str, bytes]:
    """The confusion matrix as a plot, and each class's scores as CSV."""
    matrix = confusion_matrix(logits.argmax(1), truth, len(classes))
    return {
        "confusion.png": deferred_figures.defer_figure(
            "confusion", matrix=matrix.tolist(), classes=classes
        ),
        "per_class.csv": per_class_csv(matrix, classes),
    }


def mistakes_artifact(
    logits: Tensor, truth: Tensor, classes: tuple[str, ...], source: Source
) -> dict[str, bytes]:
    """The mistakes of which a model was surest, with their images, as a figure to be drawn later.

    Args:
        logits: float32 (n, classes), on the CPU.
        truth: int64 (n,), the true classes.
        classes: the names of the classes.
        source: the n examples in this order.

    Returns:
        One file; none where there is no mistake, or the examples are no images in RGB.
    """
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != truth).nonzero().flatten()
    surest = confidence[wrong].argsort(descending=True, stable=True)[:MISTAKES_SHOWN]
    rows = wrong[surest]
    pixels = source.take(rows, 0).x if len(rows) else None
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.shape[1:2] != (3,):
        return {}
    mistakes = [
        {
            "image": base64.b64encode(_small_jpeg(image)).decode(),
            "truth": classes[int(truth[row])],
            "predicted": classes[int(predicted[row])],
            "confidence": round(float(confidence[row]), 4),
        }
        for image, row in zip(pixels.cpu(), rows.tolist(), strict=True)
    ]
    return {"mistakes.png": deferred_figures.defer_figure("mistakes", mistakes=mistakes)}


def _small_jpeg(pixels: Tensor) -> bytes:
    """An image, uint8 (3, height, width), in the size of a thumbnail."""
    image = image_of_pixels(pixels.numpy())
    image.thumbnail((MISTAKE_SIDE, MISTAKE_SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def per_class_scores(matrix: Tensor, classes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of examples of each class, by class; 0 for 0 of 0.

    Args:
        matrix: int64 (classes, classes), the confusion matrix; rows are true classes.
        classes: the names of the classes.
    """
    columns = (matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist())
    return {
        name: {
            "precision": hits / max(1, predicted_count),
            "recall": hits / max(1, true_count),
            "f1": 2 * hits / max(1, predicted_count + true_count),
            "examples": true_count,
        }
        for name, hits, true_count, predicted_count in zip(classes, *columns, strict=True)
    }


def per_class_csv(matrix: Tensor, classes: tuple[str, ...]) -> bytes:
    """The scores of each class as CSV."""
    rows = [
        [name, *(f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")), scores["examples"]]
        for name, scores in per_class_scores(matrix, classes).items()
    ]
    return encode_csv(["class", "precision", "recall", "f1", "examples"], rows)
