"""Models as a table: their stages, and what share of parameters and arithmetic each freeze depth saves."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tuner.run import Part, Recipe, Run
from tuner.trial import build, wants


@dataclass(frozen=True)
class Depth:
    """`parameters` and `flops` are the shares, 0..1, that lie in the first `depth` stages; `stage` is the last of them."""

    depth: int
    stage: str
    parameters: float
    flops: float


@dataclass(frozen=True)
class Described:
    parameters: int
    flops: int  # of one image's forward pass; a multiply-add counts as two
    size: int
    depths: list[Depth]


def describe(name: str, outputs: int = 1000) -> Described:
    """Builds the model without weights and counts. Raises SpaceError on an unknown name."""
    from tuner import plugins

    fields = plugins.keys("model", name).fields
    options = {k: f.get_default(call_default_factory=True) for k, f in fields.items() if not f.is_required()}
    part = Part(name, options)
    run = Run(Part("classification", {}), Part("synthetic", {}), part, Recipe(), 0)
    size = wants(part).size
    staged = build(run.without_weights(), Path(), outputs)
    x = torch.zeros(1, 3, size, size)
    parameters, flops = [], []
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        for stage in staged.stages.values():
            with FlopCounterMode(display=False) as counter:
                x = stage.eval()(x)
            flops.append(counter.get_total_flops())
            parameters.append(sum(p.numel() for p in stage.parameters()))
    rows = [
        Depth(
            depth,
            list(staged.stages)[depth - 1] if depth else "(nothing)",
            sum(parameters[:depth]) / sum(parameters),
            sum(flops[:depth]) / max(1, sum(flops)),
        )
        for depth in range(staged.max_depth + 1)
    ]
    return Described(sum(parameters), sum(flops), size, rows)
