"""torchvision's SSD300 and SSDlite.

Cut at the backbone's blocks, SSD's own layers, and the head.

Liu et al., SSD: Single Shot MultiBox Detector, ECCV 2016; Sandler et al., MobileNetV2, CVPR 2018;
Howard et al., MobileNetV3, ICCV 2019.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor

from tuner.core.detectors import DetectorStage
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.errors import SpaceError
from tuner.models._torchvision_detectors import (
    CANVAS_SIDE_NAME,
    FLOW_NAME,
    BackboneBlocks,
    group_children,
    stage_detector,
    stage_groups,
)
from tuner.models._torchvision_weights import (
    load_backbone_weights,
    load_detector_weights,
    stretched_spec,
)

TASKS = ("detection",)
NAMES = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
# torchvision's reference training of SSD300: SGD, lr 0.002 for 32 images, here for 8; momentum 0.9,
# weight decay 0.0005; lr rises linearly during the first epoch and is divided by 10 twice, to which
# cosine is next.
# https://github.com/pytorch/vision/tree/main/references/detection
RECIPES = {
    "detection": {
        "optimizer": "sgd",
        "lr": 0.0005,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": 8,
        "epochs": 20,
        "schedule": "cosine",
        "warmup": 0.05,
    }
}
MIN_CANVAS_SIDE = 268  # pixels; on a smaller canvas SSD300's last feature map would be empty


def input_spec(name: str, *, weights: str = "default", backbone: str = "default") -> ImageInputSpec:
    if name == "ssd300_vgg16":
        return stretched_spec(300, (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255))
    return stretched_spec(320, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(
            description="default: the published weights; none: fresh parameters; or a path to a "
            ".safetensors or .pth file"
        ),
    ] = "default",
    backbone: Annotated[
        str,
        Field(
            description="weights of the backbone alone, for weights: none; default, none, or a path"
        ),
    ] = "default",
) -> StagedModel:
    """Model `name` for `outputs` classes.

    `backbone`: ImageNet weights, used where `weights` is none.
    """
    classes = outputs + 1  # class 0 is the background
    model: Any = get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    notes: tuple[str, ...] = ()
    if weights == "none" and backbone != "none" and name != "ssd300_vgg16":
        use_whole_backbone(model, classes)
    if weights == "none":
        if name == "ssd300_vgg16":
            architecture, default = "vgg16", "IMAGENET1K_FEATURES"
        else:
            architecture, default = "mobilenet_v3_large", "IMAGENET1K_V1"
        load_backbone_weights(home, model.backbone, architecture, backbone, default)
    else:
        notes = load_detector_weights(home, model, name, weights, "head.classification_head")
    make_stages = vgg_stages if name == "ssd300_vgg16" else mobilenet_stages
    return stage_detector(model, make_stages(model.backbone), 1, notes)


def use_whole_backbone(model: Any, classes: int) -> None:
    """Put ImageNet's MobileNetV3 into SSDlite.

    Its last layers are twice as wide as in torchvision's own SSDlite.
    """
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    model.backbone = _mobilenet_extractor(
        get_model("mobilenet_v3_large", weights=None, norm_layer=norm), 6, norm
    )
    channels = retrieve_out_channels(model.backbone, (320, 320))
    model.head = SSDLiteHead(
        channels, model.anchor_generator.num_anchors_per_location(), classes, norm
    )


class NormalisedTap(DetectorStage):
    """SSD's first feature map, L2-normalised and scaled, and the block after it.

    The block takes the feature map without the normalisation (Liu et al., ParseNet, 2015).
    """

    def __init__(self, scale_weight: nn.Parameter, block: nn.Module) -> None:
        super().__init__()
        self.scale_weight, self.block = scale_weight, block

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        y = x[FLOW_NAME]
        side = x[CANVAS_SIDE_NAME].shape[-1]
        if side < MIN_CANVAS_SIDE:
            raise SpaceError(
                f"data.size: {side}, but ssd300_vgg16 needs at least {MIN_CANVAS_SIDE} pixels; "
                "leave it out for 300"
            )
        return {
            CANVAS_SIDE_NAME: x[CANVAS_SIDE_NAME],
            "0": self.scale_weight.view(1, -1, 1, 1) * F.normalize(y),
            "1": self.block(y),
        }


def vgg_stages(backbone: Any) -> dict[str, nn.Module]:
    """VGG-16 in blocks that end with their pooling, then SSD's own layers.

    The fifth block contains the convolutions that SSD made of VGG's fully connected layers.
    """
    children = list(backbone.features.named_children())
    begins = [
        successor
        for (_, child), (_, successor) in pairwise(children)
        if isinstance(child, nn.MaxPool2d)
    ]
    groups = group_children(children, lambda child: any(child is begin for begin in begins))
    blocks = stage_groups(groups, {}, lambda i: f"block{i + 1}")
    return {
        **blocks,
        "block5": NormalisedTap(backbone.scale_weight, backbone.extra[0]),
        "extra": _extra_stage(backbone.extra[1:]),
    }


def mobilenet_stages(backbone: Any) -> dict[str, nn.Module]:
    """MobileNetV3 cut before its strided blocks.

    The last of these is divided where SSDlite takes its first feature map.
    """
    *blocks, expansion = backbone.features[0]
    children = [
        *((f"b{i}", block) for i, block in enumerate(blocks)),
        ("expansion", expansion),
        ("tail", backbone.features[1]),
    ]
    begins = [block for block in blocks if getattr(block, "_is_cn", False)] + [backbone.features[1]]
    groups = group_children(children, lambda child: any(child is begin for begin in begins))
    stages = stage_groups(
        groups, {"expansion": "0", "tail": "1"}, lambda i: f"layer{i}" if i else "stem"
    )
    return {**stages, "extra": _extra_stage(backbone.extra)}


def _extra_stage(blocks: Sequence[nn.Module]) -> BackboneBlocks:
    """SSD's own layers, each of which gives a feature map."""
    children = [(f"b{i}", block) for i, block in enumerate(blocks)]
    return BackboneBlocks(children, "1", {name: f"{2 + i}" for i, (name, _) in enumerate(children)})
