"""Two functions of torchvision's detectors in a form that can be exported, and the patch for it.

torchvision's own versions ask how many boxes there are and then branch. An exported graph cannot
hold such a branch, because the number of boxes depends on the image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import boxes as box_ops
from torchvision.ops import poolers


@contextmanager
def patch_for_export() -> Iterator[None]:
    """Replace the two functions inside torchvision, and put the originals back at the end.

    Only for the time in which a model is exported: the replacements give the same results, but
    compute more.
    """
    originals = box_ops.batched_nms, poolers._multiscale_roi_align
    box_ops.batched_nms = suppress_within_classes
    poolers._multiscale_roi_align = pool_all_levels
    try:
        yield
    finally:
        box_ops.batched_nms, poolers._multiscale_roi_align = originals


def suppress_within_classes(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float
) -> Tensor:
    """Non-maximum suppression within each class, without a branch on the number of boxes.

    It uses torchvision's coordinate trick: it moves the boxes of each class so far away that boxes
    of different classes never overlap.

    Args:
        boxes: float (n, 4): left, top, right, bottom, in pixels.
        scores: float (n,).
        classes: int64 (n,).
        threshold: The intersection over union above which the box with the lower score is removed.

    Returns:
        int64 (m,): the indices of the boxes that stay, scores falling.
    """
    distance = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    kept_indices: Tensor = torch.ops.torchvision.nms(
        boxes + (classes.to(boxes) * distance)[:, None], scores, threshold
    )
    return kept_indices


def pool_all_levels(
    levels: list[Tensor],
    boxes: list[Tensor],
    size: Any,
    sampling: int,
    scales: list[float] | None,
    mapper: Any,
) -> Tensor:
    """The features of each region, from the level of the feature pyramid that fits its size.

    torchvision pools from each level only the regions that fit it. This version pools all regions
    from every level and selects afterwards, so that no shape depends on the regions.

    Args:
        levels: The feature maps, each (images, channels, height, width).
        boxes: The regions of each image, (regions, 4) in pixels.
        size: Height and width of the pooled features.
        sampling: Sampling points per output cell and direction.
        scales: The size of each level relative to the image.
        mapper: torchvision's `LevelMapper`: gives the level of each region.

    Returns:
        (regions of all images, channels, *size).
    """
    assert scales is not None
    regions = poolers._convert_to_roi_format(boxes)
    pooled_levels = [
        poolers.roi_align(level, regions, size, scale, sampling)
        for level, scale in zip(levels, scales, strict=True)
    ]
    level_of_region = mapper(boxes)
    pooled: Tensor = pooled_levels[0]
    for level, values in enumerate(pooled_levels[1:], 1):
        pooled = torch.where((level_of_region == level)[:, None, None, None], values, pooled)
    return pooled
