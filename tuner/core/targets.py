"""What is true of each example of a store of images, by row; mirrored where the image is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tuner.core.input_spec import TensorTree
from tuner.files.cache_entries import PinnedEntry

NO_OBJECT = -1  # label of the rows that fill up an image's boxes
IGNORED = 255  # class of pixels that count for nothing, such as a letterbox's borders


class Targets(Protocol):
    @property
    def content(self) -> tuple[bytes, ...]:
        """Equal content, equal targets."""

    def take(self, rows: Tensor) -> TensorTree:
        """The truth of the examples at `rows` (int64, (n,)), batch-first."""

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        """The truth of a batch after the images of `which` (bool, (n,)) were flipped left to right."""


@dataclass(frozen=True)
class Labels:
    """One class per example: int64 (n,)."""

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
    """A class per pixel: uint8 (n, size, size), IGNORED where nothing is asked."""

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
    """Objects per image: `boxes` float32 (n, most, 4) as left, top, right, bottom in pixels of the canvas, `labels` int64 (n, most).

    Images with fewer objects than the most are filled up with boxes of 0 whose label is NO_OBJECT. `side` is the canvas's.
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
        real = (y["labels"][which] != NO_OBJECT)[..., None]
        boxes[which] = flipped.where(real, boxes[which])
        return {**y, "boxes": boxes}
