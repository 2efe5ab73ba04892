"""Where an image lies on a model's square canvas, so that boxes and masks can be moved there and
back; and affine transforms of canvases, by which augmentation moves them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.device_transfers import send
from tuner.core.input_spec import ImageInputSpec

MAX_SHRINKING = 1.5  # old pixels per new one that bilinear interpolation bears
MAX_LEVEL = 4  # of an image pyramid: squares of 16 pixels


class Placement(NamedTuple):
    """Where an image lies on the canvas, in pixels.

    The whole image is resized to `width` x `height`. Its top left corner is at (`left`, `top`) of
    the canvas; these are negative where the image is cropped.
    """

    width: int
    height: int
    left: int
    top: int


def place_on_canvas(width: int, height: int, image_spec: ImageInputSpec) -> Placement:
    """The placement of an image of `width` x `height` pixels on the canvas of `image_spec`."""
    size = image_spec.size
    if image_spec.fit == "stretch":
        return Placement(size, size, 0, 0)
    if image_spec.fit == "letterbox":
        scale = size / max(width, height)
        new_width, new_height = (min(size, max(1, round(side * scale))) for side in (width, height))
        return Placement(new_width, new_height, (size - new_width) // 2, (size - new_height) // 2)
    # as torchvision's Resize and CenterCrop do it
    shorter = image_spec.resize
    scale = shorter / min(width, height)
    new_width, new_height = (max(shorter, int(side * scale)) for side in (width, height))
    left, top = -round((new_width - size) / 2), -round((new_height - size) / 2)
    return Placement(new_width, new_height, left, top)


@dataclass(frozen=True)
class AffineTransform:
    """An affine transform of each image of a batch. Its tensors are on the CPU.

    Positions are (x, y) in pixels from the top left corner, so a pixel's centre is at a half.

    Args:
        matrix: float32 (n, 2, 3), takes a position of the new image, as (x, y, 1), to the position
            of the old image that is shown there.
        old_side: the side of the old images in pixels.
        side: the side of the new images in pixels.
        window: float32 (n, 4), the part of each new image that shows the old one, as left, top,
            right, bottom; None: the whole.
    """

    matrix: Tensor
    old_side: int
    side: int
    window: Tensor | None = None

    def sample(self, images: Tensor, mode: str, fill: float) -> Tensor:
        """The new images, on the device of the old ones.

        Where a new image is smaller than what it shows, `bilinear` takes means over squares of old
        pixels first, as an image pyramid does, so that no pixel is left out.

        Args:
            images: uint8 or float32 (n, channels, old_side, old_side).
            mode: bilinear or nearest.
            fill: the value where a new image shows nothing of the old one.

        Returns:
            float32 (n, channels, side, side).
        """
        shifted = torch.sub(images, float(fill))  # float32 also where the images are uint8
        new = self._sample_level(shifted, mode)
        if mode == "bilinear":
            a, b, c, d = self.matrix[:, :, :2].flatten(1).unbind(1)
            shrinking = (a * d - b * c).abs().sqrt()  # old pixels per new one
            levels = (shrinking / MAX_SHRINKING).log2().ceil().clamp(0, MAX_LEVEL).long()
            for level in sorted(set(levels.tolist()) - {0}):
                chosen = (levels == level).nonzero()[:, 0]
                on_device = send(chosen, images.device)
                means = F.avg_pool2d(shifted[on_device], 2**level, ceil_mode=True)
                matrix = self.matrix[chosen] / 2**level
                smaller = AffineTransform(matrix, means.shape[-1], self.side)
                new[on_device] = smaller._sample_level(means, mode)
        return new.add_(fill)

    def _sample_level(self, images: Tensor, mode: str) -> Tensor:
        """The new images, and 0 where they show nothing of the old ones."""
        matrix = send(self._normalised_matrix(), images.device)
        grid = F.affine_grid(matrix, [len(images), 1, self.side, self.side], align_corners=False)
        return F.grid_sample(images, grid, mode, padding_mode="zeros", align_corners=False)

    def after(self, later: "AffineTransform") -> "AffineTransform":
        """This transform and then `later` as one, without a window."""
        linear, shift = self.matrix[:, :, :2], self.matrix[:, :, 2:]
        matrix = linear @ later.matrix + F.pad(shift, (2, 0))
        return AffineTransform(matrix, self.old_side, later.side)

    def is_in_window(self, later: "AffineTransform", device: torch.device) -> Tensor:
        """Which pixels show something from inside of the window, after `later` as well.

        Returns:
            bool (n, side, side) on the device, with the side of `later`.
        """
        assert self.window is not None
        window, matrix = send(self.window, device), send(later.matrix, device)
        axis = torch.arange(later.side, device=device) + 0.5
        columns, rows = axis[None, None, :], axis[None, :, None]
        inside = torch.ones((), dtype=torch.bool, device=device)
        for i in range(2):
            a, b, c = matrix[:, i, :, None, None].unbind(1)
            position = a * columns + b * rows + c
            low, high = window[:, i, None, None], window[:, i + 2, None, None]
            inside = inside & (position >= low) & (position < high)
        return inside

    def _normalised_matrix(self) -> Tensor:
        """The matrix for positions from -1 to 1, as `affine_grid` takes it."""
        linear, shift = self.matrix[:, :, :2], self.matrix[:, :, 2]
        shift = (2 * shift + linear.sum(2) * self.side) / self.old_side - 1
        return torch.cat([linear * (self.side / self.old_side), shift[:, :, None]], 2)

    def move_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes of the old images in the new ones, clipped to where the old images are shown.

        A box that is no longer upright becomes the smallest upright box around it.

        Args:
            boxes: float32 (n, k, 4), left, top, right, bottom, on the CPU.

        Returns:
            The boxes, float32 (n, k, 4), and the share of each box's area that is left after
            clipping, float32 (n, k).
        """
        linear, shift = self.matrix[:, :, :2], self.matrix[:, :, 2]
        corners = boxes[..., [0, 1, 2, 1, 2, 3, 0, 3]].view(*boxes.shape[:2], 4, 2)
        # the inverse: of a matrix of two rows it is written out, which is exact for flips
        a, b, c, d = linear.flatten(1).unbind(1)
        inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2)
        inverse = inverse / (a * d - b * c)[:, None, None]
        moved = torch.einsum("nij,nkcj->nkci", inverse, corners - shift[:, None, None])
        whole = torch.cat([moved.amin(2), moved.amax(2)], 2)
        window = self.window
        if window is None:
            window = whole.new_tensor([0.0, 0.0, self.side, self.side]).expand(len(boxes), 4)
        low, high = window[:, None, [0, 1, 0, 1]], window[:, None, [2, 3, 2, 3]]
        clipped = torch.minimum(torch.maximum(whole, low), high)
        share = _area(clipped) / _area(whole).clamp_min(torch.finfo(whole.dtype).tiny)
        return clipped, share


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
