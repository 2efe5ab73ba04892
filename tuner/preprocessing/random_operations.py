"""TrivialAugment and RandAugment: random operations on batches of pixels.

The operations and their strengths are those of torchvision. Translations are shares of the side
there meant for 224 pixels, so that small images are not pushed off their canvas. Pixels are float32
(n, 3, side, side) in 0..255 on any device.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.config.augmentation import RandAugmentOptions
from tuner.core.device_transfers import send
from tuner.core.geometry import AffineTransform
from tuner.preprocessing.augmented_colour import ERASED_GREY, adjust_colours
from tuner.preprocessing.augmented_geometry import about_centre, rotation_matrix, to_matrix
from tuner.preprocessing.random_draws import RandomDraws

MAX_MAGNITUDE = 30
MAGNITUDES = MAX_MAGNITUDE + 1  # of TrivialAugment, from 0 to the strongest
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS = (
    "identity",
    *GEOMETRIC,
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)


@dataclass(frozen=True)
class Strengths:
    """What each operation does at full strength.

    `shear` is a slope, `translation` a share of the side, `rotation` in degrees, `enhancement` the
    change of a factor, `bits` how many of 8 a posterized image loses.
    """

    shear: float
    translation: float
    rotation: float
    enhancement: float
    bits: int


TRIVIALAUGMENT_STRENGTHS = Strengths(0.99, 32 / 224, 135.0, 0.99, 6)
RANDAUGMENT_STRENGTHS = Strengths(0.3, 150 / 331, 30.0, 0.9, 4)


def trivialaugment(draws: RandomDraws, pixels: Tensor) -> Tensor:
    """One random operation of a random strength: Müller and Hutter, ICCV 2021."""
    strength = draws.integers("trivialaugment.magnitude", MAGNITUDES)[:, 0] / MAX_MAGNITUDE
    return _apply_one(draws, "trivialaugment", pixels, strength, TRIVIALAUGMENT_STRENGTHS)


def randaugment(draws: RandomDraws, pixels: Tensor, options: RandAugmentOptions) -> Tensor:
    """Some random operations of one strength: Cubuk et al., NeurIPS 2020."""
    strength = torch.full((len(pixels),), options.magnitude / MAX_MAGNITUDE)
    for number in range(options.operations):
        name = f"randaugment.{number}"
        pixels = _apply_one(draws, name, pixels, strength, RANDAUGMENT_STRENGTHS)
    return pixels


def _apply_one(
    draws: RandomDraws, name: str, pixels: Tensor, strength: Tensor, strengths: Strengths
) -> Tensor:
    """Applies one random operation to each image.

    Args:
        draws: the random numbers.
        name: of the numbers to use.
        pixels: the images.
        strength: float32 (n,), 0 to 1, on the CPU.
        strengths: what the operations do at a strength of 1.
    """
    numbers = draws.integers(f"{name}.operation", len(OPERATIONS))[:, 0]
    signed = strength.where(draws.chosen(f"{name}.sign", 0.5), -strength)
    pixels = pixels.clone()
    for number, operation in enumerate(OPERATIONS):
        chosen = (numbers == number).nonzero()[:, 0]
        if operation == "identity" or not len(chosen):
            continue
        on_device = send(chosen, pixels.device)
        value = (signed if operation in SIGNED else strength)[chosen]
        pixels[on_device] = apply_operation(operation, pixels[on_device], value, strengths)
    return pixels


SIGNED = (*GEOMETRIC, "brightness", "saturation", "contrast", "sharpness")


def apply_operation(
    operation: str, pixels: Tensor, strength: Tensor, strengths: Strengths
) -> Tensor:
    """Applies one operation to all images.

    Args:
        operation: one of OPERATIONS.
        pixels: the images.
        strength: float32 (n,) on the CPU, from 0 to 1; from -1 for the SIGNED operations.
        strengths: what the operation does at a strength of 1.
    """
    if operation in GEOMETRIC:
        side = pixels.shape[-1]
        matrix = _geometric_matrix(operation, strength, side, strengths)[:, :2]
        return AffineTransform(matrix, side, side).sample(pixels, "bilinear", ERASED_GREY)
    if operation in ("brightness", "saturation", "contrast"):
        one = torch.ones_like(strength)
        factors = dict.fromkeys(("brightness", "contrast", "saturation"), one)
        factors[operation] = 1 + strengths.enhancement * strength
        return adjust_colours(pixels, **factors, angle=torch.zeros_like(strength))
    column = send(strength, pixels.device)[:, None, None, None]
    return _POINTWISE[operation](pixels, column, strengths)


def _geometric_matrix(operation: str, strength: Tensor, side: int, strengths: Strengths) -> Tensor:
    n = len(strength)
    if operation == "rotate":
        return rotation_matrix(strength * math.radians(strengths.rotation), side)
    matrix = to_matrix(torch.ones(n, 2), torch.zeros(n, 2))
    axis = 0 if operation.endswith("_x") else 1
    if operation.startswith("shear"):
        matrix[:, axis, 1 - axis] = strength * strengths.shear
        return about_centre(matrix, side)
    matrix[:, axis, 2] = strength * strengths.translation * side
    return matrix


def _sharpness(pixels: Tensor, strength: Tensor, strengths: Strengths) -> Tensor:
    kernel = torch.ones(1, 1, 3, 3, device=pixels.device)
    kernel[0, 0, 1, 1] = 5
    smooth = pixels.clone()
    inner = F.conv2d(pixels.flatten(0, 1)[:, None], kernel / kernel.sum())
    smooth[:, :, 1:-1, 1:-1] = inner.view(*pixels.shape[:2], *inner.shape[2:])
    factor = 1 + strengths.enhancement * strength
    return (smooth + factor * (pixels - smooth)).clamp_(0, 255)


def _posterize(pixels: Tensor, strength: Tensor, strengths: Strengths) -> Tensor:
    step = 2.0 ** (strengths.bits * strength).round()
    return (pixels.round() / step).floor() * step


def _solarize(pixels: Tensor, strength: Tensor, strengths: Strengths) -> Tensor:
    return pixels.where(pixels < 255 * (1 - strength), 255 - pixels)


def _autocontrast(pixels: Tensor, strength: Tensor, strengths: Strengths) -> Tensor:
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    stretched = (pixels - low) * 255 / (high - low).clamp_min(1)
    return stretched.where(high > low, pixels)


def _equalize(pixels: Tensor, strength: Tensor, strengths: Strengths) -> Tensor:
    """Flattens the histogram of each channel, as Pillow does."""
    channels = pixels.round().long().flatten(0, 1).flatten(1)  # (n * 3, side * side)
    count, total = len(channels), channels.shape[1]
    offsets = 256 * torch.arange(count, device=pixels.device)[:, None]
    histogram = torch.zeros(count * 256, dtype=torch.int64, device=pixels.device)
    histogram.scatter_add_(0, (channels + offsets).flatten(), torch.ones_like(channels).flatten())
    histogram = histogram.view(count, 256)
    last = channels.amax(1)
    step = (total - histogram.gather(1, last[:, None])) // 255
    below = histogram.cumsum(1) - histogram  # the pixels darker than each value
    table = ((below + step // 2) // step.clamp_min(1)).clamp(0, 255)
    equal = table.gather(1, channels).where(step > 0, channels)
    return equal.view_as(pixels).float()


_POINTWISE: Mapping[str, Callable[[Tensor, Tensor, Strengths], Tensor]] = {
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
