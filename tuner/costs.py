"""What training costs at each freeze depth, from the model alone: no clock, so that every machine finds the same."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tuner.core import Staged, Tree, leaves

OTHER_SIZES = (96, 64, 32, 28)  # tried after the size that was asked for


@dataclass(frozen=True)
class Work:
    """One image's forward pass through each stage: `flops` (a multiply-add counts as two) and `elements` written."""

    size: int
    flops: tuple[int, ...]
    elements: tuple[int, ...]

    def remaining(self) -> tuple[float, ...]:
        """What is left to do at each freeze depth, in flops of the whole model.

        Half by arithmetic and half by memory traffic, which bounds the wide early stages: on a CPU this is within a few
        hundredths of what EfficientNet-Lite0's epochs take (benchmarks/README.md).
        """
        shares = [_shares(self.flops), _shares(self.elements)]
        return tuple(sum(self.flops) * sum(pair) / 2 for pair in zip(*shares, strict=True))


def _shares(parts: tuple[int, ...]) -> list[float]:
    """The share of the whole that lies behind each of the first len(parts) cuts."""
    return [sum(parts[depth:]) / max(1, sum(parts)) for depth in range(len(parts))]


def measure(staged: Staged, size: int) -> Work:
    """Sends an image through the stages. Raises ValueError when none of the sizes passes."""
    reasons = []
    for side in (size, *OTHER_SIZES):
        x: Tree = torch.zeros(1, 3, side, side)
        flops, elements = [], []
        try:
            with torch.no_grad():
                for stage in staged.stages.values():
                    x, one, other = _through(stage.eval(), x)
                    flops.append(one)
                    elements.append(other)
            return Work(side, tuple(flops), tuple(elements))
        except (RuntimeError, ValueError, TypeError) as error:  # a user's model may be made for one size
            reasons.append(str(error).splitlines()[0])
    raise ValueError(
        f"no image of 3 x side x side passes through this model (tried {', '.join(map(str, (size, *OTHER_SIZES)))}): {reasons[0]}"
    )


def _through(stage: nn.Module, x: Tree) -> tuple[Tree, int, int]:
    written = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal written
        if isinstance(output, (Tensor, dict)):
            written += sum(leaf.numel() for leaf in leaves(output).values() if isinstance(leaf, Tensor))

    hooks = [m.register_forward_hook(count) for m in stage.modules() if not list(m.children())]
    try:
        with FlopCounterMode(display=False) as counter:
            x = stage(x)
    finally:
        for hook in hooks:
            hook.remove()
    return x, counter.get_total_flops(), written
