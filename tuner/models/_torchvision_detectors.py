"""torchvision's detectors as stages: the backbone's stages, the neck, and the head.

The head is everything behind the neck, and runs torchvision's own code.

Images arrive normalised on a square canvas, so the model's own GeneralizedRCNNTransform is replaced
by the identity.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from tuner.core import detectors
from tuner.core.detectors import IMAGE_NAME, DetectorStage, Objects, pad_objects
from tuner.core.input_spec import TensorTree
from tuner.core.types import StagedModel
from tuner.models._torchvision_export import patch_for_export

# The tensor uint8 (n, side). Its width tells the side of the canvas to stages that do not see the
# image.
CANVAS_SIDE_NAME = "canvas"
FLOW_NAME = "x"  # the tensor between two stages where it is no feature map that the neck needs
NamedChildren = list[tuple[str, nn.Module]]


class BackboneBlocks(DetectorStage):
    """Some consecutive children of a backbone."""

    def __init__(self, children: NamedChildren, input_name: str, taps: Mapping[str, str]) -> None:
        """Make a stage of children.

        Args:
            children: The children by name, in the order of the forward pass.
            input_name: The tensor that the first child reads.
            taps: For each child whose output the neck needs: the name that this output gets.
        """
        super().__init__()
        self.blocks = nn.ModuleDict({name.replace(".", "_"): child for name, child in children})
        self.tap_names = [taps.get(name) for name, _ in children]
        self.input_name = input_name
        self.output_name = self.tap_names[-1] or FLOW_NAME

    def extra_repr(self) -> str:
        """The names: cached activations are kept by the stage's digest, and this is part of it.

        Models over one backbone may tap it at different places.
        """
        return f"{self.input_name} -> {self.output_name}, taps {self.tap_names}"

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        y = x[self.input_name]
        if self.input_name == IMAGE_NAME:
            passed_on = {CANVAS_SIDE_NAME: y.new_zeros(len(y), y.shape[-1], dtype=torch.uint8)}
        else:
            passed_on = {
                name: tensor for name, tensor in x.items() if name not in (IMAGE_NAME, FLOW_NAME)
            }
        for child, tap_name in zip(self.blocks.values(), self.tap_names, strict=True):
            y = child(y)
            if tap_name is not None:
                passed_on[tap_name] = y
        return passed_on | {self.output_name: y}


class FeaturePyramidNeck(DetectorStage):
    """torchvision's feature pyramid network over the feature maps of the backbone."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        self.fpn = fpn

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {CANVAS_SIDE_NAME: x[CANVAS_SIDE_NAME], **self.fpn(select_feature_maps(x))}


