"""The scores of classification: scikit-learn's values, and what is said where a score is not defined."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.types import Task
from tuner.tasks import classification, text_classification
from tuner.tasks._classification_scores import (
    MAX_RANKED_CLASSES,
    classification_scores,
    cohens_kappa,
    matthews_correlation,
    mean_ranking_scores,
)


def examples(count: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits that know a little, many of them equal, and true classes."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(count, classes, generator=generator).round(decimals=1)
    truth = torch.randint(classes, (count,), generator=generator)
    logits[torch.arange(count), truth] += 1
    return logits, truth


def task_of(module: object, classes: int) -> Task:
    names = tuple(f"class{i}" for i in range(classes))
    built: Task = module.build(names, Recipe())  # type: ignore[attr-defined]
    return built


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    logits, truth = examples(400, classes)
    probabilities, predicted = logits.double().softmax(1).numpy(), logits.argmax(1)
    true_columns = np.eye(classes)[truth]
    if classes == 2:  # the second class is the positive one
        auroc = metrics.roc_auc_score(truth, probabilities[:, 1])
        precision = metrics.average_precision_score(truth, probabilities[:, 1])
    else:
        auroc = metrics.roc_auc_score(truth, probabilities, multi_class="ovr")
        precision = metrics.average_precision_score(true_columns, probabilities)
    expected = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
        "f1": metrics.f1_score(truth, predicted, average="macro"),
        "auroc": auroc,
        "average_precision": precision,
        "matthews": metrics.matthews_corrcoef(truth, predicted),
        "kappa": metrics.cohen_kappa_score(truth, predicted),
        "quadratic_kappa": metrics.cohen_kappa_score(truth, predicted, weights="quadratic"),
        "log_loss": metrics.log_loss(truth, probabilities),
    }
    scores = classification_scores(logits, truth)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert scores["log_likelihood"] == -scores["log_loss"]


def test_top_k_counts_the_true_class_among_the_k_likeliest() -> None:
    # all logits differ: which of two equal ones is among the likeliest is nobody's to say
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(200) % 7
    scores = classification_scores(logits, truth)
    for k in (3, 5):
        assert scores[f"top_{k}"] == pytest.approx(metrics.top_k_accuracy_score(truth, logits, k=k))


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    sure, unsure = (torch.tensor([p, 1 - p]).log() for p in (0.9, 0.6))
    logits = torch.stack([*[sure] * 10, *[unsure] * 10])
    truth = torch.tensor([0] * 7 + [1] * 3 + [0] * 6 + [1] * 4)  # 0.7 right where 0.9 is said
    scores = classification_scores(logits, truth)
    assert scores["expected_calibration_error"] == pytest.approx((0.9 - 0.7) / 2, abs=1e-6)


def test_a_confidence_on_the_edge_of_two_bins_is_in_the_upper_one() -> None:
    logits = torch.tensor([[50.0, 0.0]] * 2 + [[0.0, 0.0]] * 2)  # confidences of 1 and of 0.5
    scores = classification_scores(logits, torch.tensor([0, 1, 0, 0]))
    assert scores["expected_calibration_error"] == pytest.approx((0.5 + 0.5) / 2)


def test_logits_between_0_and_1_are_not_taken_for_probabilities() -> None:
    logits = torch.tensor([[0.2, 0.9], [0.8, 0.1]])
    shifted = logits - 5  # the same probabilities
    truth = torch.tensor([1, 1])
    assert classification_scores(logits, truth) == pytest.approx(
        classification_scores(shifted, truth), abs=1e-6
    )


def test_classes_without_an_example_are_left_out_of_the_means() -> None:
    logits, truth = examples(300, 4)
    present = truth < 3
    logits, truth = logits[present], truth[present]
    probabilities = logits.double().softmax(1).numpy()
    auroc = [metrics.roc_auc_score(truth == c, probabilities[:, c]) for c in range(3)]
    precision = [metrics.average_precision_score(truth == c, probabilities[:, c]) for c in range(3)]
    assert mean_ranking_scores(logits, truth) == pytest.approx(
        {"auroc": np.mean(auroc), "average_precision": np.mean(precision)}
    )


def test_where_nothing_can_be_ranked_scores_are_those_of_a_model_that_knows_nothing() -> None:
    logits, truth = torch.randn(20, 2), torch.zeros(20, dtype=torch.int64)
    assert mean_ranking_scores(logits, truth) == {"auroc": 0.5, "average_precision": 0.0}
    all_alike = np.array([[5.0, 0.0], [0.0, 0.0]])
    assert cohens_kappa(all_alike) == cohens_kappa(all_alike, quadratic=True) == 0.0
    assert matthews_correlation(all_alike) == matthews_correlation(all_alike.T) == 0.0


def test_the_quadratic_kappa_forgives_neighbours() -> None:
    near = np.array([[5.0, 5, 0], [0, 5, 5], [0, 5, 5]])
    far = np.array([[5.0, 0, 5], [5, 5, 0], [5, 0, 5]])
    assert cohens_kappa(near, quadratic=True) > cohens_kappa(far, quadratic=True)


@pytest.mark.parametrize("module", [classification, text_classification])
@pytest.mark.parametrize(
    ("classes", "missing"),
    [
        (2, {"top_3", "top_5"}),
        (3, {"top_3", "top_5"}),
        (5, {"top_5"}),
        (6, set()),
        (MAX_RANKED_CLASSES + 1, {"auroc", "average_precision"}),
    ],
)
def test_a_task_scores_every_metric_that_says_something_with_its_classes(
    module: object, classes: int, missing: set[str]
) -> None:
    task = task_of(module, classes)
    scores = task.score([examples(classes, classes)])
    assert list(scores) == list(task.metrics)
    assert set(module.METRICS) - set(task.metrics) == missing  # type: ignore[attr-defined]
