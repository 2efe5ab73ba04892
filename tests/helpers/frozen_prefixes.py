"""A source that counts how often it is asked, and small frozen prefixes for the cache."""

import torch
from torch import Tensor, nn

from tuner.core.types import Batch
from tuner.training.activation_cache import Prefix, names_of


class Counting:
    """A source of eight examples that counts how often it is asked."""

    views = 2
    digest = "eight"
    lengths = None

    def __init__(self) -> None:
        self.taken = 0

    def __len__(self) -> int:
        return 8

    def take(self, index: Tensor, view: int) -> Batch:
        self.taken += len(index)
        return Batch(index.float()[:, None] + 100 * view, index)


def frozen(stages: nn.Module, precision: str = "float32") -> Prefix:
    held = list(stages.children())
    return Prefix(held, names_of(held, precision), torch.device("cpu"))


class Step(nn.Module):
    """A stage that counts the examples that pass; its output has `width` numbers each."""

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.fc, self.passed = nn.Linear(wide, width), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passed += len(x)
        out: Tensor = self.fc(x)
        return out


def chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(Step(a, b) for a, b in zip((1, *widths), widths, strict=False))).eval()
