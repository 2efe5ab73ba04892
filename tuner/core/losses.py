"""Losses that more than one task uses."""

import torch
import torch.nn.functional as F
from torch import Tensor

EFFECTIVE_NUMBER_BETA = 0.999  # of Cui et al.; near 1, classes of up to 1,000 examples still differ
MIN_MISS = 1e-6  # of a focal loss: below it, the power of a small gamma has too steep a slope


def mean_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignored: int,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, mean over the targets that count; 0, with gradients of 0, where none does.

    Where some count it is PyTorch's `cross_entropy` with `ignore_index`, which divides 0 by 0 where
    none does.

    Args:
        logits: float (n, classes, ...).
        targets: int64 (n, ...), `ignored` where a target does not count.
        ignored: the value of targets that do not count.
        label_smoothing: the share of each target that is spread over all classes.
        class_weights: float (classes,), the weight of a target by its class; None: all count alike.

    Returns:
        float, a scalar.
    """
    counted = targets != ignored
    if class_weights is None:
        total = F.cross_entropy(
            logits, targets, ignore_index=ignored, label_smoothing=label_smoothing, reduction="sum"
        )
    else:
        losses = F.cross_entropy(
            logits, targets, ignore_index=ignored, label_smoothing=label_smoothing, reduction="none"
        )
        total = (losses * class_weights[targets.where(counted, 0)]).sum()
    return total / counted.sum().clamp_min(1)


def weights_of_classes(counts: Tensor, kind: str) -> Tensor | None:
    """The weight of each class in a loss, so that rare classes count as much as common ones.

    They are scaled so that the mean over the training examples is 1: the loss keeps its size, and
    a learning rate its meaning.

    Args:
        counts: int64 (classes,), the number of training examples of each class.
        kind: `none`; `balanced`: the inverse of the number of examples; `effective_number`: the
            inverse of the effective number of examples, which grows more and more slowly with their
            number (Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR
            2019).

    Returns:
        float32 (classes,); None for `none`.
    """
    if kind == "none":
        return None
    present = counts.clamp_min(1).double()  # the weight of an absent class is never used
    if kind == "balanced":
        weights = 1 / present
    else:
        weights = (1 - EFFECTIVE_NUMBER_BETA) / (1 - EFFECTIVE_NUMBER_BETA**present)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def class_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    focal_gamma: float = 0.0,
    example_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, mean over the examples; PyTorch's own without the last three arguments.

    The mean is over examples and not over weights, so that a batch in parts has the gradient of the
    whole batch.

    Args:
        logits: float (n, classes).
        targets: int64 (n,).
        label_smoothing: the share of each target that is spread over all classes.
        class_weights: float (classes,), the weight of an example by its class.
        focal_gamma: each example is weighed by (1 - probability of its class) to this power, so
            that hard examples count more (Lin et al., Focal Loss for Dense Object Detection, ICCV
            2017); 0: all examples count alike.
        example_weights: float (n,), how much each example counts beside that; None: all alike.

    Returns:
        float, a scalar.
    """
    if class_weights is None and focal_gamma == 0 and example_weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    if focal_gamma > 0:
        miss = -torch.expm1(-F.cross_entropy(logits, targets, reduction="none"))
        losses = losses * miss.clamp_min(MIN_MISS) ** focal_gamma
    if class_weights is not None:
        losses = losses * class_weights[targets]
    return weighted_mean(losses, example_weights)


def weighted_mean(losses: Tensor, example_weights: Tensor | None) -> Tensor:
    """The sum of the weighted losses, divided by the number of examples: a scalar.

    It is not divided by the sum of the weights, so that a batch in parts has the gradient of the
    whole batch. The weights of a dataset have a mean of 1.

    Args:
        losses: float (n,), the loss of each example.
        example_weights: float (n,); None: all examples count alike.
    """
    return (losses if example_weights is None else losses * example_weights).mean()
