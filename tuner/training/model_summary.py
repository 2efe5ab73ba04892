"""Summaries of models: their stages, and the share of parameters and operations that each freeze
depth saves.
"""

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
    """The shares, 0..1, of parameters and operations in the first `depth` stages; `stage` is the
    last of them.
    """

    depth: int
    stage: str
    parameters: float
    flops: float


@dataclass(frozen=True)
class ModelSummary:
    """The size of a model, and what freezing saves."""

    parameters: int
    flops: int  # of one example's forward pass; a multiply-add counts as two
    example: str  # that was counted, in words
    depths: list[DepthSavings]


def summarize_model(name: str, outputs: int = 1000) -> ModelSummary:
    """Builds a model without weights and counts its parameters and operations.

    Raises SpaceError on an unknown name.
    """
    fields = plugins.read_keys("model", name).fields
    options = {
        key: field.get_default(call_default_factory=True)
        for key, field in fields.items()
        if not field.is_required()
    }
    config = PluginConfig(name, options)
    task = plugins.list_tasks("model", name)[0] if ":" not in name else "classification"
    run = Run(PluginConfig(task, {}), PluginConfig("synthetic", {}), config, Recipe(), 0)
    # The meta device has no numbers, and counting needs none. But a user's own model may read
    # numbers while it is built, and a detector while it counts objects.
    device = torch.device("cpu" if ":" in name or task == "detection" else "meta")
    with device:
        staged = build_model(run.without_weights(), Path(), outputs)
        try:
            stage_flops = measure_flops(staged, input_spec_of(config))
        except ValueError as error:
            raise SpaceError(str(error)) from None
    parameters = [
        sum(value.numel() for value in stage.parameters()) for stage in staged.stages.values()
    ]
    rows = [
        DepthSavings(
            depth,
            list(staged.stages)[depth - 1] if depth else "(nothing)",
            sum(parameters[:depth]) / max(1, sum(parameters)),
            sum(stage_flops.flops[:depth]) / max(1, sum(stage_flops.flops)),
        )
        for depth in range(staged.max_depth + 1)
    ]
    example = (
        f"text of {stage_flops.size} tokens"
        if input_spec_of(config).max_length
        else f"{stage_flops.size} x {stage_flops.size} image"
    )
    return ModelSummary(sum(parameters), sum(stage_flops.flops), example, rows)
