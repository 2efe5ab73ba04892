"""Tasks with any number of labels: scores, thresholds, loss and what is said of an example."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, hamming_loss, roc_auc_score

from tuner.config.run import PluginConfig, Recipe, Run
from tuner.core.input_spec import IMAGENET_SPEC
from tuner.core.types import Batch
from tuner.errors import SpaceError
from tuner.tasks import multilabel, regression, text_multilabel
from tuner.tasks._multilabel_scores import fit_thresholds
from tuner.training.label_thresholds import decide_thresholds

LABELS = ("a", "b", "c")


def examples(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(count, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.1])).float()
    return torch.randn(count, 3, generator=generator) + 2 * truth - 2, truth


@pytest.mark.parametrize("module", [multilabel, text_multilabel])
def test_the_scores_are_those_of_scikit_learn(module: Any) -> None:
    logits, truth = examples()
    scores = module.build(LABELS, Recipe(), thresholds=0.4).score([(logits, truth)])
    y, p = truth.numpy(), logits.sigmoid().numpy()
    given = p >= 0.4
    assert scores["mean_average_precision"] == pytest.approx(average_precision_score(y, p))
    assert scores["auroc"] == pytest.approx(roc_auc_score(y, p))
    assert scores["f1"] == pytest.approx(f1_score(y, given, average="macro"))
    assert scores["micro_f1"] == pytest.approx(f1_score(y, given, average="micro"))
    assert scores["hamming_loss"] == pytest.approx(hamming_loss(y, given))
    assert scores["exact_match"] == pytest.approx((y == given).all(1).mean())
    assert scores["log_loss"] == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, truth)), rel=1e-5
    )


def test_a_threshold_is_where_f1_is_highest() -> None:
    logits, truth = examples()
    task = multilabel.build(LABELS, Recipe())
    thresholds = task.fit_thresholds([(logits, truth)])
    assert thresholds is not None
    for label, threshold in enumerate(thresholds):
        of_label = [
            f1_score(truth[:, label], logits[:, label].sigmoid() >= t)
            for t in (*np.linspace(0.02, 0.98, 49), threshold)
        ]
        assert of_label[-1] >= max(of_label) - 1e-9
    at_half = multilabel.build(LABELS, Recipe(), thresholds=0.5)
    assert task.score([(logits, truth)])["f1"] > at_half.score([(logits, truth)])["f1"]
    fixed = multilabel.build(LABELS, Recipe(), thresholds=thresholds)
    assert fixed.fit_thresholds([(logits, truth)]) is None  # they are stated
    assert fixed.score([(logits, truth)]) == pytest.approx(task.score([(logits, truth)]))


def test_thresholds_of_odd_labels_are_inside_of_0_and_1() -> None:
    logits = torch.tensor([[50.0, 1.0, -90.0], [50.0, 1.0, 3.0], [49.0, 1.0, -1.0]])
    truth = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    thresholds = fit_thresholds(logits, truth)
    assert ((thresholds > 0) & (thresholds < 1)).all()
    assert thresholds[1] == 0.5  # no example has the label
    equal = fit_thresholds(torch.zeros(4, 1), torch.tensor([[1.0], [0.0], [1.0], [0.0]]))
    assert 0 < float(equal) <= 0.5  # all or none: all


def test_the_loss_is_a_weighted_mean_of_binary_cross_entropies() -> None:
    logits, truth = examples()
    weights = torch.rand(len(logits))
    net = torch.nn.Identity()
    task = multilabel.build(LABELS, Recipe())
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    assert torch.allclose(task.loss(net, Batch(logits, truth)), each.mean())
    y = {"target": truth, "example_weight": weights}
    assert torch.allclose(task.loss(net, Batch(logits, y)), (each * weights).mean())
    focal = multilabel.build(LABELS, Recipe(focal_gamma=2.0)).loss(net, Batch(logits, truth))
    smooth = multilabel.build(LABELS, Recipe(label_smoothing=0.2)).loss(net, Batch(logits, truth))
    assert focal < each.mean() and smooth != pytest.approx(float(each.mean()))


def test_predictions_name_the_labels_above_their_thresholds() -> None:
    task = multilabel.build(LABELS, Recipe(), thresholds=(0.9, 0.1, 0.5))
    logits = torch.tensor([[1.0, -1.0, -1.0], [-9.0, -9.0, -9.0]])
    one, none = task.describe_predictions(lambda x: x, logits, ["", ""], IMAGENET_SPEC)
    assert one.line == "b 0.269" and one.values["labels"] == ["b"]
    assert list(one.values["probabilities"]) == ["a", "b", "c"]
    assert none.line == "no label" and none.values["labels"] == []


def test_too_few_thresholds_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"task.thresholds: 2, but there are 3 labels \(a, b, c\)"):
        multilabel.build(LABELS, Recipe(), thresholds=(0.1, 0.2))


def test_a_task_decides_at_the_thresholds_that_it_is_given() -> None:
    logits, truth = examples()
    task = multilabel.build(LABELS, Recipe())
    decided = task.at_thresholds([0.2, 0.3, 0.4])
    stated = multilabel.build(LABELS, Recipe(), thresholds=(0.2, 0.3, 0.4))
    assert decided.score([(logits, truth)]) == stated.score([(logits, truth)])
    assert task.fit_thresholds([(logits, truth)]) is not None  # it is as it was
    other = regression.build(LABELS, Recipe())
    assert other.at_thresholds([0.5]) is other


@pytest.mark.parametrize(
    ("stated", "fitted", "temperature", "expected"),
    [
        (None, (0.9, 0.5, 0.5), 2.0, (0.75, 0.5, 0.5)),
        (None, (), 2.0, (0.5, 0.5, 0.5)),  # no validation: the test examples must not choose
        (0.3, (0.9, 0.5, 0.5), 2.0, (0.3, 0.3, 0.3)),
        ((0.1, 0.2, 0.3), (), None, (0.1, 0.2, 0.3)),
    ],
)
def test_the_test_examples_never_choose_their_thresholds(
    stated: Any, fitted: tuple[float, ...], temperature: float | None, expected: tuple[float, ...]
) -> None:
    options = {"thresholds": stated}
    run = Run(
        PluginConfig("multilabel", options),
        PluginConfig("table", {}),
        PluginConfig("resnet18", {}),
        Recipe(),
        0,
    )
    dataset = SimpleNamespace(classes=LABELS)
    for module, wanted in ((multilabel, expected), (regression, None)):
        context: Any = SimpleNamespace(task=module.build(LABELS, Recipe()), dataset=dataset)
        assert decide_thresholds(context, run, fitted, temperature) == wanted
