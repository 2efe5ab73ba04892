"""Counts the floating-point operations of a forward pass in each stage of a model."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tuner.core.input_spec import InputSpec, TensorTree, tree_to_dict
from tuner.core.types import StagedModel

FALLBACK_SIZES = (96, 64, 32, 28)  # pixels, tried after the size of the input spec


@dataclass(frozen=True)
class StageFlops:
    """Operations of one example's forward pass through each stage; a multiply-add counts as two.

    `size` is the side of the image in pixels, or the length of the text in tokens.
    """

    size: int
    flops: tuple[int, ...]


def measure_flops(staged: StagedModel, input_spec: InputSpec) -> StageFlops:
    """Sends a made-up example through the stages.

    Raises ValueError when the model takes none of the sizes.
    """
    reasons = []
    size = input_spec.max_length or tree_to_dict(input_spec.dummy_input())[""].shape[-1]
    for side in (size,) if input_spec.max_length else (size, *FALLBACK_SIZES):
        x: TensorTree = input_spec.dummy_input(side)
        flops = []
        try:
            with torch.no_grad():
                for stage in staged.stages.values():
                    with FlopCounterMode(display=False) as counter:
                        x = stage.eval()(x)
                    flops.append(counter.get_total_flops())
            return StageFlops(side, tuple(flops))
        # a user's own model may take one size only
        except (RuntimeError, ValueError, TypeError) as error:
            reasons.append(str(error).splitlines()[0])
    sizes = ", ".join(map(str, (size, *FALLBACK_SIZES)))
    raise ValueError(
        f"no image of 3 x side x side passes through this model (tried {sizes}): {reasons[0]}"
    )
