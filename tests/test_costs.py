"""What a freeze depth leaves to be done is counted on the model, and falls with the depth."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from tuner import document, parsing
from tuner.building import build
from tuner.core import Staged
from tuner.costs import measure


def test_arithmetic_and_traffic_of_a_model_that_can_be_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    work = measure(Staged(model, {"stem": model[0], "head": model[1]}), 8)
    assert work.flops == (2 * 8 * 8 * 4 * 3 * 9, 2 * 4 * 2) and work.elements == (4 * 8 * 8, 4 + 4 + 2)
    whole, head = work.remaining()
    assert whole == sum(work.flops) and head == pytest.approx(whole * (16 / whole + 10 / 266) / 2)


@pytest.mark.parametrize("name", ["resnet18_slim", "resnet50", "vgg11_bn"])
def test_each_stage_more_that_is_frozen_leaves_less(name: str, tmp_path: Path) -> None:
    space = parsing.parse(parsing.override(document.parse(SMALL, "s.yaml"), [f"model={{name: {name}, weights: none}}"]))
    staged = build(space.run({}), tmp_path, 3)
    costs = measure(staged, 64).remaining()
    assert len(costs) == len(staged.stages) and sorted(set(costs), reverse=True) == list(costs)
    assert costs == measure(build(space.run({}), tmp_path, 3), 64).remaining() and torch.is_grad_enabled()
