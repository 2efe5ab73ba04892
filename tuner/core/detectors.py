"""What all object detectors share: the stages, which pass targets on, and the head, which gives
losses or objects.

While a detector is trained, a batch's targets travel with the activations. Their names begin with
`target.`. They travel because two-stage detectors choose their samples by them. The head then gives
a dict of losses. Without targets the head gives objects, padded so that every tensor is
batch-first: `boxes` float32 (n, k, 4) as left, top, right, bottom in pixels of the canvas; `scores`
float32 (n, k) in falling order; `labels` int64 (n, k), NO_OBJECT where an image has fewer than k
objects. k is MAX_OBJECTS.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.targets import NO_OBJECT, ignored_label, masks_of_objects

IMAGE_NAME = "image"  # of a bare tensor
TARGET_PREFIX = "target."
MAX_OBJECTS = 100  # in an image
Objects = dict[str, Tensor]
"""The objects of one image: `boxes` float32 (k, 4), `labels` int64 (k,); predictions also `scores`
float32 (k,).
"""


class DetectorStage(nn.Module, ABC):
    """A stage before the head. It computes its activations and passes the targets on."""

    def forward(self, x: TensorTree) -> TensorTree:
        inputs, targets = split_targets(name_tensors(x))
        return self.compute(inputs) | targets

    @abstractmethod
    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes the stage's activations, batch-first tensors by name, from those of the stage
        before.
        """


class DetectorHead(nn.Module, ABC):
    """The last stage: it gives losses for a batch with targets, and objects for a batch without.

    A head computes in float32, also under bfloat16 autocast. A bfloat16 number has 8 significant
    bits, so coordinates above 256 pixels would be multiples of 2, those above 512 multiples of 4.
    Libraries compute anchors, boxes and non-maximum suppression in the type of the feature maps:
    boxes of small objects would miss them, and duplicates would not be suppressed. The layers
    inside a head run in float32 too. They are cheap beside the backbone, which stays in bfloat16,
    and on GPUs cuDNN computes float32 convolutions by TF32 unless told otherwise.
    """

    def forward(self, x: TensorTree) -> TensorTree:
        inputs, targets = split_targets(name_tensors(x))
        with _disable_autocast(next(iter(inputs.values())).device.type):
            inputs = {name: _to_float32(tensor) for name, tensor in inputs.items()}
            if targets:
                return self.losses(inputs, unpad_targets(targets))
            return pad_objects(self.detect(inputs))

    @abstractmethod
    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        """The model's own losses: scalar tensors by name.

        Args:
            x: Activations, batch-first tensors by name.
            targets: The objects of each image; where the data has masks, `masks` too, uint8
                (k, side, side).
        """

    @abstractmethod
    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        """The objects of each image after non-maximum suppression, the highest score first."""


def _disable_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context without autocast.

    Where there is none, as in an export, nothing is changed: a graph would record the context. The
    meta device, on which models are only measured, has no autocast.
    """
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _to_float32(tensor: Tensor) -> Tensor:
    """A tensor of a smaller floating-point type as float32; any other as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def name_tensors(x: TensorTree) -> dict[str, Tensor]:
    """A tensor tree as a dict; a bare tensor is named IMAGE_NAME."""
    return {name or IMAGE_NAME: tensor for name, tensor in tree_to_dict(x).items()}


def split_targets(x: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The activations and the targets of a batch."""
    targets = {name: tensor for name, tensor in x.items() if name.startswith(TARGET_PREFIX)}
    return {name: tensor for name, tensor in x.items() if name not in targets}, targets


def join_targets(x: TensorTree, y: TensorTree) -> dict[str, Tensor]:
    """The inputs of a batch together with its targets, as the stages take them while training."""
    return name_tensors(x) | {
        f"{TARGET_PREFIX}{name}": tensor for name, tensor in tree_to_dict(y).items()
    }


def rows_of_objects(labels: Tensor) -> tuple[Tensor, ...]:
    """Where the objects of each image are in padded labels (n, k), ignored areas left out: int64.

    The CPU waits for the device as often as for one image, however many there are.
    """
    is_object = labels > NO_OBJECT
    counts: list[int] = is_object.sum(1).tolist()
    return torch.split(is_object.nonzero()[:, 1], counts)


def unpad_objects(boxes: Tensor, labels: Tensor) -> list[Objects]:
    """Padded boxes (n, k, 4) and labels (n, k) as the objects of each image, without ignored
    areas.
    """
    return [
        {"boxes": image_boxes[rows], "labels": image_labels[rows]}
        for image_boxes, image_labels, rows in zip(
            boxes, labels, rows_of_objects(labels), strict=True
        )
    ]


def unpad_targets(targets: dict[str, Tensor]) -> list[Objects]:
    """The objects of each image, of targets as they travel with the activations."""
    boxes, labels, layers = (
        targets.get(f"{TARGET_PREFIX}{name}") for name in ("boxes", "labels", "layers")
    )
    assert boxes is not None and labels is not None
    images = unpad_objects(boxes, labels)
    if layers is None:
        return images
    return [
        {**objects, "masks": masks_of_objects(image_layers, rows).to(torch.uint8)}
        for objects, image_layers, rows in zip(images, layers, rows_of_objects(labels), strict=True)
    ]


def unpad_with_ignored(boxes: Tensor, labels: Tensor) -> list[Objects]:
    """Padded boxes (n, k, 4) and labels (n, k) as the objects and the ignored areas of each image.

    `iscrowd`, bool (k,), is true for the ignored areas, as COCO calls it; their `labels` are those
    of the class.
    """
    images = []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        rows = image_labels != NO_OBJECT
        real = image_labels[rows]
        is_ignored = real < NO_OBJECT
        images.append(
            {
                "boxes": image_boxes[rows],
                "labels": real.where(~is_ignored, ignored_label(0) - real),
                "iscrowd": is_ignored,
            }
        )
    return images


def pad_objects(images: Sequence[Objects], max_objects: int = MAX_OBJECTS) -> dict[str, Tensor]:
    """The objects of each image as batch-first tensors: boxes (n, k, 4), scores and labels (n, k),
    and masks (n, k, h, w) where there are masks.

    k is `max_objects`. No shape depends on the data, so the function can be exported.
    """
    padding = {"boxes": 0, "scores": 0, "labels": NO_OBJECT, "masks": 0}
    return {
        name: torch.stack([_pad_rows(image[name], max_objects, value) for image in images])
        for name, value in padding.items()
        if name in images[0]
    }


def _pad_rows(value: Tensor, count: int, padding: float) -> Tensor:
    """The first `count` rows, padded where there are fewer."""
    rows = value.new_full((count, *value.shape[1:]), padding)
    return torch.cat([value[:count], rows])[:count]
