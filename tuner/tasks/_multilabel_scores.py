"""The scores of predictions that give each example any number of labels, and where to decide."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.example_results import PREDICTION, TARGET, ExampleResults
from tuner.messages import THRESHOLD_DIGITS
from tuner.tasks._classification_reports import concatenate_pairs
from tuner.tasks._classification_scores import mean_of_defined, rank_examples

PREDICTED = "predicted"  # of example results: which labels each example gets
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 0.001, 0.999


def multilabel_scores(results: ExampleResults, counts: Tensor) -> dict[str, float]:
    """The scores of counted examples, without the ranking metrics.

    A label that no example has and none gets is left out of the mean of `f1`.

    Args:
        results: What `multilabel_results` gave for n examples.
        counts: int64 (n,), how often each example is there.

    Returns:
        `f1`, the mean over the labels; `micro_f1`, of all decisions together; `exact_match`, the
        share of examples all of whose labels are right; `hamming_loss`, the share of wrong
        decisions; `log_likelihood`, the mean over examples and labels, and `log_loss`, its
        negative.
    """
    weights = counts.double()[:, None]
    total = float(weights.sum())
    truth, predicted = results[TARGET] > 0.5, results[PREDICTED]
    hits = (weights * (truth & predicted)).sum(0)
    occurrences = (weights * truth).sum(0) + (weights * predicted).sum(0)
    seen = occurrences > 0
    likelihood = float((weights * -_losses(results[PREDICTION], results[TARGET])).mean(1).sum())
    right = truth == predicted
    return {
        "f1": float((2 * hits / occurrences.clamp(min=1))[seen].mean()) if seen.any() else 0.0,
        "micro_f1": float(2 * hits.sum() / occurrences.sum().clamp(min=1)),
        "exact_match": float((weights[:, 0] * right.all(1)).sum()) / total,
        "hamming_loss": float((weights * ~right).mean(1).sum()) / total,
        "log_likelihood": likelihood / total,
        "log_loss": -likelihood / total,
    }


def ranking_scores(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """`mean_average_precision` and `auroc`: the means over the labels that have examples.

    AUROC needs examples without the label, too. Where no label is left, average precision is 0,
    and AUROC 0.5, that of a model that knows nothing.
    """
    auroc, average_precision = rank_examples(logits.double(), truth > 0.5)
    return {
        "mean_average_precision": mean_of_defined(average_precision, otherwise=0.0),
        "auroc": mean_of_defined(auroc, otherwise=0.5),
    }


def label_scores(
    logits: Tensor, truth: Tensor, labels: tuple[str, ...], thresholds: Tensor
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1, average precision, threshold and number of examples, by label."""
    predicted, is_true = decide(logits, thresholds), truth > 0.5
    _, average_precision = rank_examples(logits.double(), is_true)
    hits = (predicted & is_true).sum(0)
    columns = (hits, predicted.sum(0), is_true.sum(0), average_precision.nan_to_num(0), thresholds)
    return {
        name: {
            "precision": int(hit) / max(1, int(given)),
            "recall": int(hit) / max(1, int(true)),
            "f1": 2 * int(hit) / max(1, int(given) + int(true)),
            "average_precision": float(precision),
            "threshold": round(float(threshold), THRESHOLD_DIGITS),
            "examples": int(true),
        }
        for name, hit, given, true, precision, threshold in zip(labels, *columns, strict=True)
    }


def multilabel_results(
    pairs: Iterable[tuple[Any, Any]], thresholds: Tensor | None
) -> ExampleResults:
    """What each of n examples adds to the scores: its logits, its labels, and those it gets."""
    logits, truth = concatenate_pairs(pairs)
    at = fit_thresholds(logits, truth) if thresholds is None else thresholds
    return {PREDICTION: logits, TARGET: truth, PREDICTED: decide(logits, at)}


def decide(logits: Tensor, thresholds: Tensor) -> Tensor:
    """Which labels each example gets, bool (n, labels): where the probability is at least the
    threshold, float64 (labels,).
    """
    return logits.double() >= thresholds.double().logit()


def fit_thresholds(logits: Tensor, truth: Tensor) -> Tensor:
    """The threshold of each label at which its F1 is highest: float64 (labels,), probabilities.

    It lies in the middle between the two logits that it divides. Of equal F1 scores the one whose
    threshold is nearest to 0.5 counts. A label without examples keeps 0.5.

    Args:
        logits: float (n, labels), on the CPU.
        truth: float (n, labels), 1 or 0.
    """
    n = len(logits)
    ordered, order = logits.double().sort(dim=0, descending=True)
    hits = (truth > 0.5).double().gather(0, order).cumsum(0)
    given = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    f1 = 2 * hits / (given + hits[-1])
    below = torch.cat([ordered[1:], ordered[-1:] - 2])
    f1 = f1.where(below < ordered, -1.0)  # equal logits are all on one side
    middle = ((ordered + below) / 2).sigmoid()
    best = f1 >= f1.max(0).values - 1e-12
    nearest = (middle - 0.5).abs().where(best, 2.0).argmin(0)
    chosen = middle.gather(0, nearest[None])[0]
    chosen = chosen.clamp(LOWEST_THRESHOLD, HIGHEST_THRESHOLD).where(hits[-1] > 0, 0.5)
    digits = float(10**THRESHOLD_DIGITS)
    return (chosen * digits).round() / digits


def binary_loss(
    logits: Tensor, truth: Tensor, label_smoothing: float = 0.0, focal_gamma: float = 0.0
) -> Tensor:
    """The binary cross-entropy of each example, mean over its labels: float (n,).

    Args:
        logits: float (n, labels).
        truth: float (n, labels), 1 or 0.
        label_smoothing: 1 becomes 1 - half of it, and 0 becomes half of it.
        focal_gamma: Of the focal loss (Lin et al., ICCV 2017); 0: plain.
    """
    losses = F.binary_cross_entropy_with_logits(
        logits, truth * (1 - label_smoothing) + label_smoothing / 2, reduction="none"
    )
    if focal_gamma > 0:
        miss = -torch.expm1(-F.binary_cross_entropy_with_logits(logits, truth, reduction="none"))
        losses = losses * miss.clamp_min(1e-6) ** focal_gamma
    return losses.mean(1)


def _losses(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.double(), truth.double(), reduction="none")
