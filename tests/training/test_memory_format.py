"""Models lie channels-last, but for convolutions whose gradient PyTorch writes beyond its memory."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tuner.training.memory_format import place_model

CPU = torch.device("cpu")
MALLOC_CHECKS = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
# a first layer as RepVGG's, trained while glibc looks for damaged memory
TRAINS = """
import torch
from torch import nn
from tuner.training.memory_format import place_model

torch.set_num_threads(1)
layer = nn.Conv2d(3, 48, 1, stride=2, bias=False)
place_model(layer, torch.device("cpu"))
for _ in range(12):
    images = torch.randn(16, 3, 128, 128).to(memory_format=torch.channels_last)
    layer(images).sum().backward()
    layer.zero_grad()
    others = [torch.randn(count) for count in (10, 100, 1000, 5000)]
"""


class Branches(nn.Module):
    """A wide and a narrow kernel over the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(3, 8, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.wide(x) + self.narrow(x)
        return total


def test_a_narrow_strided_kernel_is_contiguous_and_all_else_channels_last() -> None:
    torch.manual_seed(0)
    model = Branches()
    expected = copy.deepcopy(model)
    seen = {}
    place_model(model, CPU)
    place_model(model, CPU)  # a second time changes nothing
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].stride())
        )
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    assert torch.allclose(model(x), expected(x), atol=1e-6)
    assert seen["wide"][1] == 1 and seen["narrow"][1] == 36  # elements from channel to channel
    assert model.wide.weight.stride()[1] == 1
    assert model.narrow.weight.stride() == (3, 1, 1, 1)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert torch.allclose(copy.deepcopy(model)(x), expected(x), atol=1e-6)  # models are copied


@pytest.mark.slow
def test_training_it_damages_no_memory() -> None:
    environment = os.environ | {"MALLOC_CHECK_": "3"}
    if MALLOC_CHECKS.exists():
        environment["LD_PRELOAD"] = str(MALLOC_CHECKS)
    command = [sys.executable, "-c", TRAINS]
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 0, ended.stderr
