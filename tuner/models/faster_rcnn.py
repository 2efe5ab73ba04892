"""torchvision's Faster R-CNN.

Cut at the backbone's stem and layers, the feature pyramid, and the head (proposals and regions).

Ren et al., Faster R-CNN, NeurIPS 2015; Lin et al., Feature Pyramid Networks, CVPR 2017; v2: Li et
al., 2021 (arXiv:2111.11429).
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.models._torchvision_detectors import pyramid_stages, stage_detector
from tuner.models._torchvision_weights import build_pyramid_detector, letterbox_spec

TASKS = ("detection",)
NAMES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
# TorchVision Object Detection Finetuning Tutorial: SGD, lr 0.005, momentum 0.9, weight decay
# 0.0005, batches of 2, 10 epochs, lr divided by 10 every 3 epochs, to which cosine is next.
# https://docs.pytorch.org/tutorials/intermediate/torchvision_tutorial.html
# Its loop is that of torchvision's references: lr rises linearly during the first epoch.
# https://github.com/pytorch/vision/blob/main/references/detection/engine.py
RECIPES = {
    "detection": {
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


def input_spec(name: str, *, weights: str = "default", backbone: str = "default") -> ImageInputSpec:
    return letterbox_spec(320 if "_320_" in name else 800)


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
        home, name, outputs + 1, weights, backbone, "roi_heads.box_predictor"
    )
    return stage_detector(model, pyramid_stages(model.backbone), 1, notes)
