"""Losses that more than one task uses."""

import torch.nn.functional as F
from torch import Tensor


def mean_cross_entropy(
    logits: Tensor, targets: Tensor, ignored: int, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy, mean over the targets that count; 0, with gradients of 0, where none does.

    Where some count it is PyTorch's `cross_entropy` with `ignore_index`, which divides 0 by 0 where
    none does.

    Args:
        logits: float (n, classes, ...).
        targets: int64 (n, ...), `ignored` where a target does not count.
        ignored: the value of targets that do not count.
        label_smoothing: the share of each target that is spread over all classes.

    Returns:
        float, a scalar.
    """
    total = F.cross_entropy(
        logits, targets, ignore_index=ignored, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (targets != ignored).sum().clamp_min(1)
