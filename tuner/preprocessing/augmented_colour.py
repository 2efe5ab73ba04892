"""The colours of an augmentation, blur and erasing; on batches of pixels.

Pixels are float32 (n, 3, side, side) in 0..255 on any device. The random numbers are on the CPU, so
that the same images get the same ones on every device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.config.augmentation import AugmentationPolicy
from tuner.core.device_transfers import send
from tuner.preprocessing.random_draws import RandomDraws

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue
BLUR_SHARE = 0.5
MIN_BLUR = 0.1  # smallest standard deviation, pixels
ERASED_AREA = (0.02, 0.33)  # share of the image: Zhong et al., AAAI 2020
MAX_ERASED_LOG_ASPECT = math.log(3.3)
ERASED_GREY = 114.0


def change_colours(policy: AugmentationPolicy, draws: RandomDraws, pixels: Tensor) -> Tensor:
    """Changes brightness, then contrast, then saturation, then hue."""
    brightness, contrast, saturation = (
        policy.colour if value is None else value
        for value in (policy.brightness, policy.contrast, policy.saturation)
    )
    if not (brightness or contrast or saturation or policy.hue):
        return pixels

    def draw(name: str, largest: float) -> Tensor:
        return draws.uniform(name, -largest, largest)[:, 0]

    return adjust_colours(
        pixels,
        brightness=1 + draw("brightness", brightness),
        contrast=1 + draw("contrast", contrast),
        saturation=1 + draw("saturation", saturation),
        angle=2 * math.pi * draw("hue", policy.hue),
    )


def adjust_colours(
    pixels: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, angle: Tensor
) -> Tensor:
    """Pixels with other brightness, contrast, saturation (factors) and hue (angle in radians).

    All four are linear in the pixels, so they are one matrix for each image. The hue is turned
    around the grey axis of RGB.
    """
    weights = torch.tensor(GREY_WEIGHTS)
    identity = torch.eye(3)
    to_grey = torch.ones(3, 1) @ weights[None]
    turn = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    hue = cos * identity + (1 - cos) / 3 + sin * turn
    kept = saturation[:, None, None]
    matrix = hue @ (kept * identity + (1 - kept) * to_grey)
    matrix = matrix * (brightness * contrast)[:, None, None]
    device = pixels.device
    mean_grey = pixels.mean((2, 3)) @ send(weights, device)
    offset = send((1 - contrast) * brightness, device) * mean_grey
    changed = torch.baddbmm(offset[:, None, None], send(matrix, device), pixels.flatten(2))
    return changed.clamp_(0, 255).view_as(pixels)


def blur(policy: AugmentationPolicy, draws: RandomDraws, pixels: Tensor) -> Tensor:
    """Blurs half of the images by Gaussians."""
    if not policy.blur:
        return pixels
    chosen = draws.chosen("blur", BLUR_SHARE).nonzero()[:, 0]
    deviation = draws.uniform("blur.deviation", min(MIN_BLUR, policy.blur), policy.blur)[chosen]
    radius = max(1, math.ceil(2 * policy.blur))
    taps = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (taps / deviation) ** 2)
    kernel = send(kernel / kernel.sum(1, keepdim=True), pixels.device)
    chosen = send(chosen, pixels.device)
    result = pixels[chosen]
    for dim in (2, 3):
        padding = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = F.pad(result, padding, mode="replicate")
        length = result.shape[dim]
        result = sum(  # type: ignore[assignment]
            padded.narrow(dim, tap, length) * kernel[:, tap, None, None, None]
            for tap in range(2 * radius + 1)
        )
    return pixels.index_copy(0, chosen, result)


def erase(policy: AugmentationPolicy, draws: RandomDraws, pixels: Tensor) -> Tensor:
    """Erases a rectangle of some images: Zhong et al., Random Erasing, AAAI 2020."""
    if not policy.erasing:
        return pixels
    side = pixels.shape[-1]
    area = draws.uniform("erasing.area", *ERASED_AREA)
    log_aspect = draws.uniform("erasing.aspect", -MAX_ERASED_LOG_ASPECT, MAX_ERASED_LOG_ASPECT)
    half = torch.cat([log_aspect, -log_aspect], 1) / 2
    extent = (area.sqrt() * half.exp()).clamp_max(1) * side
    extent = extent * draws.chosen("erasing", policy.erasing)[:, None]
    low = draws.uniform("erasing.position", count=2) * (side - extent)
    low, high = send(low, pixels.device), send(low + extent, pixels.device)
    position = torch.arange(side, device=pixels.device) + 0.5
    inside = (position >= low[..., None]) & (position < high[..., None])  # (n, 2, side)
    erased = inside[:, 1, :, None] & inside[:, 0, None, :]
    return pixels.masked_fill(erased[:, None], ERASED_GREY)
