"""torchvision's Mask R-CNN: Faster R-CNN with a mask for each object.

Cut at the backbone's stem and layers, the feature pyramid, and the head (proposals, regions and
masks).

He et al., Mask R-CNN, ICCV 2017; v2: Li et al., 2021 (arXiv:2111.11429).
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.models._torchvision_detectors import pyramid_stages, stage_detector
from tuner.models._torchvision_weights import build_pyramid_detector, letterbox_spec

TASKS = ("instance_segmentation",)
NAMES = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")
# TorchVision Object Detection Finetuning Tutorial, whose model this is: see faster_rcnn.py
RECIPES = {
    "instance_segmentation": {
        "optimizer": "sgd",
        "lr": 0.005,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": 2,
        "epochs": 10,
        "schedule": "cosine",
        "warmup": 0.1,
    }
}
# torch.export cannot pool regions whose number depends on the image
EXPORTS = ("safetensors", "onnx")
HEADS = ("roi_heads.box_predictor", "roi_heads.mask_predictor")  # they depend on the classes


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
    model, notes = build_pyramid_detector(  # one output more: class 0 is the background
        home, name, outputs + 1, weights, backbone, HEADS
    )
    return stage_detector(model, pyramid_stages(model.backbone), 1, notes)
