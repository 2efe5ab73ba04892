"""Adapters: low-rank changes of frozen layers, by peft (extra `lora`).

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022. An adapter adds B A x to
what a linear layer W computes of x. B begins as 0, so the first step begins where the model stands;
in an export W + B A is one matrix again.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tuner.config.requirements import pip_install
from tuner.config.run import LoraOptions
from tuner.core.adapters import MARK
from tuner.core.types import StagedModel
from tuner.errors import SpaceError, limit_listing, nearest_hint
from tuner.training.building import FRESH_SEED

ADAPTER = "default"  # peft's name of a model's first adapter
BASE = ".base_layer."  # in the names of what is below an adapter


def import_peft() -> Any:
    """The package peft. Raises SpaceError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise SpaceError(
            f"recipe.lora: adapters need the package peft: {pip_install('lora')}"
        ) from None
    return peft


def attach_adapters(
    staged_model: StagedModel,
    depth: int,
    options: LoraOptions,
    model_name: str,
    run_example: Callable[[], object],
) -> None:
    """Gives layers behind the first `depth` stages adapters, and freezes all else but the head.

    Layers whose weights the model's code uses without calling them, as some attention does, cannot
    have an adapter and get none. Where the head alone is trained there is nothing to adapt. The
    adapters begin alike in every run.

    Args:
        staged_model: The model, which is changed in place.
        depth: The freeze depth.
        options: The rank and what else the recipe says.
        model_name: The model's name, for messages.
        run_example: Sends some examples through the stages behind `depth`.

    Raises:
        SpaceError: peft is not installed, or there is no such layer.
    """
    if 0 < depth == staged_model.max_depth:
        return
    layers = find_layers(staged_model, depth, options, model_name)
    called = called_modules(layers, run_example)
    if not called:
        raise SpaceError(
            f"recipe.lora.targets: {', '.join(limit_listing(sorted(layers), 5))}: {model_name} "
            "uses the weights of these layers without calling them, so no adapter works; choose "
            "others"
        )
    peft = import_peft()
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules="|".join(map(re.escape, called)),
    )
    torch.manual_seed(FRESH_SEED)
    with warnings.catch_warnings():  # of GPT-2's layers, whose matrices lie the other way round
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        peft.inject_adapter_in_model(config, staged_model.model)
    for name, parameter in staged_model.model.named_parameters():
        if MARK in name:
            parameter.data = parameter.data.float()  # whatever the precision of the layer
    staged_model.split(depth)  # says anew what is trained


def find_layers(
    staged_model: StagedModel, depth: int, options: LoraOptions, model_name: str
) -> dict[str, nn.Module]:
    """The layers that can have adapters, by their names in the model.

    They are linear layers inside the modules of the stages behind `depth`, but for the head. A
    layer that is itself a part of a stage could not be replaced in both, stage and model.

    Raises SpaceError where there are none.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *conv1d_kinds(staged_model.model))
    stages = list(staged_model.stages.values())[depth:-1]
    inside = {id(module) for stage in stages for module in stage.modules()}
    modules = dict(staged_model.model.named_modules())
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, kinds)
        and id(module) in inside
        and id(modules[name.rpartition(".")[0]]) in inside
    }
    if not layers:
        raise SpaceError(
            f"recipe.lora: {model_name} has no linear layers that could have adapters between its "
            f"first {depth} stages and its head; leave lora out, or choose another model"
        )
    if options.targets == "auto":
        return layers
    chosen = {
        name: module
        for name, module in layers.items()
        if any(f".{name}".endswith(f".{target}") for target in options.targets)
    }
    for target in options.targets:
        if not any(f".{name}".endswith(f".{target}") for name in chosen):
            known = sorted({name.rpartition(".")[2] for name in layers})
            listed = ", ".join(limit_listing(known, 12))
            raise SpaceError(
                f"recipe.lora.targets: {model_name} has no layer {target!r} behind its first "
                f"{depth} stages{nearest_hint(target, known)}; it has {listed}"
            )
    return chosen


def conv1d_kinds(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """GPT-2's own linear layer, where the model is one of transformers'."""
    if not hasattr(model, "config"):
        return ()
    from transformers.pytorch_utils import Conv1D

    return (Conv1D,)


@torch.no_grad()
def called_modules(
    modules: Mapping[str, nn.Module], run_example: Callable[[], object]
) -> dict[str, nn.Module]:
    """Those of the modules that are called while examples are computed."""
    called: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(id(module)))
        for module in modules.values()
    ]
    try:
        run_example()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in modules.items() if id(module) in called}


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to the weights below it, after which there are none.

    A model of float32 loses nothing by this. Without adapters nothing changes.
    """
    for name, module in list(model.named_modules()):
        if not hasattr(module, "lora_A") or not hasattr(module, "merge"):
            continue
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@torch.no_grad()
def merged_state(
    model: nn.Module, state: Mapping[str, Tensor], options: LoraOptions
) -> dict[str, Tensor]:
    """The weights that a model has when adapters are added to its own.

    Args:
        model: The model, without adapters.
        state: Adapters, head and buffers, under the names that they have with adapters.
        options: The recipe of the adapters.

    Returns:
        What becomes different in the model, under the model's names.

    Raises:
        AttributeError: The adapters are those of another model.
    """
    merged = {name.replace(BASE, "."): v for name, v in state.items() if MARK not in name}
    for name, a in state.items():
        layer, mark, _ = name.partition(f"{MARK}A.")
        if not mark:
            continue
        b = state[f"{layer}{MARK}B.{ADAPTER}.weight"]
        module = model.get_submodule(layer)
        change = (b.float() @ a.float()) * (options.alpha / options.rank)
        if not isinstance(module, nn.Linear):  # GPT-2's matrices lie the other way round
            change = change.T
        weight: Tensor = module.weight  # type: ignore[assignment]
        merged[f"{layer}.weight"] = weight + change.to(weight)
    return merged
