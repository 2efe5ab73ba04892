"""What a forward pass costs in each stage of a model, counted."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tuner.core.input_spec import InputSpec, TensorTree, tree_to_dict
from tuner.core.types import StagedModel

FALLBACK_SIZES = (96, 64, 32, 28)  # tried after the size that was asked for


@dataclass(frozen=True)
class StageFlops:
    """One example's forward pass through each stage, `size` pixels square or tokens long; a multiply-add counts as two."""

    size: int
    flops: tuple[int, ...]


def measure_flops(staged: StagedModel, input_spec: InputSpec) -> StageFlops:
    """Sends a made-up example through the stages. Raises ValueError when none of the sizes passes."""
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
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ) as error:  # a user's model may be made for one size
            reasons.append(str(error).splitlines()[0])
    raise ValueError(
        f"no image of 3 x side x side passes through this model (tried {', '.join(map(str, (size, *FALLBACK_SIZES)))}): {reasons[0]}"
    )
