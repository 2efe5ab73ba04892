"""BatchNorm's statistics while a pretrained network is trained: frozen, or adapting.

In eval mode BatchNorm normalises by running statistics, at first those of the pretraining; in train
mode by those of each batch. The head of a linear probe fits the first kind of features and not the
second. So an epoch in train mode loses the probe's score although hardly a weight has changed. Both
ways here begin with what the probe found:

- frozen: BatchNorm stays in eval mode. Its scale and shift are trained.
- adapt: before the first step the running statistics become those of the training examples, and
  scale and shift change so that the network in eval mode computes what it computed before. The
  statistics of a batch are then near the running ones, and BatchNorm trains as usual.

An average of several networks (`soup`) needs statistics of its own, which are estimated anew.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuner.config.run import Recipe

CALIBRATION_EXAMPLES = 512  # training examples from which the statistics are computed
MIN_ADAPT_BATCH = 16  # examples; `auto` trusts the statistics of batches from this size on
MAX_MOMENTUM = 0.1  # torch's own default; less for batches below QUIET_BATCH, which are noisier
QUIET_BATCH = 64  # examples
MIN_MOMENTUM = 0.02


def pretrained_norms(net: nn.Module) -> tuple[_BatchNorm, ...]:
    """The BatchNorm modules whose running statistics come from pretraining.

    A new module has the mean 0 and the variance 1 in every channel. It trains as torch trains it,
    because its statistics mean nothing yet.
    """
    return tuple(
        module
        for module in net.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
        and not (_is_constant(module.running_mean, 0.0) and _is_constant(module.running_var, 1.0))
    )


def _is_constant(values: Tensor, constant: float) -> bool:
    return bool((values == constant).all())


def statistics_adapt(recipe: Recipe) -> bool:
    """Whether the statistics of pretrained BatchNorm adapt to the training examples.

    Below adapters they do not: the layers there stay as they are.
    """
    if recipe.adapters is not None:
        return False
    if recipe.batchnorm == "auto":
        return recipe.batch_size >= MIN_ADAPT_BATCH
    return recipe.batchnorm == "adapt"


def set_train_mode(net: nn.Module, norms: Iterable[_BatchNorm], recipe: Recipe, steps: int) -> None:
    """Sets a network to train mode, its pretrained BatchNorm only where the statistics adapt.

    `steps` is the number of batches of an epoch. The running statistics average over about half an
    epoch, so that they follow the weights, and over more where single batches are noisy.
    """
    net.train()
    loudest = MAX_MOMENTUM * min(1.0, recipe.batch_size / QUIET_BATCH)
    momentum = min(loudest, max(MIN_MOMENTUM, 2 / steps))
    for module in norms:
        module.train(statistics_adapt(recipe) and _can_adapt(module))
        module.momentum = momentum


def adopt_statistics(
    net: nn.Module, norms: Iterable[_BatchNorm], run_examples: Callable[[], object]
) -> None:
    """Replaces running statistics by those of some examples and keeps the network's outputs.

    For a channel with the mean m and the standard deviation s, and new ones m' and s', the scale g
    becomes g s' / s, and the shift b becomes b + g (m' - m) / s. In eval mode both networks compute
    g (x - m) / s + b. A module without scale and shift stays as it is.

    Args:
        net: The network. It is changed in place and left in eval mode.
        norms: Its pretrained BatchNorm modules.
        run_examples: Sends the examples through the network.
    """
    sums = {module: _ChannelSums() for module in norms if _can_adapt(module)}
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: sums[module].add(inputs[0]))
        for module in sums
    ]
    net.eval()
    try:
        with torch.no_grad():
            run_examples()
    finally:
        for hook in hooks:
            hook.remove()
    for module, channel_sums in sums.items():
        if channel_sums.count:  # a module may be called in train mode only
            _replace_statistics(module, *channel_sums.moments())


def norms_with_statistics(net: nn.Module) -> tuple[_BatchNorm, ...]:
    """The BatchNorm modules that have running statistics."""
    return tuple(
        module
        for module in net.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    )


def estimate_statistics(
    net: nn.Module, norms: Iterable[_BatchNorm], run_examples: Callable[[], object]
) -> None:
    """Makes running statistics the mean of those of batches, all else in eval mode.

    Scale and shift stay, so the outputs change. The variance of a batch is the unbiased one, as in
    torch.optim.swa_utils.update_bn.

    Args:
        net: The network. It is changed in place and left in eval mode.
        norms: Modules with running statistics.
        run_examples: Sends batches through the network, of more than one value for each channel.
    """
    net.eval()
    momenta = [(module, module.momentum) for module in norms]
    for module, _ in momenta:
        module.reset_running_stats()
        module.momentum = None  # the mean of all batches
        module.train()
    try:
        with torch.no_grad():
            run_examples()
    finally:
        for module, momentum in momenta:
            module.momentum = momentum
        net.eval()


def _can_adapt(module: _BatchNorm) -> bool:
    return module.weight is not None and module.bias is not None


class _ChannelSums:
    """Sums over the inputs of a BatchNorm, by channel, in float64 so that no digits are lost."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.total_of_squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Adds a batch (n, channels, ...)."""
        values = x.detach().transpose(0, 1).flatten(1).to(_sum_dtype(x))
        self.count += values.shape[1]
        self.total = values.sum(1) + self.total.to(values)
        self.total_of_squares = values.square().sum(1) + self.total_of_squares.to(values)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel, (channels,)."""
        mean = self.total / self.count
        variance = self.total_of_squares / self.count - mean.square()
        return mean, variance.clamp(min=0)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64


@torch.no_grad()
def _replace_statistics(module: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert module.running_mean is not None and module.running_var is not None
    old_deviation = (module.running_var.to(variance.dtype) + module.eps).sqrt()
    new_deviation = (variance + module.eps).sqrt()
    scale = module.weight.to(variance.dtype)
    shift = scale * (mean - module.running_mean.to(mean.dtype)) / old_deviation
    module.bias.add_(shift)
    module.weight.copy_(scale * new_deviation / old_deviation)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance)
