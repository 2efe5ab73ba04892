"""torchvision's RetinaNet and FCOS.

Cut at the backbone's stem and layers, the feature pyramid, and the head.

Lin et al., Focal Loss for Dense Object Detection, ICCV 2017; v2: Zhang et al., ATSS, CVPR 2020;
Tian et al., FCOS, ICCV 2019.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.models._torchvision_detectors import pyramid_stages, stage_detector
from tuner.models._torchvision_weights import build_pyramid_detector, letterbox_spec

TASKS = ("detection",)
NAMES = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn")
# torchvision's reference training: SGD, lr 0.01 for 16 images, here for 2; momentum 0.9, weight
# decay 0.0001; lr rises linearly during the first epoch and is divided by 10 twice, to which cosine
# is next.
# https://github.com/pytorch/vision/tree/main/references/detection
RECIPES = {
    "detection": {
        "optimizer": "sgd",
        "lr": 0.00125,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 2,
        "epochs": 10,
        "schedule": "cosine",
        "warmup": 0.1,
    }
}
# torch.export cannot follow a number of objects that depends on the image
EXPORTS = ("safetensors", "onnx")


def input_spec(name: str, *, weights: str = "default", backbone: str = "default") -> ImageInputSpec:
    return letterbox_spec(800)


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
    model, notes = build_pyramid_detector(
        home, name, outputs, weights, backbone, "head.classification_head.cls_logits"
    )
    return stage_detector(model, pyramid_stages(model.backbone), 0, notes)
