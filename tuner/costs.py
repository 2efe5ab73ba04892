"""What a forward pass costs in each stage of a model, counted."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tuner.core import Staged, Tree

OTHER_SIZES = (96, 64, 32, 28)  # tried after the size that was asked for


@dataclass(frozen=True)
class Work:
    """One image's forward pass, `size` pixels square, through each stage; a multiply-add counts as two."""

    size: int
    flops: tuple[int, ...]


def measure(staged: Staged, size: int) -> Work:
    """Sends an image through the stages. Raises ValueError when none of the sizes passes."""
    reasons = []
    for side in (size, *OTHER_SIZES):
        x: Tree = torch.zeros(1, 3, side, side)
        flops = []
        try:
            with torch.no_grad():
                for stage in staged.stages.values():
                    with FlopCounterMode(display=False) as counter:
                        x = stage.eval()(x)
                    flops.append(counter.get_total_flops())
            return Work(side, tuple(flops))
        except (RuntimeError, ValueError, TypeError) as error:  # a user's model may be made for one size
            reasons.append(str(error).splitlines()[0])
    raise ValueError(
        f"no image of 3 x side x side passes through this model (tried {', '.join(map(str, (size, *OTHER_SIZES)))}): {reasons[0]}"
    )
