"""What all object detectors share: stages that hand the truth on, and a head that turns it into losses, or else gives objects.

While training, a batch's true objects travel with the activations as leaves that begin with `target.`, because two-stage detectors
draw their samples from them; the head answers with a dict of losses. Without them it answers with objects, padded so that every
leaf is batch-first: `boxes` float32 (n, most, 4) as left, top, right, bottom in pixels of the canvas, `scores` float32 (n, most) in
falling order, `labels` int64 (n, most), NO_OBJECT where an image has fewer objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.targets import NO_OBJECT

IMAGE_NAME = "image"  # the leaf that a bare tensor becomes
TARGET_PREFIX = "target."
MAX_OBJECTS = 100  # objects given for an image
Objects = dict[str, Tensor]
"""Of one image: `boxes` (k, 4), `labels` (k,), and of predictions `scores` (k,)."""


class DetectorStage(nn.Module, ABC):
    """A stage before the head."""

    def forward(self, x: TensorTree) -> TensorTree:
        x = name_tensors(x)
        targets = {name: leaf for name, leaf in x.items() if name.startswith(TARGET_PREFIX)}
        return (
            self.compute({name: leaf for name, leaf in x.items() if name not in targets}) | targets
        )

    @abstractmethod
    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stage's own work, on leaves that are batch-first."""


class DetectorHead(nn.Module, ABC):
    """The last stage."""

    def forward(self, x: TensorTree) -> TensorTree:
        x = name_tensors(x)
        given = {name: leaf for name, leaf in x.items() if not name.startswith(TARGET_PREFIX)}
        if f"{TARGET_PREFIX}boxes" in x:
            return self.losses(
                given, unpad_objects(x[f"{TARGET_PREFIX}boxes"], x[f"{TARGET_PREFIX}labels"])
            )
        return pad_objects(self.detect(given))

    @abstractmethod
    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        """The model's own losses, scalars by name."""

    @abstractmethod
    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        """The objects of each image after non-maximum suppression, scores falling."""


def name_tensors(x: TensorTree) -> dict[str, Tensor]:
    return {name or IMAGE_NAME: leaf for name, leaf in tree_to_dict(x).items()}


def join_targets(x: TensorTree, y: TensorTree) -> dict[str, Tensor]:
    """A batch with its truth beside it."""
    return name_tensors(x) | {
        f"{TARGET_PREFIX}{name}": leaf for name, leaf in tree_to_dict(y).items()
    }


def unpad_objects(boxes: Tensor, labels: Tensor) -> list[Objects]:
    """Padded leaves as each image's own objects."""
    return [
        {"boxes": b[k != NO_OBJECT], "labels": k[k != NO_OBJECT]}
        for b, k in zip(boxes, labels, strict=True)
    ]


def pad_objects(found: Sequence[Objects], max_objects: int = MAX_OBJECTS) -> dict[str, Tensor]:
    """Each image's objects as batch-first leaves; no data-dependent shape is left, so that it can be exported."""
    one = [
        {
            name: _pad_rows(
                f[name][:max_objects], max_objects, NO_OBJECT if name == "labels" else 0
            )
            for name in ("boxes", "scores", "labels")
        }
        for f in found
    ]
    return {name: torch.stack([o[name] for o in one]) for name in ("boxes", "scores", "labels")}


def _pad_rows(value: Tensor, most: int, by: float) -> Tensor:
    filling = value.new_full((most, *value.shape[1:]), by)
    return torch.cat([value, filling])[:most]