def select_feature_maps(x: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """The tensors that are feature maps, in their order."""
    return OrderedDict((name, tensor) for name, tensor in x.items() if name != CANVAS_SIDE_NAME)


class TorchvisionHead(detectors.DetectorHead):
    """The model's own forward pass, which begins behind the model's backbone.

    torchvision's detectors have one forward pass from images to objects, and no method that begins
    at feature maps. So the head calls the whole forward pass on a copy of the model in which two
    children are replaced:

        torchvision's model             the copy that the head calls
        -------------------             ----------------------------
        images                          zeros of the canvas's shape (no memory: `expand`)
          | transform                     | IdentityTransform: keeps them as they are
        normalised images               zeros
          | backbone (with FPN)           | GivenFeatures: ignores them, gives the feature maps
        feature maps                    the feature maps that the stages before the head computed
          | rpn, roi_heads or head        | the same modules, which are the head's children
        losses or objects               losses or objects

    The copy is shallow: it shares every module with the model, and only its own dict of children
    is new. The model itself stays as it is. The zeros are necessary because torchvision reads from
    the images how many there are and how large they are; it reads nothing else of them.
    """

    def __init__(self, model: nn.Module, first_label: int) -> None:
        """`first_label`: torchvision's label of our class 0; 1 where its 0 is the background."""
        super().__init__()
        self.owner = (model,)  # in a tuple, so that the whole model does not become a child
        self.first_label = first_label
        for name, child in model.named_children():
            if name not in ("transform", "backbone"):
                self.add_module(name, child)

    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        shifted_targets = [
            {**target, "labels": target["labels"] + self.first_label} for target in targets
        ]
        losses: dict[str, Tensor] = self.run_from_features(x, shifted_targets)
        return losses

    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        return [
            shift_labels(objects, self.first_label) for objects in self.run_from_features(x, None)
        ]

    def run_from_features(self, x: dict[str, Tensor], targets: list[Objects] | None) -> Any:
        """Run the model behind its backbone: see the class.

        Args:
            x: The feature maps (n, channels, height, width) by name, and CANVAS_SIDE_NAME.
            targets: The true objects of each image with torchvision's labels while training, or
                None.

        Returns:
            torchvision's losses by name while training, otherwise the objects of each image.
        """
        feature_maps = select_feature_maps(x)
        model = copy.copy(self.owner[0])
        model.training = self.training
        model._modules = {
            **self._modules,
            "transform": IdentityTransform(),
            "backbone": GivenFeatures(feature_maps),
        }
        side = x[CANVAS_SIDE_NAME].shape[-1]
        first_map = next(iter(feature_maps.values()))
        images = list(first_map.new_zeros(()).expand(len(first_map), 3, side, side))
        with patch_for_export() if torch.compiler.is_exporting() else nullcontext():
            return model(images, targets)


class GivenFeatures(nn.Module):
    """A stand-in for a backbone: it gives feature maps that were computed before."""

    def __init__(self, feature_maps: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, _: Tensor) -> Mapping[str, Tensor]:
        return self.feature_maps


class IdentityTransform(nn.Module):
    """A stand-in for GeneralizedRCNNTransform, for images that already have one size."""

    def forward(self, images: list[Tensor], targets: Any) -> tuple[ImageList, Any]:
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch = torch.stack(images) if len(images) > 1 else images[0][None]
        return ImageList(batch, sizes), targets

    def postprocess(self, result: list[Objects], *_: object) -> list[Objects]:
        return result


def shift_labels(objects: Objects, first_label: int) -> Objects:
    """torchvision's objects with our labels. Masks, float32 (k, 1, 28, 28), lose their channel."""
    shifted = {**objects, "labels": objects["labels"] - first_label}
    if "masks" in objects:
        shifted["masks"] = objects["masks"][:, 0]
    return shifted


def make_native_forward(first_label: int) -> Callable[[nn.Module, TensorTree], TensorTree]:
    """A function that calls the whole model on a batch, in torchvision's own way."""

    def call(model: Any, x: TensorTree) -> TensorTree:
        assert isinstance(x, Tensor)
        model.transform.fixed_size = (x.shape[-1], x.shape[-2])
        if "MaskRCNN" in type(model).__name__:
            # it would enlarge the masks to the size of the image
            model.transform.postprocess = IdentityTransform().postprocess
        return pad_objects([shift_labels(objects, first_label) for objects in model(list(x))])

    return call


def disable_transform(model: Any) -> None:
    """Switch off what tuner has done before: normalising, resizing and padding."""
    model.transform.image_mean = [0.0] * 3
    model.transform.image_std = [1.0] * 3
    model.transform.size_divisible = 1


def stage_detector(
    model: Any, stages: dict[str, nn.Module], first_label: int, notes: tuple[str, ...]
) -> StagedModel:
    """A staged model of a torchvision detector.

    Args:
        model: The detector. Its transform is switched off.
        stages: The stages before the head, by name.
        first_label: torchvision's label of our class 0; 1 where its 0 is the background.
        notes: What the user is told about the weights.
    """
    disable_transform(model)
    return StagedModel(
        model,
        {**stages, "head": TorchvisionHead(model, first_label)},
        notes,
        make_native_forward(first_label),
        can_probe=False,
        exports_batched=False,
    )


def group_children(
    children: NamedChildren, begins_group: Callable[[nn.Module], bool]
) -> list[NamedChildren]:
    """Divide consecutive children into groups; `begins_group` tells which children begin one."""
    groups: list[NamedChildren] = []
    for name, child in children:
        if not groups or begins_group(child):
            groups.append([])
        groups[-1].append((name, child))
    return groups


def stage_groups(
    groups: list[NamedChildren], taps: Mapping[str, str], name_stage: Callable[[int], str]
) -> dict[str, nn.Module]:
    """One stage for each group of a backbone's children; `name_stage` names it by its number."""
    stages: dict[str, nn.Module] = {}
    input_name = IMAGE_NAME
    for number, children in enumerate(groups):
        stage = BackboneBlocks(children, input_name, taps)
        stages[name_stage(number)] = stage
        input_name = stage.output_name
    return stages


def pyramid_stages(backbone: Any) -> dict[str, nn.Module]:
    """The stages of a BackboneWithFPN: stem, strided blocks or whole layers, feature pyramid."""
    children = list(backbone.body.named_children())
    last_child = children[-1][1]
    # torchvision's MobileNets mark their strided blocks
    has_marks = any(getattr(child, "_is_cn", False) for _, child in children)

    def begins_group(child: nn.Module) -> bool:
        if has_marks:
            return child is last_child or bool(getattr(child, "_is_cn", False))
        return _is_layer(child)

    stages = stage_groups(
        group_children(children, begins_group),
        dict(backbone.body.return_layers),
        lambda number: f"layer{number}" if number else "stem",
    )
    return {**stages, "fpn": FeaturePyramidNeck(backbone.fpn)}


def _is_layer(child: nn.Module) -> bool:
    """Whether a child is a layer, not a convolution, norm or activation of the stem."""
    return any(isinstance(inner, nn.Conv2d) and inner is not child for inner in child.modules())
