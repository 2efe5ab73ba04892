"""What a report says of an export's probabilities on the test examples: how precise the answers are
as more of them are asked for, and how often they are right for how sure the model is.

No torch here: what each test example adds to the scores lies in the export.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tuner.manifest import TEST_RESULTS, PublishedExport

CLASSIFIERS = ("classification", "text_classification")
LABELLERS = ("multilabel", "text_multilabel")
BINS = 10  # of the probability, equally wide
MOST_POINTS = 60  # of a curve

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class PrecisionRecall:
    """One class against the rest: the precision at each recall, from the surest answer on.

    `average_precision`: the mean of the precision over the examples of the class.
    """

    name: str
    recall: list[float]
    precision: list[float]
    average_precision: float


@dataclass(frozen=True)
class ConfidenceBin:
    """The answers whose probability lies in a range: their number, mean probability, and share of
    right ones.
    """

    low: float
    high: float
    count: int
    confidence: float
    right: float


@dataclass(frozen=True)
class TestProbabilities:
    """`curves` have the hardest class first; they are empty where too many classes are told apart.

    `answers`: what a bin counts, in words.
    """

    __test__ = False  # it is no test of pytest's

    curves: list[PrecisionRecall]
    bins: list[ConfidenceBin]
    answers: str


def read_probabilities(published: PublishedExport | None) -> TestProbabilities | None:
    """Of an export that tells classes or labels and keeps its test results; else None."""
    if published is None or TEST_RESULTS not in published.manifest["files"]:
        return None
    task = published.manifest["run"]["task"]["name"]
    results = load_file(published.folder / TEST_RESULTS)
    names = [str(name) for name in published.manifest["classes"]]
    if task in CLASSIFIERS and {"target", "predicted", "confidence"} <= results.keys():
        target = results["target"]
        right = results["predicted"] == target
        curves = []
        if "prediction" in results:
            is_true = target[:, None] == np.arange(len(names))
            # of two classes one curve says it all; the second is the positive one
            shown = slice(1, None) if len(names) == 2 else slice(None)
            probabilities = softmax(results["prediction"].astype(np.float64))
            curves = list(class_curves(names[shown], probabilities[:, shown], is_true[:, shown]))
        bins = confidence_bins(results["confidence"].astype(np.float64), right)
        return TestProbabilities(sort_curves(curves), bins, "examples")
    if task in LABELLERS and {"target", "prediction"} <= results.keys():
        is_true = results["target"] > 0.5
        probabilities = 1 / (1 + np.exp(-results["prediction"].astype(np.float64)))
        curves = list(class_curves(names, probabilities, is_true))
        bins = confidence_bins(probabilities.ravel(), is_true.ravel())
        return TestProbabilities(sort_curves(curves), bins, "labels")
    return None


def softmax(logits: Numbers) -> Numbers:
    """Probabilities from logits, float64 (n, classes)."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def sort_curves(curves: list[PrecisionRecall]) -> list[PrecisionRecall]:
    """The hardest class first."""
    return sorted(curves, key=lambda curve: curve.average_precision)


def class_curves(
    names: list[str], probabilities: Numbers, is_true: NDArray[np.bool_]
) -> Iterator[PrecisionRecall]:
    """The curve of each class that has test examples.

    Args:
        names: The classes.
        probabilities: float64 (n, classes).
        is_true: bool (n, classes).
    """
    for column, name in enumerate(names):
        if is_true[:, column].any():
            yield precision_recall(name, probabilities[:, column], is_true[:, column])


def precision_recall(
    name: str, probabilities: Numbers, is_true: NDArray[np.bool_]
) -> PrecisionRecall:
    """The curve of one class; examples of equal probability are asked for together."""
    order = np.argsort(-probabilities, kind="stable")
    ordered, hits = probabilities[order], is_true[order].cumsum()
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    recall, precision = hits[ends] / hits[-1], hits[ends] / (ends + 1)
    average = float((np.diff(recall, prepend=0.0) * precision).sum())
    kept = np.unique(np.linspace(0, len(ends) - 1, min(MOST_POINTS, len(ends))).round().astype(int))
    return PrecisionRecall(name, recall[kept].tolist(), precision[kept].tolist(), average)


def confidence_bins(probabilities: Numbers, is_right: NDArray[np.bool_]) -> list[ConfidenceBin]:
    """The bins that hold any answer, the least sure first."""
    places = np.clip((probabilities * BINS).astype(int), 0, BINS - 1)
    made = []
    for place in np.unique(places):
        inside = places == place
        low, high = float(place) / BINS, float(place + 1) / BINS
        share = float(is_right[inside].mean())
        mean = float(probabilities[inside].mean())
        made.append(ConfidenceBin(low, high, int(inside.sum()), mean, share))
    return made


def calibration_sentence(found: TestProbabilities) -> str:
    """How far probabilities and shares of right answers are apart."""
    total = sum(one.count for one in found.bins)
    gap = sum(one.count * abs(one.confidence - one.right) for one in found.bins) / total
    lean = sum(one.count * (one.confidence - one.right) for one in found.bins) / total
    side = "too sure of itself" if lean > 0 else "less sure than it might be"
    verdict = f", on the whole {side}" if abs(lean) > gap / 2 and gap >= 0.05 else ""
    return (
        f"On {total:,} test {found.answers} its probabilities differ from the share that is right "
        f"by {100 * gap:.0f} points on average{verdict}."
    )


def precision_sentence(found: TestProbabilities) -> str:
    """Which class is hardest to find without false alarms; empty without curves."""
    if not found.curves:
        return ""
    first, *others = found.curves
    score = f"average precision {first.average_precision:.3f}"
    if not others:
        return f"{first.name} has {score}."
    return f"{first.name} is the hardest to find without false alarms: {score}."


def sentences(found: TestProbabilities) -> list[str]:
    """What curves and bins say, in words."""
    return list(filter(None, [calibration_sentence(found), precision_sentence(found)]))


def bin_rows(found: TestProbabilities) -> list[tuple[str, str, str, str]]:
    """Each bin as a row: its range, how many answers, how sure, how many of them right."""
    return [
        (
            f"{100 * one.low:.0f} to {100 * one.high:.0f} %",
            f"{one.count:,}",
            f"{100 * one.confidence:.0f} %",
            f"{100 * one.right:.0f} %",
        )
        for one in found.bins
    ]


def precision_rows(found: TestProbabilities, most: int) -> list[tuple[str, str]]:
    """The average precision of each class, the hardest first."""
    return [
        (curve.name, f"{curve.average_precision:.3f}")
        for curve in itertools.islice(found.curves, most)
    ]
