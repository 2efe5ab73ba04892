"""Models as a table: their stages, and what share of parameters and arithmetic each freeze depth saves."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.config import plugins
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.errors import SpaceError
from tuner.training.building import build_model, input_spec_of
from tuner.training.flops import measure_flops


@dataclass(frozen=True)
class DepthSavings:
    """`parameters` and `flops` are the shares, 0..1, that lie in the first `depth` stages; `stage` is the last of them."""

    depth: int
    stage: str
    parameters: float
    flops: float


@dataclass(frozen=True)
class ModelSummary:
    parameters: int
    flops: int  # of one example's forward pass; a multiply-add counts as two
    example: str  # what that was, in words
    depths: list[DepthSavings]


def summarize_model(name: str, outputs: int = 1000) -> ModelSummary:
    """Builds the model without weights and counts. Raises SpaceError on an unknown name."""
    fields = plugins.read_keys("model", name).fields
    options = {
        k: f.get_default(call_default_factory=True)
        for k, f in fields.items()
        if not f.is_required()
    }
    part = PluginConfig(name, options)
    task = plugins.list_tasks("model", name)[0] if ":" not in name else "classification"
    run = Run(PluginConfig(task, {}), PluginConfig("synthetic", {}), part, Recipe(), 0)
    # built-in models need no numbers to be counted; a user's own may want them while it is built, detectors while they count objects
    device = torch.device("cpu" if ":" in name or task == "detection" else "meta")
    with device:
        staged = build_model(run.without_weights(), Path(), outputs)
        try:
            work = measure_flops(staged, input_spec_of(part))
        except ValueError as error:
            raise SpaceError(str(error)) from None
    parameters = [sum(p.numel() for p in stage.parameters()) for stage in staged.stages.values()]
    rows = [
        DepthSavings(
            depth,
            list(staged.stages)[depth - 1] if depth else "(nothing)",
            sum(parameters[:depth]) / max(1, sum(parameters)),
            sum(work.flops[:depth]) / max(1, sum(work.flops)),
        )
        for depth in range(staged.max_depth + 1)
    ]
    example = (
        f"text of {work.size} tokens"
        if input_spec_of(part).max_length
        else f"{work.size} x {work.size} image"
    )
    return ModelSummary(sum(parameters), sum(work.flops), example, rows)
