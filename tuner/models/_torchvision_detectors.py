"""torchvision's detectors as stages: the backbone's, the neck, and everything behind it as the head, in torchvision's own words.

Images come normalised on a square canvas, so the model's own GeneralizedRCNNTransform is made the identity.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import boxes as box_ops
from torchvision.ops import poolers

from tuner.core import detectors
from tuner.core.detectors import IMAGE, Objects, Stage, padded
from tuner.core.input_spec import Tree
from tuner.core.types import Staged

CANVAS = "canvas"  # uint8 (n, side): its width tells the canvas's side to stages that do not see the image
FLOW = "x"  # what flows on where it is no feature that the neck wants
Children = list[tuple[str, nn.Module]]


class Blocks(Stage):
    """Some of a backbone's children in a row; `reads` is the leaf that they begin with, `taps` names the outputs that the neck wants."""

    def __init__(self, children: Children, reads: str, taps: Mapping[str, str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name.replace(".", "_"): child for name, child in children})
        self.names = [taps.get(name) for name, _ in children]
        self.reads, self.gives = reads, self.names[-1] or FLOW

    def step(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        y = x[self.reads]
        kept = {name: leaf for name, leaf in x.items() if name not in (IMAGE, FLOW)}
        if self.reads == IMAGE:
            kept = {CANVAS: y.new_zeros(len(y), y.shape[-1], dtype=torch.uint8)}
        for child, name in zip(self.blocks.values(), self.names, strict=True):
            y = child(y)
            if name is not None:
                kept[name] = y
        return kept | {self.gives: y}


class Neck(Stage):
    """A feature pyramid over the backbone's taps."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        self.fpn = fpn

    def step(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {CANVAS: x[CANVAS], **self.fpn(features(x))}


def features(x: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    return OrderedDict((name, leaf) for name, leaf in x.items() if name != CANVAS)


class Head(detectors.Head):
    """The model's own forward pass, entered behind its backbone. `first` is the label of our class 0: 1 where 0 is the background."""

    def __init__(self, model: nn.Module, first: int) -> None:
        super().__init__()
        self.owner, self.first = (
            (model,),
            first,
        )  # in a tuple, so that the whole model is not taken for a child
        for name, child in model.named_children():
            if name not in ("transform", "backbone"):
                self.add_module(name, child)

    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        given = [{"boxes": t["boxes"], "labels": t["labels"] + self.first} for t in targets]
        found: dict[str, Tensor] = self.behind(x, given)
        return found

    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        return [{**found, "labels": found["labels"] - self.first} for found in self.behind(x, None)]

    def behind(self, x: dict[str, Tensor], targets: list[Objects] | None) -> Any:
        """What the model makes of features: it is called with its backbone replaced by what the backbone gave."""
        rest, found = copy.copy(self.owner[0]), features(x)
        rest.training = self.training
        rest._modules = {**self._modules, "transform": Canvas(), "backbone": Given(found)}
        side, first = x[CANVAS].shape[-1], next(iter(found.values()))
        images = list(first.new_zeros(()).expand(len(first), 3, side, side))
        with straight() if torch.compiler.is_exporting() else nullcontext():
            return rest(images, targets)


def nms_of_classes(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each class: torchvision's coordinate trick without its questions about the number of boxes."""
    reach = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    kept: Tensor = torch.ops.torchvision.nms(
        boxes + (classes.to(boxes) * reach)[:, None], scores, threshold
    )
    return kept


def pooled(
    levels: list[Tensor],
    boxes: list[Tensor],
    size: Any,
    sampling: int,
    scales: list[float] | None,
    mapper: Any,
) -> Tensor:
    """Features of regions from the level that fits each: torchvision's pooling, with every level asked for all of them."""
    assert scales is not None
    rois = poolers._convert_to_roi_format(boxes)
    aligned = [
        poolers.roi_align(f, rois, size, scale, sampling)
        for f, scale in zip(levels, scales, strict=True)
    ]
    which, found = mapper(boxes), aligned[0]
    for level, values in enumerate(aligned[1:], 1):
        found = torch.where((which == level)[:, None, None, None], values, found)
    return found  # type: ignore[no-any-return]


@contextmanager
def straight() -> Iterator[None]:
    """While a model is exported: torchvision asks how many boxes there are and branches, which no graph can hold."""
    originals = box_ops.batched_nms, poolers._multiscale_roi_align
    box_ops.batched_nms, poolers._multiscale_roi_align = nms_of_classes, pooled
    try:
        yield
    finally:
        box_ops.batched_nms, poolers._multiscale_roi_align = originals


class Given(nn.Module):
    def __init__(self, found: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.found = found

    def forward(self, _: Tensor) -> Mapping[str, Tensor]:
        return self.found


class Canvas(nn.Module):
    """What GeneralizedRCNNTransform is for images that have been brought to one size: nothing."""

    def forward(self, images: list[Tensor], targets: Any) -> tuple[ImageList, Any]:
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return ImageList(
            torch.stack(images) if len(images) > 1 else images[0][None], sizes
        ), targets

    def postprocess(self, result: list[Objects], *_: object) -> list[Objects]:
        return result


def native(first: int) -> Callable[[nn.Module, Tree], Tree]:
    """Calls the whole model, as torchvision has it, on a batch."""

    def call(model: Any, x: Tree) -> Tree:
        assert isinstance(x, Tensor)
        model.transform.fixed_size = (x.shape[-1], x.shape[-2])
        return padded([{**found, "labels": found["labels"] - first} for found in model(list(x))])

    return call


def identity(model: Any) -> None:
    """Takes from the model's transform what tuner has done before: normalising, resizing, padding."""
    model.transform.image_mean, model.transform.image_std, model.transform.size_divisible = (
        [0.0] * 3,
        [1.0] * 3,
        1,
    )


def staged(model: Any, stages: dict[str, nn.Module], first: int, notes: tuple[str, ...]) -> Staged:
    identity(model)
    return Staged(
        model,
        {**stages, "head": Head(model, first)},
        notes,
        native(first),
        probe=False,
        batched=False,
    )


def grouped(children: Children, begins: Callable[[nn.Module], bool]) -> list[Children]:
    """Children in a row, a group begun by each that `begins` one."""
    groups: list[Children] = []
    for name, child in children:
        if not groups or begins(child):
            groups.append([])
        groups[-1].append((name, child))
    return groups


def backbone_stages(
    groups: list[Children], taps: Mapping[str, str], names: Callable[[int], str]
) -> dict[str, nn.Module]:
    """A stage for each group of a backbone's children."""
    found: dict[str, nn.Module] = {}
    reads = IMAGE
    for number, children in enumerate(groups):
        stage = Blocks(children, reads, taps)
        found[names(number)], reads = stage, stage.gives
    return found


def pyramid_stages(backbone: Any) -> dict[str, nn.Module]:
    """The stages of a BackboneWithFPN: the stem, the strided blocks or whole layers, the feature pyramid."""
    children = list(backbone.body.named_children())
    marked = any(
        getattr(child, "_is_cn", False) for _, child in children
    )  # torchvision's MobileNets mark what is strided
    last = children[-1][1]
    groups = grouped(
        children,
        lambda child: child is last or getattr(child, "_is_cn", False) if marked else _whole(child),
    )
    stages = backbone_stages(
        groups, dict(backbone.body.return_layers), lambda i: f"layer{i}" if i else "stem"
    )
    return {**stages, "fpn": Neck(backbone.fpn)}


def _whole(child: nn.Module) -> bool:
    """A layer of a backbone, not a convolution, norm or activation of its stem."""
    return any(isinstance(inner, nn.Conv2d) and inner is not child for inner in child.modules())
