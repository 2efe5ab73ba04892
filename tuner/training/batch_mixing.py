"""Mixup and CutMix: each example of a batch is mixed with another one, and so is its loss.

What is mixed is what enters the net: images where nothing is frozen, and behind a frozen prefix its
activations, cached or not. That is manifold mixup (Verma et al., ICML 2019), and for texts TMix
(Chen et al., ACL 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tuner.config.run import Recipe
from tuner.core.device_transfers import send
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.types import Batch
from tuner.errors import SpaceError

MIXING_SEED = 0x6D6978  # keeps these random numbers apart from others of the same seed
CUTMIX_SHARE = 0.5  # of the batches, where a recipe has mixup and cutmix
MASK_NAME = "attention_mask"
LossOf = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""The parts of a net's loss on a batch, by name: `Task.loss_parts`."""


@dataclass(frozen=True)
class BatchMixing:
    """How the examples of one batch are mixed.

    Args:
        share: how much of each example is its own, 0 to 1.
        rectangle: for CutMix, what the other example covers: left, top, right, bottom as shares of
            the side; None: mixup, a weighted mean.
        partner_seed: of the order in which the examples are each other's partners.
    """

    share: float
    rectangle: tuple[float, float, float, float] | None
    partner_seed: int

    def loss_parts(self, loss_of: LossOf, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss of the mixed batch: the mean of the losses for both targets, by their shares.

        The net computes its output once.
        """
        order = np.random.default_rng(self.partner_seed).permutation(_count(batch.y))
        x, share = self._mix(batch.x, torch.from_numpy(order))
        computed_once = _ComputedOnce(net)
        own = loss_of(computed_once, Batch(x, batch.y))
        partners = _select(batch.y, torch.from_numpy(order))
        other = loss_of(computed_once, Batch(x, partners))
        return {name: share * part + (1 - share) * other[name] for name, part in own.items()}

    def _mix(self, x: TensorTree, order: Tensor) -> tuple[TensorTree, float]:
        """The mixed inputs, and the share of each example that is its own."""
        tensors = tree_to_dict(x)
        fixed = [
            name or "the input"
            for name, tensor in tensors.items()
            if name != MASK_NAME and not tensor.is_floating_point()
        ]
        if fixed:
            raise SpaceError(
                f"recipe.mixup: {', '.join(fixed)} cannot be mixed, since these are no real "
                "numbers; with texts freeze at least one stage"
            )
        maps = [tensor for tensor in tensors.values() if _is_map(tensor)]
        if self.rectangle is not None and len(maps) == len(tensors):
            bounds = _pixel_bounds(self.rectangle, maps[0].shape[-1])
            left, top, right, bottom = bounds
            share = 1 - (right - left) * (bottom - top) / maps[0].shape[-1] ** 2
            mixed = {name: self._cut(tensor, order) for name, tensor in tensors.items()}
        else:
            share = self.share
            mixed = self._blend(tensors, order)
        return (mixed if isinstance(x, dict) else mixed[""]), share

    def _cut(self, tensor: Tensor, order: Tensor) -> Tensor:
        """A map with the partner's pixels inside of the rectangle."""
        assert self.rectangle is not None
        left, top, right, bottom = _pixel_bounds(self.rectangle, tensor.shape[-1])
        mixed = tensor.clone()
        partners = tensor[send(order, tensor.device), :, top:bottom, left:right]
        mixed[:, :, top:bottom, left:right] = partners
        return mixed

    def _blend(self, tensors: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        """Weighted means. A mixed text is as long as the longer one; the shorter one adds nothing
        behind its end.
        """
        mask = tensors.get(MASK_NAME)
        mixed = {}
        for name, tensor in tensors.items():
            partners = send(order, tensor.device)
            if name == MASK_NAME:
                mixed[name] = torch.maximum(tensor, tensor[partners])
                continue
            shown = tensor if mask is None else _without_padding(tensor, mask)
            mixed[name] = self.share * shown + (1 - self.share) * shown[partners]
        return mixed


def draw_mixing(recipe: Recipe, seed: int, epoch: int, step: int) -> BatchMixing | None:
    """How a batch is mixed, as a function of (seed, epoch, step); None: not at all.

    Mixup: Zhang et al., ICLR 2018; CutMix: Yun et al., ICCV 2019.
    """
    if not (recipe.mixup or recipe.cutmix):
        return None
    random = np.random.default_rng((MIXING_SEED, seed, epoch, step))
    cuts = random.random() < CUTMIX_SHARE if recipe.mixup and recipe.cutmix else bool(recipe.cutmix)
    alpha = recipe.cutmix if cuts else recipe.mixup
    share = float(random.beta(alpha, alpha))
    rectangle = None
    if cuts:
        half = math.sqrt(1 - share) / 2
        x, y = random.random(2)
        low, high = (max(0.0, x - half), max(0.0, y - half)), (x + half, y + half)
        rectangle = (*low, min(1.0, high[0]), min(1.0, high[1]))
    return BatchMixing(share, rectangle, int(random.integers(2**32)))


def _is_map(tensor: Tensor) -> bool:
    """Whether a tensor has a square of positions as its last two dimensions."""
    return tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3]


def _without_padding(tensor: Tensor, mask: Tensor) -> Tensor:
    """0 where a text is padded; a tensor without the positions of the text stays as it is."""
    if tensor.shape[:2] != mask.shape:
        return tensor
    return tensor * mask.to(tensor.dtype).view(*mask.shape, *[1] * (tensor.dim() - 2))


def _pixel_bounds(
    rectangle: tuple[float, float, float, float], side: int
) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(share * side) for share in rectangle)
    return left, top, right, bottom


def _count(tree: TensorTree) -> int:
    return len(next(iter(tree_to_dict(tree).values())))


def _select(tree: TensorTree, order: Tensor) -> TensorTree:
    if isinstance(tree, Tensor):
        return tree[send(order, tree.device)]
    return {name: tensor[send(order, tensor.device)] for name, tensor in tree.items()}


class _ComputedOnce(nn.Module):
    """A net that is asked twice for its output of the same input, and computes it once."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.output: TensorTree | None = None

    def forward(self, x: TensorTree) -> TensorTree:
        if self.output is None:
            self.output = self.net(x)
        return self.output
