"""A source that counts how often it is asked, and small frozen prefixes for the cache."""

import torch
from torch import Tensor, nn

from tuner.core.types import Batch
from tuner.training.frozen_prefix import FrozenPrefix, stage_digests


class CountingSource:
    """A source of eight examples that counts how often it is asked."""

    views = 2
    digest = "eight"
    lengths = None

    def __init__(self) -> None:
        self.take_count = 0

    def __len__(self) -> int:
        return 8

    def take(self, index: Tensor, view: int) -> Batch:
        self.take_count += len(index)
        return Batch(index.float()[:, None] + 100 * view, index)


def make_frozen_prefix(stages: nn.Module, precision: str = "float32") -> FrozenPrefix:
    held = list(stages.children())
    return FrozenPrefix(held, stage_digests(held, precision), torch.device("cpu"))


class Step(nn.Module):
    """A stage that counts the examples that pass; its output has `width` numbers each."""

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.fc, self.passed = nn.Linear(wide, width), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passed += len(x)
        out: Tensor = self.fc(x)
        return out


def make_linear_chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(Step(a, b) for a, b in zip((1, *widths), widths, strict=False))).eval()
