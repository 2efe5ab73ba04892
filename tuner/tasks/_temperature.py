"""Temperature scaling: one number that makes the probabilities of a classifier honest.

Logits are divided by a temperature T before the softmax (Guo et al., On Calibration of Modern
Neural Networks, ICML 2017). No class overtakes another, so predicted classes and accuracy stay. T
above 1 makes a model less sure of itself, T below 1 surer.
"""

import math

from torch import Tensor

from tuner.messages import TEMPERATURE_DIGITS

TEMPERATURES = (0.05, 20.0)  # the lowest and the highest
MAX_LOGITS = 500_000  # that are looked at, in float64; of more, every so many examples
STEPS = 50  # at most; Newton's method needs about 6
PRECISION = 1e-6  # of log T
LOWEST_LOGIT = -1e4  # below the highest of its example; lower ones, such as -inf, have no share


def fit_temperature(logits: Tensor, truth: Tensor) -> float:
    """The temperature that minimises the sum of the log losses plus (log T)^2 / 2, in nats.

    The second term is a prior, that T is about 1. It decides only where there are few examples or
    all of them are right: there the log loss alone would go on falling down to T = 0. Newton's
    method finds log T, by bisection where a step would leave the interval that holds it.

    Args:
        logits: float (n, classes), on the CPU.
        truth: int64 (n,), the true classes.

    Returns:
        T within TEMPERATURES, rounded to TEMPERATURE_DIGITS. Equal logits give an equal T.
    """
    stride = math.ceil(logits.numel() / MAX_LOGITS)
    z, truth = logits[::stride].double(), truth[::stride]
    z = (z - z.max(1, keepdim=True).values).clamp(min=LOWEST_LOGIT)
    true_sum = float(z.gather(1, truth[:, None]).sum())
    low, high = map(math.log, TEMPERATURES)
    log_t = 0.0
    for _ in range(STEPS):
        slope, curvature = _derivatives(z, true_sum, log_t)
        low, high = (low, log_t) if slope > 0 else (log_t, high)
        newton = log_t - slope / curvature if curvature > 0 else math.inf
        following = newton if low < newton < high else (low + high) / 2
        converged = abs(following - log_t) < PRECISION
        log_t = following
        if converged:
            break
    return round(math.exp(log_t), TEMPERATURE_DIGITS)


def _derivatives(z: Tensor, true_sum: float, log_t: float) -> tuple[float, float]:
    """The first and the second derivative, by log T, of what `fit_temperature` minimises."""
    inverse = math.exp(-log_t)
    probabilities = (z * inverse).softmax(1)
    weighted = probabilities.mul_(z)
    mean = weighted.sum(1)
    excess = inverse * (float(mean.sum()) - true_sum)
    variance = inverse**2 * float((weighted.mul_(z).sum(1) - mean.square()).sum())
    return log_t - excess, 1 + excess + variance
