"""The scores of predictions that give each example one class."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.example_results import PREDICTION, TARGET, ExampleResults
from tuner.tasks._classification_reports import concatenate_pairs, confusion_matrix

CALIBRATION_BINS = 15  # of confidence, equally wide, as Guo et al. take them
MAX_RANKED_CLASSES = 100  # with more, sorting the examples by each class would slow every epoch
TOP_METRICS = {"top_3": 3, "top_5": 5}
RANKING_METRICS = ("auroc", "average_precision")
Floats = npt.NDArray[np.float64]
# float32 as the confidences, so that one which lies on an edge is in the bin above it
CALIBRATION_EDGES = torch.linspace(0, 1, CALIBRATION_BINS + 1).numpy()


def defined_metrics(metrics: Sequence[str], class_count: int) -> tuple[str, ...]:
    """Those of `metrics` that say something with so many classes.

    top_k is 1 for whatever a model says where there are no more than k classes. The ranking metrics
    are left out with more than MAX_RANKED_CLASSES classes.
    """
    return tuple(
        name
        for name in metrics
        if class_count > TOP_METRICS.get(name, 0)
        and not (name in RANKING_METRICS and class_count > MAX_RANKED_CLASSES)
    )


def classification_scores(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """The scores of all examples of a split.

    Means over classes leave out classes about which the split says nothing: those that are neither
    true nor predicted from balanced accuracy and F1, those without an example from AUROC and
    average precision.

    Args:
        logits: float32 (n, classes), on the CPU.
        truth: int64 (n,), the true classes.

    Returns:
        `accuracy`, `balanced_accuracy` (mean recall), `f1`, `auroc` and `average_precision` (of
        each class against the rest; of two classes, those of the second one), `matthews`
        (Matthews' correlation), `kappa` and `quadratic_kappa` (Cohen's, the second one for classes
        in their order), `log_likelihood` of the true class, `log_loss` (its negative),
        `expected_calibration_error` (Guo et al., ICML 2017), `top_3` and `top_5`. What
        `defined_metrics` leaves out is missing.
    """
    n, predicted = logits.shape[1], logits.argmax(1)
    log_loss = float(F.cross_entropy(logits, truth))
    scores = {
        **matrix_scores(confusion_matrix(predicted, truth, n).numpy()),
        "log_likelihood": -log_loss,
        "log_loss": log_loss,
        "expected_calibration_error": expected_calibration_error(logits, truth),
    }
    if n <= MAX_RANKED_CLASSES:
        scores |= mean_ranking_scores(logits, truth)
    is_hit = logits.topk(min(n, max(TOP_METRICS.values())), dim=1).indices == truth[:, None]
    for name in defined_metrics(tuple(TOP_METRICS), n):
        scores[name] = float(is_hit[:, : TOP_METRICS[name]].any(1).double().mean())
    return scores


def matrix_scores(matrix: npt.NDArray[Any]) -> dict[str, float]:
    """The scores that follow from a confusion matrix, by name.

    Args:
        matrix: (classes, classes), how many examples of each true class, a row, were given each
            class, a column. Some are there.
    """
    counts = matrix.astype(np.float64)
    hits, true_count, predicted_count = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = true_count + predicted_count > 0
    recall = hits / np.maximum(true_count, 1)
    f1 = 2 * hits / np.maximum(true_count + predicted_count, 1)
    return {
        "accuracy": float(hits.sum() / counts.sum()),
        "balanced_accuracy": float(recall[occurs].mean()),
        "f1": float(f1[occurs].mean()),
        "matthews": matthews_correlation(counts),
        "kappa": cohens_kappa(counts),
        "quadratic_kappa": cohens_kappa(counts, quadratic=True),
    }


def matthews_correlation(counts: Floats) -> float:
    """The correlation of true and predicted classes (Gorodkin, Comput. Biol. Chem., 2004).

    It is 0 where all examples are, or are said to be, of one class.

    Args:
        counts: float64 (classes, classes), the confusion matrix.
    """
    true_count, predicted_count, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = counts.trace() * total - true_count @ predicted_count
    variances = [total**2 - count @ count for count in (true_count, predicted_count)]
    product = float(variances[0] * variances[1])
    return float(covariance) / product**0.5 if product > 0 else 0.0


def expected_calibration_error(logits: Tensor, truth: Tensor) -> float:
    """By how much confidence and accuracy differ in a bin of confidence, mean over the examples.

    Args:
        logits: float32 (n, classes), on the CPU.
        truth: int64 (n,), the true classes.
    """
    confidence, predicted = logits.softmax(1).max(1)
    return calibration_error(confidence.numpy(), (predicted == truth).numpy(), np.ones(len(truth)))


def calibration_error(
    confidence: npt.NDArray[np.float32], is_hit: npt.NDArray[np.bool_], weights: Floats
) -> float:
    """The expected calibration error of weighted examples; all arrays are (n,)."""
    bins = np.digitize(confidence, CALIBRATION_EDGES) - 1
    gaps = weights * (is_hit - confidence.astype(np.float64))
    return float(np.abs(np.bincount(bins, gaps)).sum() / weights.sum())


def cohens_kappa(counts: Floats, *, quadratic: bool = False) -> float:
    """Agreement beyond chance, at most 1 (Cohen, Educational and Psychological Measurement, 1960).

    It is 0 where chance alone would agree everywhere, as where all examples are of one class.

    Args:
        counts: float64 (classes, classes), the confusion matrix.
        quadratic: Weighs a disagreement by the square of the distance between the two classes.
    """
    by_chance = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    index = np.arange(len(counts))
    distance = (index[:, None] - index) ** 2
    weights = distance if quadratic else distance.clip(max=1)
    expected = float((weights * by_chance).sum())
    return 1 - float((weights * counts).sum()) / expected if expected > 0 else 0.0


def mean_ranking_scores(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """AUROC and average precision of each class against the rest, mean over the classes.

    Of two classes only the second one is scored, the positive class. A class is left out of a mean
    where its value is not defined: AUROC needs examples of the class and others, average precision
    needs examples of the class. Where no class is left, AUROC is 0.5, a model's that knows nothing,
    and average precision 0.
    """
    probabilities = logits.double().softmax(1)  # as float32, many near 1 would be equal
    is_true = F.one_hot(truth, logits.shape[1]).bool()
    if logits.shape[1] == 2:
        probabilities, is_true = probabilities[:, 1:], is_true[:, 1:]
    auroc, average_precision = rank_examples(probabilities, is_true)
    return {
        "auroc": mean_of_defined(auroc, otherwise=0.5),
        "average_precision": mean_of_defined(average_precision, otherwise=0.0),
    }


def rank_examples(values: Tensor, is_true: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and average precision of each column; NaN where they are not defined.

    AUROC is the share of pairs of a true and a false example in which the true one has the higher
    value; a pair of equal values counts half. Average precision is the mean, over the true
    examples, of the precision among all examples whose value is at least as high.

    Args:
        values: float (n, columns).
        is_true: bool (n, columns).

    Returns:
        Two tensors, float64 (columns,).
    """
    n = len(values)
    ordered, order = values.sort(dim=0, descending=True)
    hits = is_true.gather(0, order).double()
    true_until, rank = hits.cumsum(0), torch.arange(1, n + 1)[:, None].expand(n, values.shape[1])
    # equal values are one group: what counts is where their group begins and ends
    differs = ordered[1:] != ordered[:-1]
    edge = differs.new_ones(1, values.shape[1])
    begin = (rank - 1).where(torch.cat([edge, differs]), 0).cummax(0).values
    end = rank.where(torch.cat([differs, edge]), n).flip(0).cummin(0).values.flip(0)
    true_in_groups = true_until.gather(0, end - 1)
    false_until_end = end - true_in_groups
    false_until = torch.cat([edge.double() * 0, rank - true_until])
    false_above = (false_until.gather(0, begin) + false_until_end) / 2
    true_count = hits.sum(0)
    average_precision = (hits * true_in_groups / end).sum(0) / true_count
    auroc = 1 - (hits * false_above).sum(0) / (true_count * (n - true_count))
    return auroc, average_precision


