"""Targets: what is true of each image of an image store, by row.

They are moved with the image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.core.geometry import AffineTransform
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.files.cache_entries import PinnedEntry

MIN_VISIBLE_SHARE = 0.25  # of a box's area; with less of it on the canvas the object is dropped
MIN_BOX_SIDE = 1.0  # pixels; an object with a smaller box is dropped
NO_OBJECT = -1  # label of the rows that pad an image's boxes; labels below it: `ignored_label`
TARGET, EXAMPLE_WEIGHT = "target", "example_weight"  # tensors of a target that is weighted
IGNORED = 255  # class of pixels that are not counted, such as the borders of a letterbox
IGNORED_TAG = -100  # tag of tokens that are not counted, such as all but the first of a word


def ignored_label(label: int) -> int:
    """The label, below NO_OBJECT, of an ignored area: objects of this class may be in it, and
    whether they are detected does not count. It is its own inverse.

    Such are COCO's crowds and Pascal VOC's difficult objects. They are no objects to learn, but
    they move with the image as objects do.
    """
    return NO_OBJECT - 1 - label


class Targets(Protocol):
    """The targets of all images of a store."""

    @property
    def task(self) -> str:
        """The built-in task whose augmentation policies suit such targets: classification,
        detection or segmentation.
        """

    @property
    def content(self) -> tuple[bytes, ...]:
        """Bytes for a digest: equal content means equal targets."""

    def take(self, rows: Tensor) -> TensorTree:
        """The targets of the images at `rows` (int64, (n,)), batch-first."""

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        """The targets `y` of a batch whose images at `which` (int64, (k,), numbers in the batch)
        are flipped left to right.

        `y` may be changed in place.
        """

    def crop(self, y: TensorTree, margin: int) -> TensorTree:
        """The targets `y` of a batch whose images lose `margin` pixels at each side."""

    def transform(self, y: TensorTree, transform: AffineTransform) -> TensorTree:
        """The targets `y` of a batch whose images are transformed."""


@runtime_checkable
class OriginalTargetSource(Protocol):
    """A source that can give targets as they are on the disk, not as they lie on the canvas."""

    @property
    def has_originals(self) -> bool:
        """Whether there are such targets."""

    def take_original(self, number: int) -> Tensor:
        """The original target of one example: of a mask uint8 (height, width)."""


@dataclass(frozen=True)
class Labels:
    """What stays as it is when an image is moved: a class, a set of labels, or numbers.

    Args:
        labels: One class per image, int64 (n,); or float32 (n, outputs): 1 for each label of an
            image and 0 for others, or the numbers to be estimated; or int16 (n, length): the tag of
            each token of a text, IGNORED_TAG where it is not counted.
        weights: float32 (n,), how much each example counts in the loss; None: all alike. With
            weights a target is a dict of TARGET and EXAMPLE_WEIGHT.
    """

    labels: Tensor
    weights: Tensor | None = None
    task: ClassVar[str] = "classification"

    @property
    def tree(self) -> TensorTree:
        """The targets of all examples."""
        if self.weights is None:
            return self.labels
        return {TARGET: self.labels, EXAMPLE_WEIGHT: self.weights}

    @property
    def content(self) -> tuple[bytes, ...]:
        return tuple(tensor.numpy().tobytes() for tensor in tree_to_dict(self.tree).values())

    def take(self, rows: Tensor) -> TensorTree:
        if self.weights is None:
            return self.labels[rows]
        return {name: tensor[rows] for name, tensor in tree_to_dict(self.tree).items()}

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        return y

    def crop(self, y: TensorTree, margin: int) -> TensorTree:
        return y

    def transform(self, y: TensorTree, transform: AffineTransform) -> TensorTree:
        return y


def labels_of(
    classes: NDArray[Any], targets: NDArray[Any] | None, weights: NDArray[Any] | None
) -> Labels:
    """Labels from arrays.

    Args:
        classes: int64 (n,), the class of each example.
        targets: float32 (n, outputs), instead of classes; None: classes it is.
        weights: float32 (n,); None: all examples count alike.
    """
    return Labels(
        torch.from_numpy(classes if targets is None else targets),
        None if weights is None else torch.from_numpy(weights),
    )


def split_weights(y: TensorTree) -> tuple[TensorTree, Tensor | None]:
    """A target without its weights, and the weights, float32 (n,); None where it has none."""
    if isinstance(y, dict) and EXAMPLE_WEIGHT in y:
        return y[TARGET], y[EXAMPLE_WEIGHT]
    return y, None


@dataclass(frozen=True)
class Masks:
    """One class per pixel: uint8 (n, size, size), IGNORED where a pixel is not counted.

    `masks` is mapped from files of `entry`, which stay while this object lives. `read_original`
    gives the mask of a row as it is on the disk, uint8 (height, width) of its image.
    """

    entry: PinnedEntry
    masks: Tensor
    digest: str
    read_original: Callable[[int], Tensor] | None = None
    task: ClassVar[str] = "segmentation"

    @property
    def content(self) -> tuple[bytes, ...]:
        return (self.digest.encode(),)

    def take(self, rows: Tensor) -> TensorTree:
        return self.masks[rows]

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        assert isinstance(y, Tensor)
        y[which] = y[which].flip(2)
        return y

    def crop(self, y: TensorTree, margin: int) -> TensorTree:
        assert isinstance(y, Tensor)
        return y[:, margin : y.shape[1] - margin, margin : y.shape[2] - margin]

    def transform(self, y: TensorTree, transform: AffineTransform) -> TensorTree:
        assert isinstance(y, Tensor)
        return transform.sample(y[:, None], "nearest", IGNORED)[:, 0].to(torch.uint8)


def masks_of_objects(layers: Tensor, rows: Tensor) -> Tensor:
    """The masks of some objects of an image: bool (k, side, side).

    Args:
        layers: uint8 (layers, side, side), as `InstanceMasks` has them.
        rows: int64 (k,), the rows of the objects among the padded objects of the image.
    """
    return (layers[None] == (rows + 1).view(-1, 1, 1, 1)).any(1)


@dataclass(frozen=True)
class Boxes:
    """The objects of each image, padded to the number k of the image with the most objects.

    `boxes` is float32 (n, k, 4): left, top, right, bottom in pixels of the canvas. `labels` is
    int64 (n, k). Rows that pad are boxes of 0 with the label NO_OBJECT; labels below it are those
    of ignored areas, `ignored_label`. `canvas_side` is in pixels.
    """

    boxes: Tensor
    labels: Tensor
    canvas_side: int
    task: ClassVar[str] = "detection"

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

    def crop(self, y: TensorTree, margin: int) -> TensorTree:
        assert isinstance(y, dict)
        is_object = (y["labels"] != NO_OBJECT)[..., None]
        return {**y, "boxes": (y["boxes"] - margin).where(is_object, y["boxes"])}

    def transform(self, y: TensorTree, transform: AffineTransform) -> TensorTree:
        """Boxes are clipped to the canvas.

        An object is dropped where less than MIN_VISIBLE_SHARE of its box is left, or its box has a
        side below MIN_BOX_SIDE.
        """
        assert isinstance(y, dict)
        boxes, share = transform.move_boxes(y["boxes"])
        sides = boxes[..., 2:] - boxes[..., :2]
        is_object = (
            (y["labels"] != NO_OBJECT)
            & (share >= MIN_VISIBLE_SHARE)
            & (sides.amin(2) >= MIN_BOX_SIDE)
        )
        return {
            **y,
            "boxes": boxes.where(is_object[..., None], 0.0),
            "labels": y["labels"].where(is_object, NO_OBJECT),
        }


@dataclass(frozen=True)
class InstanceMasks:
    """The objects of each image with a mask each.

    `layers` is uint8 (n, layers, size, size): of each pixel the number of the object that it
    belongs to, which is its row in `objects`, from 1; 0: no object. Objects that overlap lie in
    different layers. It is mapped from files of `entry`, which stay while this object lives.
    """

    objects: Boxes
    entry: PinnedEntry
    layers: Tensor
    digest: str
    task: ClassVar[str] = "instance_segmentation"

    @property
    def content(self) -> tuple[bytes, ...]:
        return (*self.objects.content, self.digest.encode())

    def take(self, rows: Tensor) -> TensorTree:
        objects = self.objects.take(rows)
        assert isinstance(objects, dict)
        return {**objects, "layers": self.layers[rows]}

    def mirror(self, y: TensorTree, which: Tensor) -> TensorTree:
        y = self.objects.mirror(y, which)
        assert isinstance(y, dict)
        y["layers"][which] = y["layers"][which].flip(3)
        return y

    def crop(self, y: TensorTree, margin: int) -> TensorTree:
        y = self.objects.crop(y, margin)
        assert isinstance(y, dict)
        stop = y["layers"].shape[3] - margin
        return {**y, "layers": y["layers"][:, :, margin:stop, margin:stop]}

    def transform(self, y: TensorTree, transform: AffineTransform) -> TensorTree:
        """Boxes as `Boxes.transform`; the mask of an object that is dropped there is not used."""
        y = self.objects.transform(y, transform)
        assert isinstance(y, dict)
        layers = transform.sample(y["layers"], "nearest", 0).to(torch.uint8)
        return {**y, "layers": layers}
