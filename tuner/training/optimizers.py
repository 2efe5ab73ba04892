"""The optimizer of a recipe and its learning rate at each step."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tuner.config.run import Recipe
from tuner.core.types import StagedModel

# the embeddings that timm, the authors of BEiT and those of Swin leave out of weight decay, by the
# names that the libraries give them
UNDECAYED_NAMES = re.compile(
    r"(^|[._])("
    r"pos(ition(al)?)?_embed(ding)?s?|(abs|rel|absolute|relative)_pos(ition)?(_bias(_table)?)?"
    r"|relative_(position|attention)_bias(_table)?|rel_pos_[hw]|pos_embedding"
    r"|(cls|dist|reg|mask|class|register)_tokens?|class_embedding|layer_scale"
    r")([._]|$)"
)


def make_optimizer(
    net: nn.Module, recipe: Recipe, stage_rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over the parameters of `net`.

    SGD with momentum (Sutskever et al., ICML 2013), or AdamW (Loshchilov and Hutter, ICLR 2019).

    Args:
        net: What is trained. Its children are stages by name.
        recipe: The recipe.
        stage_rates: The factor of `recipe.lr` for the parameters of each stage; 1 for a stage that
            is not named.
    """
    groups = parameter_groups(net, recipe, stage_rates or {})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=recipe.lr,
            betas=(recipe.momentum, 0.999),
            weight_decay=recipe.weight_decay,
        )
    return torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )


def stage_rates(staged_model: StagedModel, recipe: Recipe) -> dict[str, float]:
    """The factor of `recipe.lr` for each stage, by the stage's name.

    With the distance d from the head it is layer_decay ** d, times head_lr for the head and
    backbone_lr for the backbone (discriminative rates: Howard and Ruder, ULMFiT, ACL 2018; the
    decay by layer: Clark et al., ELECTRA, ICLR 2020; Bao et al., BEiT, ICLR 2022). The distance
    does not depend on the freeze depth.
    """
    backbone = staged_model.backbone_stages
    rates = {}
    for number, name in enumerate(staged_model.stages):
        distance = len(staged_model.stages) - 1 - number
        rate = recipe.layer_decay**distance
        if distance == 0:
            rate *= recipe.head_lr
        if name in backbone:
            rate *= recipe.backbone_lr
        rates[name] = rate
    return rates


def parameter_groups(
    net: nn.Module, recipe: Recipe, stage_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The parameters of `net` in groups of equal rate and weight decay, for torch.optim.

    Without rates by stage and without weight decay there is one group. A parameter that several
    stages share belongs to the first of them.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        rate = stage_rates.get(name.partition(".")[0], 1.0)
        decay = recipe.weight_decay
        if not recipe.decay_norms and not is_decayed(name, parameter):
            decay = 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": recipe.lr * rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense for a parameter: a matrix or a kernel, and no embedding of
    positions or of a class token.
    """
    return parameter.ndim > 1 and not UNDECAYED_NAMES.search(name)


def lr_factor(recipe: Recipe, step: int, steps: int) -> float:
    """The factor of `recipe.lr` at `step` (from 0) of `steps`.

    It rises linearly during the warmup. Then it stays 1, or falls to 0 linearly or by a cosine.
    """
    warmup_steps = recipe.warmup * steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "linear":
        return max(0.0, (steps - step) / max(1.0, steps - warmup_steps))
    progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
