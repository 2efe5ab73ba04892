"""Tasks with numbers: scores, loss of standardised targets, and the way back that an export contains."""

from typing import Any

import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score
from torch import nn

from tuner.config.run import Recipe
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import IMAGENET_SPEC
from tuner.core.target_scale import TargetScale
from tuner.core.types import Batch, StagedModel
from tuner.tasks import regression, text_regression

TARGETS = ("age", "income")


def numbers(count: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([10.0, 4000.0])
    return torch.randn(count, 2, generator=generator) * scale + torch.tensor([40.0, 90_000.0])


@pytest.mark.parametrize("module", [regression, text_regression])
def test_the_scores_are_those_of_scikit_learn(module: Any) -> None:
    truth = numbers()
    predicted = truth + torch.randn(50, 2, generator=torch.Generator().manual_seed(1)) * truth.std(
        0
    )
    task = module.build(TARGETS, Recipe())
    scores = task.score([(predicted[:20], truth[:20]), (predicted[20:], truth[20:])])
    assert scores["r2"] == pytest.approx(r2_score(truth, predicted), rel=1e-5)
    assert scores["mae"] == pytest.approx(mean_absolute_error(truth, predicted), rel=1e-5)
    by_target = task.class_scores([(predicted, truth)])
    assert list(by_target) == list(TARGETS)
    assert by_target["age"]["r2"] == pytest.approx(r2_score(truth[:, 0], predicted[:, 0]), rel=1e-4)
    same = task.score([(predicted, torch.ones_like(truth))])
    assert same["r2"] == 0  # the truth does not vary


def test_the_loss_is_of_standardised_targets_and_predictions_are_in_their_units() -> None:
    truth = numbers()
    task = regression.build(TARGETS, Recipe(), truth)
    standardised = (truth - truth.mean(0)) / truth.std(0, correction=0)
    net = nn.Identity()
    outputs = torch.zeros_like(truth)
    loss = task.loss(net, Batch(outputs, truth))
    assert torch.allclose(loss, standardised.square().mean(), rtol=1e-4)
    assert float(loss) == pytest.approx(1, rel=1e-3)  # whatever the units are
    assert torch.allclose(task.predict(net, standardised), truth, rtol=1e-4)
    absolute = regression.build(TARGETS, Recipe(), truth, loss="mae")
    assert torch.allclose(
        absolute.loss(net, Batch(outputs, truth)), standardised.abs().mean(), rtol=1e-4
    )
    weights = torch.arange(50.0)
    weighted = task.loss(net, Batch(outputs, {"target": truth, "example_weight": weights}))
    expected = (standardised.square().mean(1) * weights).mean()
    assert torch.allclose(weighted, expected, rtol=1e-4)


def test_an_export_gives_the_units_of_the_data() -> None:
    layer = nn.Linear(3, 2)
    staged = StagedModel(layer, {"head": layer})
    scale = TargetScale.of(numbers())
    module = ExportModule(staged, IMAGENET_SPEC, target_scale=scale)
    module.has_normalisation = False
    x = torch.randn(4, 3)
    assert torch.allclose(module(x), scale.restore(layer(x)))
    other = ExportModule(StagedModel(nn.Linear(3, 2), {}), IMAGENET_SPEC, target_scale=scale)
    assert {"tuner.target_mean", "tuner.target_deviation"} <= module.export_state().keys()
    assert other.export_state().keys() == module.export_state().keys()
    assert TargetScale.from_dict(scale.to_dict()) == scale


def test_a_target_that_does_not_vary_is_not_divided_by_0() -> None:
    scale = TargetScale.of(torch.full((9, 1), 7.0))
    assert scale.deviation == (1.0,)
    assert scale.standardise(torch.tensor([[8.0]])).item() == 1


def test_predictions_name_each_number() -> None:
    task = regression.build(TARGETS, Recipe())
    (said,) = task.describe_predictions(
        lambda x: x, torch.tensor([[31.25, 90_500.0]]), [""], IMAGENET_SPEC
    )
    assert said.line == "age 31.25  income 90500"
    assert said.values == {"targets": {"age": 31.25, "income": 90500.0}}


def test_outputs_are_compared_relative_to_the_size_of_each_target() -> None:
    task = regression.build(TARGETS, Recipe())
    expected = torch.tensor([[1e-3, 1e6]])
    assert task.output_difference(expected, expected + torch.tensor([[1e-4, 0]])) == pytest.approx(
        0.1, rel=1e-2
    )
