"""The moving average of the weights: its formula, that it leaves the training alone, and that it is what is scored and kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import TrainingContext, predict_source
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import FitProgress, fit
from tuner.training.weight_average import WeightAverage

NEXT_TO_0 = 1e-30  # 1 - NEXT_TO_0 is 1 in floating point


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def run(**recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {"epochs": 2, "lr": 0.01, "freeze_depth": 0, "optimizer": "adamw"} | recipe
    return space.make_run({("recipe", key): value for key, value in chosen.items()}, seed=3)


def trained(r: Run, here: DeviceContext) -> tuple[list[FitProgress], TrainingContext]:
    context = prepare_training(r, here, "accuracy")
    return list(fit(context, r.recipe, r.seed)), context


def losses(epochs: list[FitProgress]) -> list[float]:
    return [progress.epoch.loss for progress in epochs]


def scores(epochs: list[FitProgress]) -> list[dict[str, float]]:
    return [progress.epoch.scores for progress in epochs]


def test_the_decay_rises_to_its_own() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = WeightAverage(net, 0.5)
    nn.init.ones_(net.weight)
    expected = 0.0
    for step, decay in enumerate((2 / 11, 3 / 12, 4 / 13, 5 / 14), start=1):
        average.update(step)
        expected = decay * expected + 1 - decay
        assert average.tensors["weight"].item() == pytest.approx(expected)
    for _ in range(2):  # far on, the decay is the one that was asked for
        average.update(1000)
        expected = 0.5 * expected + 0.5
        assert average.tensors["weight"].item() == pytest.approx(expected)


def test_statistics_are_averaged_and_counts_are_copied() -> None:
    net = nn.BatchNorm1d(1)
    average = WeightAverage(net, 0.9)
    net(torch.tensor([[3.0], [5.0]]))  # mean 4
    assert net.running_mean is not None and net.running_mean.item() == pytest.approx(0.4)
    average.update(10**9)
    with average.applied():
        assert net.running_mean.item() == pytest.approx(0.04)
        assert net.num_batches_tracked is not None and net.num_batches_tracked.item() == 1
    assert net.running_mean.item() == pytest.approx(0.4)


def test_weights_with_two_names_are_exchanged_once() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    nn.init.zeros_(net[0].weight)
    average = WeightAverage(net, 0.9)
    nn.init.ones_(net[0].weight)
    with average.applied():
        assert net[0].weight.eq(0).all() and net[1].weight is net[0].weight
    assert net[0].weight.eq(1).all() and average.tensors["0.weight"].eq(0).all()
    with pytest.raises(ZeroDivisionError), average.applied():
        raise ZeroDivisionError
    assert net[0].weight.eq(1).all()


@pytest.mark.parametrize("fit_on", ["train", "train+valid"])
def test_the_average_with_the_decay_0_is_the_net_to_the_bit(
    fit_on: str, here: DeviceContext
) -> None:
    """BatchNorm adapts here, so the average begins after the statistics were adopted."""
    plain, net = trained(run(fit=fit_on), here)
    averaged, same = trained(run(fit=fit_on, ema=NEXT_TO_0), here)
    assert (losses(averaged), scores(averaged)) == (losses(plain), scores(plain))
    weights = net.net.state_dict()
    assert all(torch.equal(v, weights[name]) for name, v in same.net.state_dict().items())


def test_the_average_is_what_is_scored_and_kept_and_the_training_goes_on_without_it(
    here: DeviceContext,
) -> None:
    plain, net = trained(run(), here)
    averaged, context = trained(run(ema=0.99), here)
    assert losses(averaged) == losses(plain) and scores(averaged) != scores(plain)
    best = averaged[-1].best
    assert best is not None
    kept = predict_source(context, context.valid, 16)
    assert torch.equal(torch.cat([p for p, _ in kept]), torch.cat([p for p, _ in best.predictions]))
    weights = net.net.state_dict()
    assert any(not torch.equal(v, weights[name]) for name, v in context.net.state_dict().items())


def test_without_validation_the_last_average_is_kept(here: DeviceContext) -> None:
    _, net = trained(run(fit="train+valid"), here)
    _, context = trained(run(fit="train+valid", ema=0.9), here)
    weights = net.net.state_dict()
    assert any(not torch.equal(v, weights[name]) for name, v in context.net.state_dict().items())
