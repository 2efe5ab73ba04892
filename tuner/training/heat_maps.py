"""Heat maps: which parts of an image speak for the class that a model gives it.

Grad-CAM (Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization, ICCV 2017): the feature maps before the head are weighted by the mean of the class's
gradient, added up, and what is below 0 is left out. The stages at which a model is frozen are where
it is cut here, so every model that can be frozen to its last feature map has one.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.core.export_module import ExportModule
from tuner.core.types import StagedModel
from tuner.errors import SpaceError

STRENGTH = 0.65  # how much of the image the hottest places hide


def heat_maps(model: ExportModule, x: Tensor, classes: Tensor) -> Tensor:
    """The heat map of each image for a class of it.

    Args:
        model: The exported model, with logits (n, classes) as its output.
        x: float32 (n, 3, side, side), RGB in 0..1.
        classes: int64 (n,).

    Returns:
        float32 (n, side, side) in 0..1.

    Raises:
        SpaceError: The model has no feature map before its head.
    """
    inputs = (x - model.mean) / model.std if model.has_normalisation else x
    prefix, suffix = split_at_features(model.staged[0], inputs)
    with torch.no_grad():
        features = prefix(inputs)
    features = features.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = suffix(features)
        chosen = logits[torch.arange(len(x)), classes].sum()
        (gradient,) = torch.autograd.grad(chosen, features)
    maps, slopes = as_maps(features.detach()), as_maps(gradient)
    weighted = (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    highest = weighted.amax((2, 3), keepdim=True).clamp(min=1e-12)
    side = x.shape[-1]
    scaled = F.interpolate(weighted / highest, (side, side), mode="bilinear", align_corners=False)
    return scaled[:, 0]


def split_at_features(staged: StagedModel, inputs: Tensor) -> tuple[nn.Module, nn.Module]:
    """The model in two parts, between which is its last feature map. Raises SpaceError."""
    for depth in range(staged.max_depth, 0, -1):
        prefix, suffix = staged.split(depth)
        with torch.no_grad():
            features = prefix(inputs[:1])
        if isinstance(features, Tensor) and as_maps(features).shape[-1] > 1:
            return prefix.eval(), suffix.eval()
    raise SpaceError(
        "--explain: this model has no feature map before its head, so there is no heat map"
    )


def as_maps(features: Tensor) -> Tensor:
    """Features as maps, (n, channels, height, width); those of patches (n, patches, channels) as a
    square, without the tokens that come before them. Others are a map of one place.
    """
    if features.ndim == 4:
        _, height, width, last = features.shape
        is_channels_last = height == width != last  # as in Swin
        return features.permute(0, 3, 1, 2) if is_channels_last else features
    if features.ndim != 3:
        return features.flatten(1)[:, :, None, None]
    side = math.isqrt(features.shape[1])
    patches = features[:, features.shape[1] - side * side :]
    return patches.transpose(1, 2).reshape(features.shape[0], -1, side, side)


def draw_heat_map(pixels: Tensor, heat: Tensor) -> bytes:
    """A heat map over its image, as PNG.

    Args:
        pixels: float32 (3, side, side), RGB in 0..1.
        heat: float32 (side, side) in 0..1.
    """
    share = (STRENGTH * heat)[None]
    colour = torch.stack([torch.ones_like(heat), 0.75 * heat, torch.zeros_like(heat)])
    mixed = (1 - share) * pixels + share * colour
    array = (mixed.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(out, "PNG")
    return out.getvalue()
