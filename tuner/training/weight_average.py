"""The exponential moving average of the weights of a net.

Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim.
30, 1992; with a decay that rises at first, as in TensorFlow's ExponentialMovingAverage. The average
of a training that ends at a high rate is what the same training reaches at a low one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tuner.core.adapters import trained_state


class WeightAverage:
    """The average of everything of `net` that is trained.

    Parameters and BatchNorm's running statistics are averaged, as timm and YOLOX do; integers, such
    as BatchNorm's count of batches, are copied. `tensors` has them by name; a tensor that has
    several names is there once.

    Args:
        net: What is trained. The average begins at its present weights.
        decay: The weight of the earlier average at each update, in [0, 1).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = net, decay
        self.tensors: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begins again at the present weights of the net."""
        self.tensors = {name: value.detach().clone() for name, value in self._own_tensors().items()}

    def _own_tensors(self) -> dict[str, Tensor]:
        """The tensors of the net, each under the first of its names."""
        names: dict[int, str] = {}
        own = {}
        for name, value in trained_state(self.net, keep_vars=True).items():
            if names.setdefault(id(value), name) == name:
                own[name] = value
        return own

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after `step` (from 1) of the optimizer.

        The decay of the first steps is (1 + step) / (10 + step), so that the average soon forgets
        where the training began.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for name, value in self._own_tensors().items():
            if value.is_floating_point():
                averages.append(self.tensors[name])
                values.append(value.detach())
            else:
                self.tensors[name].copy_(value)
        if averages:
            average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            average(averages, values, step)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights of the net and the average."""
        for name, value in self._own_tensors().items():
            average = self.tensors[name]
            latest = value.detach().clone()
            value.copy_(average)
            average.copy_(latest)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The net has the averaged weights inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes the average from a checkpoint. The names and shapes must be those of the net."""
        for name, value in tensors.items():
            self.tensors[name].copy_(value)
