"""Summaries of models: their stages, and the share of parameters and operations that each freeze
depth saves.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.config import plugins
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.core.input_spec import tree_to_dict
from tuner.core.types import StagedModel
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
    """The size of a model, and what freezing saves.

    `uncut_reason` says in words why the model has no more depths, where it should have more.
    """

    parameters: int
    flops: int  # of one example's forward pass; a multiply-add counts as two
    example: str  # that was counted, in words
    depths: list[DepthSavings]
    uncut_reason: str | None = None


def summarize_model(name: str, outputs: int = 1000) -> ModelSummary:
    """Builds a model without weights and counts its parameters and operations.

    Raises SpaceError on an unknown name.
    """
    config = _default_config(name)
    with _light_device(name):
        staged = _build(config, outputs)
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
    return ModelSummary(sum(parameters), sum(stage_flops.flops), example, rows, staged.uncut_reason)


def _default_config(name: str) -> PluginConfig:
    """The model with the defaults of its options. Raises SpaceError on an unknown name."""
    fields = plugins.read_keys("model", name).fields
    options = {
        key: field.get_default(call_default_factory=True)
        for key, field in fields.items()
        if not field.is_required()
    }
    return PluginConfig(name, options)


def _task_of(name: str) -> str:
    return plugins.list_tasks("model", name)[0] if ":" not in name else "classification"


DETECTOR_TASKS = ("detection", "instance_segmentation")


def _light_device(name: str) -> torch.device:
    """The device on which a model is built to be counted.

    The meta device has no numbers, and counting needs none. But a user's own model may read numbers
    while it is built, and a detector while it counts objects.
    """
    return torch.device("cpu" if ":" in name or _task_of(name) in DETECTOR_TASKS else "meta")


def _build(config: PluginConfig, outputs: int) -> StagedModel:
    task = PluginConfig(_task_of(config.name), {})
    run = Run(task, PluginConfig("synthetic", {}), config, Recipe(), 0)
    return build_model(run.without_weights(), Path(), outputs)


@dataclass(frozen=True)
class ModelLine:
    """A model in a list.

    Args:
        name: As a space file has it.
        parameters: Their number, with 1000 classes.
        size: Of an example: the side of an image in pixels, or the tokens of a text.
        stages: Their names.
        uncut_reason: Why there are no more of them, in words.
    """

    name: str
    parameters: int
    size: int
    stages: tuple[str, ...]
    uncut_reason: str | None


def find_models(pattern: str) -> list[str]:
    """The names of models that match a pattern such as `timm/*dinov2*`, as fnmatch reads it.

    Raises:
        SpaceError: There are none, or a package is missing.
    """
    names: list[str] = []
    for name in plugins.list_names("model"):
        if "*" not in name:
            names.append(name)
            continue
        module = plugins.import_plugin("model", name)
        prefix = name.partition("*")[0]
        if hasattr(module, "known_names") and pattern.startswith(prefix):
            names += module.known_names()
    found = fnmatch.filter(names, pattern)
    if not found:
        raise SpaceError(
            f"{pattern!r} matches no model; `tuner models` lists the names, and 'timm/*' all of "
            "timm's"
        )
    return found


def describe_models(names: list[str], outputs: int = 1000) -> Iterator[ModelLine]:
    """Yields a line for each model; each is built without weights."""
    for name in names:
        config = _default_config(name)
        with _light_device(name):
            staged = _build(config, outputs)
            spec = input_spec_of(config)
            size = spec.max_length or tree_to_dict(spec.dummy_input())[""].shape[-1]
        parameters = sum(value.numel() for value in staged.model.parameters())
        yield ModelLine(name, parameters, size, tuple(staged.stages), staged.uncut_reason)


def shorten_stages(stages: Sequence[str]) -> str:
    """The names of stages in a line; of those that differ in their number, the first and the last:
    stem, blocks0..11, head.
    """
    groups: list[tuple[str, list[str]]] = []
    for stage in stages:
        numbered = re.fullmatch(r"(.*?)(\d+)", stage)
        start, number = (numbered[1], numbered[2]) if numbered else (stage, "")
        if not (number and groups and groups[-1][0] == start):
            groups.append((start, []))
        groups[-1][1].append(number)
    return ", ".join(
        f"{start}{numbers[0]}..{numbers[-1]}" if len(numbers) > 1 else f"{start}{numbers[0]}"
        for start, numbers in groups
    )