def mean_of_defined(values: Tensor, otherwise: float) -> float:
    """The mean of what is no NaN."""
    defined = values[~values.isnan()]
    return float(defined.mean()) if len(defined) else otherwise


def classification_results(pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
    """What each of n examples adds to the scores.

    Returns:
        The true class as `target` and the most likely one as `predicted`, int64 (n,); the
        `confidence` in the latter and the `log_likelihood` of the former, float32 (n,); how many
        classes are likelier than the true one, `rank`, int64 (n,). With at most
        MAX_RANKED_CLASSES classes also the logits, as `prediction`: the ranking metrics need them.
    """
    logits, truth = concatenate_pairs(pairs)
    results = {
        TARGET: truth,
        "predicted": logits.argmax(1),
        "confidence": logits.softmax(1).max(1).values,
        "log_likelihood": -F.cross_entropy(logits, truth, reduction="none"),
        "rank": (logits > logits.gather(1, truth[:, None])).sum(1),
    }
    return results | ({PREDICTION: logits} if logits.shape[1] <= MAX_RANKED_CLASSES else {})


def score_classes(results: ExampleResults, counts: Tensor, class_count: int) -> dict[str, float]:
    """The scores of `classification_scores`, of counted examples.

    The ranking metrics are not among them: they take too long for many draws. All is computed by
    NumPy, which takes less than half of PyTorch's time for so few numbers.

    Args:
        results: What `classification_results` gave for n examples.
        counts: int64 (n,), how often each example is there.
        class_count: The number of classes.
    """
    arrays = {name: value.numpy() for name, value in results.items()}
    target, predicted, confidence = (arrays[n] for n in (TARGET, "predicted", "confidence"))
    weights = counts.double().numpy()
    total = weights.sum()
    matrix = np.bincount(target * class_count + predicted, weights, class_count**2)
    log_likelihood = float(weights @ arrays["log_likelihood"] / total)
    return {
        **matrix_scores(matrix.reshape(class_count, class_count)),
        "log_likelihood": log_likelihood,
        "log_loss": -log_likelihood,
        "expected_calibration_error": calibration_error(confidence, predicted == target, weights),
        **{
            name: float(weights @ (arrays["rank"] < TOP_METRICS[name]) / total)
            for name in defined_metrics(tuple(TOP_METRICS), class_count)
        },
    }
