"""From a recipe to an optimizer and its learning rate at each step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from tuner.config.run import Recipe


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum (Sutskever et al., ICML 2013), or AdamW (Loshchilov and Hutter, ICLR 2019)."""
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
    """The share of `recipe.lr` at `step` (from 0) of `steps`: linear warmup, then constant, or linear or cosine to 0."""
    warm = recipe.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "linear":
        return max(0.0, (steps - step) / max(1.0, steps - warm))
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))
