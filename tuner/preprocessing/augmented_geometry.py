"""The geometry of an augmentation: which affine transform an image gets in a view."""

import math

import torch
from torch import Tensor

from tuner.config.augmentation import AugmentationPolicy
from tuner.core.geometry import AffineTransform
from tuner.preprocessing.random_draws import RandomDraws

MAX_LOG_ASPECT = math.log(4 / 3)  # of a random resized crop
ZOOM_OUT_SHARE = 0.5
IOU_CROP_TRIES = 40
MIN_CROP_SIDE = 0.3  # of an IoU crop, as a share of the canvas
MAX_ASPECT = 2.0  # of an IoU crop
MIN_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of an IoU crop; 1: the image stays whole


def has_geometry(policy: AugmentationPolicy) -> bool:
    """Whether a policy moves pixels by an affine transform."""
    return bool(
        policy.needs_surroundings
        or policy.flip
        or policy.vertical_flip
        or policy.zoom_out > 1
        or policy.mosaic
    )


def draw_transform(
    policy: AugmentationPolicy,
    draws: RandomDraws,
    old_side: int,
    side: int,
    boxes: Tensor | None = None,
) -> AffineTransform:
    """The transform of each image of a batch.

    Args:
        policy: what is drawn.
        draws: the random numbers.
        old_side: the side of the stored images in pixels.
        side: the side of the examples in pixels.
        boxes: float32 (n, k, 4) on the CPU, the boxes of the images, with boxes of 0 as padding;
            needed for IoU crops alone.

    Returns:
        The transform, on the CPU.
    """
    total = torch.eye(3).repeat(len(draws.rows), 1, 1)
    if policy.zoom_out > 1:
        total = total @ _zoom_out(policy, draws, old_side)
    if policy.iou_crop and boxes is not None:
        moved, _ = AffineTransform(total[:, :2], old_side, old_side).move_boxes(boxes)
        total = total @ _iou_crop(draws, old_side, moved)
    total = total @ _crop_and_scale(policy, draws, old_side, side)
    if policy.rotation:
        total = total @ _rotation(policy, draws, side)
    total = total @ _flips(policy, draws, side)
    return AffineTransform(total[:, :2].contiguous(), old_side, side)


def to_matrix(scale: Tensor, shift: Tensor) -> Tensor:
    """The matrix (n, 3, 3) of x -> scale * x + shift; both are (n, 2) for x and y."""
    matrix = torch.zeros(len(scale), 3, 3)
    matrix[:, [0, 1], [0, 1]] = scale
    matrix[:, :2, 2] = shift
    matrix[:, 2, 2] = 1
    return matrix


def _zoom_out(policy: AugmentationPolicy, draws: RandomDraws, side: int) -> Tensor:
    """SSD's zoom out: Liu et al., ECCV 2016."""
    factor = draws.uniform("zoom_out.factor", 1, policy.zoom_out)
    factor = factor.where(draws.chosen("zoom_out", ZOOM_OUT_SHARE)[:, None], 1.0)
    position = draws.uniform("zoom_out.position", count=2)
    return to_matrix(factor.expand(-1, 2), position * (1 - factor) * side)


