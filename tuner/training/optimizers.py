"""The optimizer of a recipe and its learning rate at each step."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tuner.config.run import Recipe
from tuner.core.adapters import MARK, trained_parameters
from tuner.core.types import StagedModel

# SGD with momentum: Sutskever et al., ICML 2013. Adam and Adamax: Kingma and Ba, ICLR 2015. AdamW:
# Loshchilov and Hutter, ICLR 2019. NAdam: Dozat, ICLR workshop 2016. RAdam: Liu et al., ICLR 2020.
# Adagrad: Duchi et al., JMLR 12, 2011. RMSprop: Tieleman and Hinton, Coursera 2012. Adadelta:
# Zeiler, arXiv 1212.5701, 2012. Adafactor: Shazeer and Stern, ICML 2018.
# Not here: LBFGS and Rprop want the gradient of all examples, and SparseAdam sparse ones. ASGD
# takes SGD's steps and keeps an average that nothing reads; `ema` averages the weights. Muon trains
# matrices alone, and weights that Adam has pretrained, as most are, become worse with it than with
# Adam (Qu et al., Can Muon Fine-tune Adam-Pretrained Models?, ICML 2026).
OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
}
FUSED = ("sgd", "adam", "adamw")  # those with a fused implementation on CUDA devices
ADAM_BETA2 = 0.999  # torch's own
# the embeddings that timm, the authors of BEiT and those of Swin leave out of weight decay, by the
# names that the libraries give them
UNDECAYED_NAMES = re.compile(
    r"(^|[._])("
    r"pos(ition(al)?)?_embed(ding)?s?|embed_positions|wpe"
    r"|(abs|rel|absolute|relative)_pos(ition)?(_bias(_table)?)?"
    r"|relative_(position|attention)_bias(_table)?|rel_pos_[hw]|pos_embedding"
    r"|(cls|dist|reg|mask|class|register)_tokens?|class_embedding|layer_scale"
    r")([._]|$)"
)


START_OF_CYCLE = 1 / 25  # of lr: fastai's and torch's div_factor
CYCLED_MOMENTUM = 0.1  # fastai's momentum falls from 0.95 to 0.85 and rises again
POLYNOMIAL_POWER = 0.9  # DeepLab's and torchvision's; with 1 it would be linear
MAX_WARMUP_SHARE = 0.5


def make_optimizer(
    net: nn.Module, recipe: Recipe, stage_rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over the parameters of `net`.

    On CUDA devices it is torch's fused implementation where there is one.

    Args:
        net: What is trained. Its children are stages by name.
        recipe: The recipe.
        stage_rates: The factor of `recipe.lr` for the parameters of each stage; 1 for a stage that
            is not named.
    """
    groups = parameter_groups(net, recipe, stage_rates or {})
    kind = OPTIMIZERS[recipe.optimizer]
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    fused = {"fused": True} if on_cuda and recipe.optimizer in FUSED else {}
    arguments = optimizer_arguments(recipe) | fused
    optimizer: torch.optim.Optimizer = kind(groups, lr=recipe.lr, **arguments)
    return optimizer


def make_scaler(
    optimizer: torch.optim.Optimizer, device: torch.device, precision: str
) -> torch.amp.GradScaler | None:
    """What scales the loss so that gradients in float16 do not become 0; None with another
    precision.

    A step whose gradients are not finite is left out, and the scale is halved (Micikevicius et
    al., Mixed Precision Training, ICLR 2018). The schedule counts it all the same.
    """
    if precision != "float16":
        return None
    # torch would warn where the first step is left out
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return torch.amp.GradScaler(device.type)


