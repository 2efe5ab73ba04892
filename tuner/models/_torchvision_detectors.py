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
from tuner.core.detectors import IMAGE_NAME, DetectorStage, Objects, pad_objects
from tuner.core.input_spec import TensorTree
from tuner.core.types import StagedModel

CANVAS_NAME = "canvas"  # uint8 (n, side): its width tells the canvas's side to stages that do not see the image
FLOW_NAME = "x"  # what flows on where it is no feature that the neck wants
NamedChildren = list[tuple[str, nn.Module]]


class BackboneBlocks(DetectorStage):
    """Some of a backbone's children in a row; `reads` is the leaf that they begin with, `taps` names the outputs that the neck wants."""

    def __init__(self, children: NamedChildren, reads: str, taps: Mapping[str, str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name.replace(".", "_"): child for name, child in children})
        self.names = [taps.get(name) for name, _ in children]
        self.input_name, self.output_name = reads, self.names[-1] or FLOW_NAME

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        y = x[self.input_name]
        kept = {name: leaf for name, leaf in x.items() if name not in (IMAGE_NAME, FLOW_NAME)}
        if self.input_name == IMAGE_NAME:
            kept = {CANVAS_NAME: y.new_zeros(len(y), y.shape[-1], dtype=torch.uint8)}
        for child, name in zip(self.blocks.values(), self.names, strict=True):
            y = child(y)
            if name is not None:
                kept[name] = y
        return kept | {self.output_name: y}


class PyramidNeck(DetectorStage):
    """A feature pyramid over the backbone's taps."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        self.fpn = fpn

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {CANVAS_NAME: x[CANVAS_NAME], **self.fpn(feature_maps(x))}


def feature_maps(x: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    return OrderedDict((name, leaf) for name, leaf in x.items() if name != CANVAS_NAME)


class TorchvisionHead(detectors.DetectorHead):
    """The model's own forward pass, entered behind its backbone. `first` is the label of our class 0: 1 where 0 is the background."""

    def __init__(self, model: nn.Module, first: int) -> None:
        super().__init__()
        self.owner, self.first_label = (
            (model,),
            first,
        )  # in a tuple, so that the whole model is not taken for a child
        for name, child in model.named_children():
            if name not in ("transform", "backbone"):
                self.add_module(name, child)

    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        given = [{"boxes": t["boxes"], "labels": t["labels"] + self.first_label} for t in targets]
        found: dict[str, Tensor] = self.run_from_features(x, given)
        return found

    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        return [
            {**found, "labels": found["labels"] - self.first_label}
            for found in self.run_from_features(x, None)
        ]

    def run_from_features(self, x: dict[str, Tensor], targets: list[Objects] | None) -> Any:
        """What the model makes of features: it is called with its backbone replaced by what the backbone gave."""
        rest, found = copy.copy(self.owner[0]), feature_maps(x)
        rest.training = self.training
        rest._modules = {
            **self._modules,
            "transform": IdentityTransform(),
            "backbone": GivenFeatures(found),
        }
        side, first = x[CANVAS_NAME].shape[-1], next(iter(found.values()))
        images = list(first.new_zeros(()).expand(len(first), 3, side, side))
        with patch_for_export() if torch.compiler.is_exporting() else nullcontext():
            return rest(images, targets)


def nms_of_classes(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each class: torchvision's coordinate trick without its questions about the number of boxes."""
    reach = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    kept: Tensor = torch.ops.torchvision.nms(
        boxes + (classes.to(boxes) * reach)[:, None], scores, threshold
    )
    return kept


def pool_all_levels(
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
def patch_for_export() -> Iterator[None]:
    """While a model is exported: torchvision asks how many boxes there are and branches, which no graph can hold."""
    originals = box_ops.batched_nms, poolers._multiscale_roi_align
    box_ops.batched_nms, poolers._multiscale_roi_align = nms_of_classes, pool_all_levels
    try:
        yield
    finally:
        box_ops.batched_nms, poolers._multiscale_roi_align = originals


class GivenFeatures(nn.Module):
    def __init__(self, found: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.feature_maps = found

    def forward(self, _: Tensor) -> Mapping[str, Tensor]:
        return self.feature_maps


class IdentityTransform(nn.Module):
    """What GeneralizedRCNNTransform is for images that have been brought to one size: nothing."""

    def forward(self, images: list[Tensor], targets: Any) -> tuple[ImageList, Any]:
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return ImageList(
            torch.stack(images) if len(images) > 1 else images[0][None], sizes
        ), targets

    def postprocess(self, result: list[Objects], *_: object) -> list[Objects]:
        return result


def make_native_forward(first: int) -> Callable[[nn.Module, TensorTree], TensorTree]:
    """Calls the whole model, as torchvision has it, on a batch."""

    def call(model: Any, x: TensorTree) -> TensorTree:
        assert isinstance(x, Tensor)
        model.transform.fixed_size = (x.shape[-1], x.shape[-2])
        return pad_objects(
            [{**found, "labels": found["labels"] - first} for found in model(list(x))]
        )

    return call


def disable_transform(model: Any) -> None:
    """Takes from the model's transform what tuner has done before: normalising, resizing, padding."""
    model.transform.image_mean, model.transform.image_std, model.transform.size_divisible = (
        [0.0] * 3,
        [1.0] * 3,
        1,
    )


def stage_detector(
    model: Any, stages: dict[str, nn.Module], first: int, notes: tuple[str, ...]
) -> StagedModel:
    disable_transform(model)
    return StagedModel(
        model,
        {**stages, "head": TorchvisionHead(model, first)},
        notes,
        make_native_forward(first),
        can_probe=False,
        exports_batched=False,
    )


def group_children(
    children: NamedChildren, begins: Callable[[nn.Module], bool]
) -> list[NamedChildren]:
    """Children in a row, a group begun by each that `begins` one."""
    groups: list[NamedChildren] = []
    for name, child in children:
        if not groups or begins(child):
            groups.append([])
        groups[-1].append((name, child))
    return groups


def backbone_stages(
    groups: list[NamedChildren], taps: Mapping[str, str], names: Callable[[int], str]
) -> dict[str, nn.Module]:
    """A stage for each group of a backbone's children."""
    found: dict[str, nn.Module] = {}
    reads = IMAGE_NAME
    for number, children in enumerate(groups):
        stage = BackboneBlocks(children, reads, taps)
        found[names(number)], reads = stage, stage.output_name
    return found


def pyramid_stages(backbone: Any) -> dict[str, nn.Module]:
    """The stages of a BackboneWithFPN: the stem, the strided blocks or whole layers, the feature pyramid."""
    children = list(backbone.body.named_children())
    marked = any(
        getattr(child, "_is_cn", False) for _, child in children
    )  # torchvision's MobileNets mark what is strided
    last = children[-1][1]
    groups = group_children(
        children,
        lambda child: (
            child is last or getattr(child, "_is_cn", False) if marked else _is_layer(child)
        ),
    )
    stages = backbone_stages(
        groups, dict(backbone.body.return_layers), lambda i: f"layer{i}" if i else "stem"
    )
    return {**stages, "fpn": PyramidNeck(backbone.fpn)}


def _is_layer(child: nn.Module) -> bool:
    """A layer of a backbone, not a convolution, norm or activation of its stem."""
    return any(isinstance(inner, nn.Conv2d) and inner is not child for inner in child.modules())