def _iou_crop(draws: RandomDraws, side: int, boxes: Tensor) -> Tensor:
    """SSD's crops: Liu et al., ECCV 2016.

    Of IOU_CROP_TRIES crops the first is taken that has the centre of a box in it and overlaps one
    of the boxes whose centre it has by the least IoU that was drawn. Where none does, the image
    stays whole.
    """
    n = len(boxes)
    sides = draws.uniform("iou_crop.sides", MIN_CROP_SIDE, 1, 2 * IOU_CROP_TRIES).view(n, -1, 2)
    positions = draws.uniform("iou_crop.position", count=2 * IOU_CROP_TRIES).view(n, -1, 2)
    low = positions * (1 - sides) * side
    crops = torch.cat([low, low + sides * side], 2)  # (n, tries, 4)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    has_centre = (
        (centres[:, None] > crops[:, :, None, :2]) & (centres[:, None] < crops[:, :, None, 2:])
    ).all(3) & (boxes[..., 2] > boxes[..., 0])[:, None]
    aspect = sides[..., 0] / sides[..., 1]
    options = torch.tensor(MIN_IOUS)[draws.integers("iou_crop.least", len(MIN_IOUS))]  # (n, 1)
    overlap = _pairwise_iou(crops, boxes).where(has_centre, -1.0).amax(2)
    is_valid = (overlap >= options) & (aspect <= MAX_ASPECT) & (aspect >= 1 / MAX_ASPECT)
    is_valid &= options < 1
    first = is_valid.int().argmax(1)
    chosen = crops[torch.arange(n), first]
    whole = torch.tensor([0.0, 0.0, side, side]).expand(n, 4)
    crop = chosen.where(is_valid.any(1)[:, None], whole)
    return to_matrix((crop[:, 2:] - crop[:, :2]) / side, crop[:, :2])


def _pairwise_iou(crops: Tensor, boxes: Tensor) -> Tensor:
    """The IoU of each crop, (n, tries, 4), with each box, (n, k, 4): (n, tries, k)."""
    low = torch.maximum(crops[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(crops[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (high - low).clamp_min(0).prod(3)
    areas = [(sides[..., 2:] - sides[..., :2]).prod(2) for sides in (crops, boxes)]
    return shared / (areas[0][:, :, None] + areas[1][:, None] - shared)


def _crop_and_scale(
    policy: AugmentationPolicy, draws: RandomDraws, old_side: int, side: int
) -> Tensor:
    """The part of the canvas that becomes the example.

    The crop is Inception's (Szegedy et al., CVPR 2015), with a log-uniform aspect ratio; what is
    longer than the canvas is cut off.
    """
    n = len(draws.rows)
    extent = torch.full((n, 2), float(side))
    if policy.crop is not None:
        area = draws.uniform("crop.area", policy.crop, 1)
        log_aspect = draws.uniform("crop.aspect", -MAX_LOG_ASPECT, MAX_LOG_ASPECT)
        half = torch.cat([log_aspect, -log_aspect], 1) / 2
        extent = (area.sqrt() * half.exp()).clamp_max(1) * old_side
    if policy.scale:
        extent = extent / draws.uniform("scale", 1 - policy.scale, 1 + policy.scale)
    position = torch.full((n, 2), 0.5)
    if policy.crop is not None or policy.scale:
        position = draws.uniform("crop.position", count=2)
    return to_matrix(extent / side, position * (old_side - extent))


def _rotation(policy: AugmentationPolicy, draws: RandomDraws, side: int) -> Tensor:
    """A rotation about the centre."""
    largest = math.radians(policy.rotation)
    return rotation_matrix(draws.uniform("rotation", -largest, largest)[:, 0], side)


def rotation_matrix(angle: Tensor, side: int) -> Tensor:
    """Rotations by angles in radians, (n,), about the centre: (n, 3, 3)."""
    cos, sin = angle.cos(), angle.sin()
    matrix = to_matrix(torch.stack([cos, cos], 1), torch.zeros(len(angle), 2))
    matrix[:, 0, 1], matrix[:, 1, 0] = -sin, sin
    return about_centre(matrix, side)


def about_centre(matrix: Tensor, side: int) -> Tensor:
    """The same linear map, (n, 3, 3), about the centre of an image instead of its corner."""
    ones = torch.ones(1, 2)
    there, back = to_matrix(ones, -ones * side / 2), to_matrix(ones, ones * side / 2)
    return back @ matrix @ there


def _flips(policy: AugmentationPolicy, draws: RandomDraws, side: int) -> Tensor:
    flags = [
        draws.chosen(name, 0.5) & is_on
        for name, is_on in (("flip", policy.flip), ("vertical_flip", policy.vertical_flip))
    ]
    is_flipped = torch.stack(flags, 1).float()
    return to_matrix(1 - 2 * is_flipped, is_flipped * side)