def optimizer_arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments of the recipe's optimizer besides the rate and the decay of each group."""
    name, momentum = recipe.optimizer, recipe.momentum
    own = {} if recipe.epsilon is None else {"eps": recipe.epsilon}
    if name == "sgd":
        return {"momentum": momentum, "nesterov": recipe.nesterov and momentum > 0}
    if name == "adafactor":
        return {}
    if name == "adagrad":
        return own
    if name == "adadelta":
        return own | ({} if recipe.beta2 is None else {"rho": recipe.beta2})
    if name == "rmsprop":
        alpha = {} if recipe.beta2 is None else {"alpha": recipe.beta2}
        return own | alpha | {"momentum": momentum}
    decoupled = {"decoupled_weight_decay": True} if name in ("nadam", "radam") else {}
    beta2 = ADAM_BETA2 if recipe.beta2 is None else recipe.beta2
    return own | decoupled | {"betas": (momentum, beta2)}


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
    """The trained parameters of `net` in groups of equal rate and weight decay, for torch.optim.

    Without rates by stage and without weight decay there is one group. A parameter that several
    stages share belongs to the first of them. The module `auxiliary` of a stage is an auxiliary
    classifier (torchvision's FCN and DeepLabV3 have one in their head).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(net).items():
        rate = stage_rates.get(name.partition(".")[0], 1.0)
        factor = part_rate(name, recipe)
        if factor != 1:
            rate *= factor
        decay = recipe.weight_decay
        if not recipe.decay_norms and not is_decayed(name, parameter):
            decay = 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": recipe.lr * rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def part_rate(name: str, recipe: Recipe) -> float:
    """The factor of the rate for a part of a stage: an auxiliary classifier, or an adapter."""
    if ".auxiliary." in name:
        return recipe.auxiliary_lr
    if MARK in name and recipe.adapters is not None:
        return recipe.adapters.lr
    return 1.0


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense for a parameter: a matrix or a kernel, and no embedding of
    positions or of a class token.
    """
    return parameter.ndim > 1 and not UNDECAYED_NAMES.search(name)


def make_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of the recipe over `steps` steps; it counts the steps of the optimizer.

    With onecycle the momentum changes too. It follows from the step, so it needs no saving.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(recipe, step, steps)
    )
    if recipe.schedule == "onecycle":
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: set_momentum(
                optimizer, momentum_at(recipe, schedule.last_epoch, steps)
            )
        )
    return schedule


def lr_factor(recipe: Recipe, step: int, steps: int) -> float:
    """The factor of `recipe.lr` at `step` (from 0) of `steps`.

    It rises linearly during the warmup. Then it stays 1, or falls to min_lr linearly, by a power of
    what is left (Chen et al., DeepLab, TPAMI 2018), or by a cosine (Loshchilov and Hutter, SGDR,
    ICLR 2017). With onecycle (Smith and Topin, Super-Convergence, 2018) it rises by a cosine too,
    from START_OF_CYCLE.
    """
    warmup_steps = count_warmup_steps(recipe, steps)
    if step < warmup_steps and recipe.schedule == "onecycle":
        return START_OF_CYCLE + (1 - START_OF_CYCLE) * _half_cosine(1 - step / warmup_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if recipe.schedule == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(1.0, steps - warmup_steps))
    progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    factors = {
        "linear": left,
        "polynomial": math.pow(left, POLYNOMIAL_POWER),
        "cosine": _half_cosine(progress),
        "onecycle": _half_cosine(progress),
    }
    return recipe.min_lr + (1 - recipe.min_lr) * factors[recipe.schedule]


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def count_warmup_steps(recipe: Recipe, steps: int) -> float:
    """The steps of the warmup: a share of all, or a number of its own, which is cut at the largest
    share so that the rate is reached.
    """
    if isinstance(recipe.warmup, int):
        return min(recipe.warmup, MAX_WARMUP_SHARE * steps)
    return recipe.warmup * steps


def momentum_at(recipe: Recipe, step: int, steps: int) -> float:
    """The momentum of onecycle: `recipe.momentum` at the ends, CYCLED_MOMENTUM less at the peak."""
    warmup_steps = count_warmup_steps(recipe, steps)
    if step < warmup_steps:
        height = _half_cosine(1 - step / warmup_steps)
    else:
        height = _half_cosine((step - warmup_steps) / max(1.0, steps - warmup_steps))
    return max(0.0, recipe.momentum - CYCLED_MOMENTUM * height)


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Sets the momentum or the first beta of every group that has one."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif "momentum" in group:
            group["momentum"] = momentum
