"""The optimizer of a recipe and its learning rate at each step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from tuner.config.run import Recipe


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer that the recipe names.

    SGD with momentum (Sutskever et al., ICML 2013), or AdamW (Loshchilov and Hutter, ICLR 2019).
    """
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=recipe.lr,
            betas=(recipe.momentum, 0.999),
            weight_decay=recipe.weight_decay,
        )
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )


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
