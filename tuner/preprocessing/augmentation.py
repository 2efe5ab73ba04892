"""Augments batches of images and their targets, as a function of (row, view) alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.config.augmentation import AugmentationPolicy
from tuner.core.device_transfers import send
from tuner.core.geometry import AffineTransform
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.targets import NO_OBJECT, Targets
from tuner.core.types import Batch
from tuner.preprocessing.augmented_colour import blur, change_colours, erase
from tuner.preprocessing.augmented_geometry import (
    draw_transform,
    has_geometry,
    to_matrix,
)
from tuner.preprocessing.image_decoding import LETTERBOX_GREY
from tuner.preprocessing.random_draws import RandomDraws
from tuner.preprocessing.random_operations import randaugment, trivialaugment

MOSAIC_CENTRE = (0.25, 0.75)  # where the four images of a mosaic meet, as a share of the side
MOSAIC_ZOOM = (0.5, 1.0)  # of each of them
QUADRANTS = 4

TakeStored = Callable[[Tensor], Batch]
"""Gives the stored pixels, uint8 (n, 3, old_side, old_side), and targets of rows, int64 (n,).

Boxes are on the CPU, where crops are chosen by them.
"""


@dataclass(frozen=True)
class ImageBatch:
    """Images and their targets while they are augmented.

    Pixels are in 0..255: uint8 as they are stored, float32 once something was done to them.
    """

    pixels: Tensor
    y: TensorTree


@dataclass(frozen=True)
class Augmenter:
    """Augments images of one store.

    Args:
        policy: what is done.
        targets: moves the targets with the images.
        partners: int64, the rows of the images that a mosaic may join.
        old_side: the side of the stored images in pixels.
        side: the side of the examples in pixels.
    """

    policy: AugmentationPolicy
    targets: Targets
    partners: Tensor
    old_side: int
    side: int

    def take(self, take_stored: TakeStored, rows: Tensor, view: int) -> Batch:
        """The images at `rows` (int64, (n,), on the CPU) in a view.

        Pixels are uint8 (n, 3, side, side), on the device of the stored ones.
        """
        draws = RandomDraws(rows, view)
        stored = _to_image_batch(take_stored(rows))
        if has_geometry(self.policy):
            batch = self._move(stored, self._draw_transform(draws, stored.y))
        else:
            batch = self._crop_centre(stored)
        if self.policy.mosaic:
            batch = self._add_mosaics(take_stored, draws, batch)
        return Batch(self._change_pixels(draws, batch.pixels), batch.y)

    def _crop_centre(self, batch: ImageBatch) -> ImageBatch:
        margin = (self.old_side - self.side) // 2
        stop = margin + self.side
        pixels = batch.pixels[:, :, margin:stop, margin:stop].float()
        return ImageBatch(pixels, self.targets.crop(batch.y, margin))

    def _draw_transform(self, draws: RandomDraws, y: TensorTree) -> AffineTransform:
        boxes = None
        if isinstance(y, dict) and "boxes" in y:  # crops are chosen by what there is to learn
            boxes = y["boxes"].where((y["labels"] > NO_OBJECT)[..., None], 0.0)
        return draw_transform(self.policy, draws, self.old_side, self.side, boxes)

    def _move(self, batch: ImageBatch, transform: AffineTransform) -> ImageBatch:
        pixels = transform.sample(batch.pixels, "bilinear", LETTERBOX_GREY)
        return ImageBatch(pixels, self.targets.transform(batch.y, transform))

    def _change_pixels(self, draws: RandomDraws, pixels: Tensor) -> Tensor:
        options = self.policy.randaugment_options
        if self.policy.trivialaugment:
            pixels = trivialaugment(draws, pixels)
        if options is not None:
            pixels = randaugment(draws, pixels, options)
        pixels = change_colours(self.policy, draws, pixels)
        pixels = erase(self.policy, draws, blur(self.policy, draws, pixels))
        return pixels.round().clamp_(0, 255).to(torch.uint8)

    def _add_mosaics(
        self, take_stored: TakeStored, draws: RandomDraws, batch: ImageBatch
    ) -> ImageBatch:
        """The batch with some of its images replaced by mosaics: Bochkovskiy et al., YOLOv4, 2020.

        All images get space for the objects of four.
        """
        assert isinstance(batch.y, dict)
        space = (QUADRANTS - 1) * batch.y["labels"].shape[1]
        boxes = F.pad(batch.y["boxes"], (0, 0, 0, space))
        labels = F.pad(batch.y["labels"], (0, space), value=NO_OBJECT)
        chosen = draws.chosen("mosaic", self.policy.mosaic).nonzero()[:, 0]
        if not len(chosen):
            return ImageBatch(batch.pixels, {**batch.y, "boxes": boxes, "labels": labels})
        mosaics = self._make_mosaics(take_stored, RandomDraws(draws.rows[chosen], draws.view))
        assert isinstance(mosaics.y, dict)
        return ImageBatch(
            batch.pixels.index_copy(0, send(chosen, batch.pixels.device), mosaics.pixels),
            {
                "boxes": boxes.index_copy(0, chosen, mosaics.y["boxes"]),
                "labels": labels.index_copy(0, chosen, mosaics.y["labels"]),
            },
        )

    def _make_mosaics(self, take_stored: TakeStored, draws: RandomDraws) -> ImageBatch:
        """A mosaic for each image of `draws`, which is in one of its quadrants."""
        rows = self.partners[draws.integers("mosaic.partners", len(self.partners), QUADRANTS)]
        own = draws.integers("mosaic.own", QUADRANTS)
        rows = rows.scatter(1, own, draws.rows[:, None])
        stored = [_to_image_batch(take_stored(rows[:, quadrant])) for quadrant in range(QUADRANTS)]
        device = stored[0].pixels.device
        places = [self._quadrant_transform(draws, quadrant) for quadrant in range(QUADRANTS)]
        moved = [
            self.targets.transform(batch.y, place)
            for batch, place in zip(stored, places, strict=True)
        ]
        y: TensorTree = {
            name: torch.cat([tree_to_dict(part)[name] for part in moved], 1)
            for name in ("boxes", "labels")
        }
        transform = self._draw_transform(draws, y)
        pixels = torch.full(
            (len(rows), 3, self.side, self.side), float(LETTERBOX_GREY), device=device
        )
        for batch, place in zip(stored, places, strict=True):
            shown = place.after(transform).sample(batch.pixels, "bilinear", LETTERBOX_GREY)
            inside = place.is_in_window(transform, device)
            pixels = shown.where(inside[:, None], pixels)
        return ImageBatch(pixels, self.targets.transform(y, transform))

    def _quadrant_transform(self, draws: RandomDraws, quadrant: int) -> AffineTransform:
        """How an image lies in one quadrant of mosaics that have the stored images' side."""
        side = self.old_side
        centre = draws.uniform("mosaic.centre", *MOSAIC_CENTRE, count=2) * side
        is_far = torch.tensor([quadrant % 2, quadrant // 2]).bool()  # right, bottom
        low = centre.where(is_far, 0.0)
        high = torch.tensor(float(side)).where(is_far, centre)
        zoom = draws.uniform(f"mosaic.zoom.{quadrant}", *MOSAIC_ZOOM)
        position = draws.uniform(f"mosaic.position.{quadrant}", count=2)
        shift = position * (side - (high - low) / zoom) - low / zoom
        matrix = to_matrix((1 / zoom).expand(-1, 2), shift)
        return AffineTransform(matrix[:, :2], side, side, torch.cat([low, high], 1))


def _to_image_batch(batch: Batch) -> ImageBatch:
    assert isinstance(batch.x, Tensor)
    return ImageBatch(batch.x, batch.y)
