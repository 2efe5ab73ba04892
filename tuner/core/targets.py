"""Targets: what is true of each image of an image store, by row.

They are mirrored with the image.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tuner.core.input_spec import TensorTree
from tuner.files.cache_entries import PinnedEntry

NO_OBJECT = -1  # label of the rows that pad an image's boxes
IGNORED = 255  # class of pixels that are not counted, such as the borders of a letterbox


class Targets(Protocol):
    """The targets of all images of a store."""

    @property
    def content(self) -> tuple[bytes, ...]:
        """Bytes for a digest: equal content means equal targets."""

    def take(self, rows: Tensor) -> TensorTree:
        """The targets of the images at `rows` (int64, (n,)), batch-first."""

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        """The targets `y` of a batch whose images at `which` (bool, (n,)) are flipped left to
        right.

        `y` may be changed in place.
        """


@dataclass(frozen=True)
class Labels:
    """One class per image: int64 (n,)."""

    labels: Tensor

    @property
    def content(self) -> tuple[bytes, ...]:
        return (self.labels.numpy().tobytes(),)

    def take(self, rows: Tensor) -> TensorTree:
        return self.labels[rows]

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        return y


@dataclass(frozen=True)
class Masks:
    """One class per pixel: uint8 (n, size, size), IGNORED where a pixel is not counted.

    `masks` is mapped from files of `entry`, which stay while this object lives.
    """

    entry: PinnedEntry
    masks: Tensor
    digest: str

    @property
    def content(self) -> tuple[bytes, ...]:
        return (self.digest.encode(),)

    def take(self, rows: Tensor) -> TensorTree:
        return self.masks[rows]

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        assert isinstance(y, Tensor)
        y[which] = y[which].flip(2)
        return y


@dataclass(frozen=True)
class Boxes:
    """The objects of each image, padded to the number k of the image with the most objects.

    `boxes` is float32 (n, k, 4): left, top, right, bottom in pixels of the canvas. `labels` is
    int64 (n, k). Rows that pad are boxes of 0 with the label NO_OBJECT. `canvas_side` is in pixels.
    """

    boxes: Tensor
    labels: Tensor
    canvas_side: int

    @property
    def content(self) -> tuple[bytes, ...]:
        return self.boxes.numpy().tobytes(), self.labels.numpy().tobytes()

    def take(self, rows: Tensor) -> TensorTree:
        return {"boxes": self.boxes[rows], "labels": self.labels[rows]}

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        assert isinstance(y, dict)
        boxes = y["boxes"]
        flipped = boxes[which][..., [2, 1, 0, 3]]
        flipped[..., [0, 2]] = self.canvas_side - flipped[..., [0, 2]]
        is_object = (y["labels"][which] != NO_OBJECT)[..., None]
        boxes[which] = flipped.where(is_object, boxes[which])
        return {**y, "boxes": boxes}
