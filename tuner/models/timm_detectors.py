"""torchvision's Faster R-CNN, RetinaNet and FCOS over any convolutional backbone of timm.

Names are `fasterrcnn/timm/<name>` and so on. So every convolutional classifier that timm has
weights for can become a detector.

Lin et al., Feature Pyramid Networks, CVPR 2017.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.models._timm_pyramid import backbone_spec, build_body, build_detector
from tuner.models._torchvision_detectors import pyramid_stages, stage_detector
from tuner.models._torchvision_weights import load_detector_weights

TASKS = ("detection",)
NAMES = ("fasterrcnn/timm/*", "retinanet/timm/*", "fcos/timm/*")
# torchvision's reference training, which begins with a classifier's weights too: SGD, lr 0.02 for
# 16 images, here for 2; momentum 0.9, weight decay 0.0001; lr rises linearly during the first epoch
# and is divided by 10 twice, to which cosine is next.
# https://github.com/pytorch/vision/tree/main/references/detection
RECIPES = {
    "detection": {
        "optimizer": "sgd",
        "lr": 0.0025,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 2,
        "epochs": 10,
        "schedule": "cosine",
        "warmup": 0.1,
    }
}
# The reference trains on COCO for hundreds of thousands of steps. On some hundreds of images with
# some hundreds of steps, the new pyramid and head of Faster R-CNN need more: benchmarks/README.md,
# "Boxes". Its gradients are clipped for that.
NAMED_RECIPES = {"fasterrcnn/timm/*": {"detection": {"lr": 0.01, "clip_norm": 10.0}}}
EXPORTS = ("safetensors", "onnx")


def input_spec(name: str, *, weights: str = "none", backbone: str = "default") -> ImageInputSpec:
    """The normalisation that timm states for the backbone's weights."""
    return backbone_spec(name)


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(description="a path to the weights of a whole detector, or none"),
    ] = "none",
    backbone: Annotated[
        str,
        Field(
            description="weights of the backbone alone, for weights: none; default, none, or a path"
        ),
    ] = "default",
    regions: Annotated[
        int,
        Field(
            ge=8, le=4096, description="Faster R-CNN: proposals per image that the head learns from"
        ),
    ] = 512,
    proposals: Annotated[
        int,
        Field(
            ge=8,
            le=4096,
            description="Faster R-CNN: proposals per image that the second stage looks at",
        ),
    ] = 1000,
) -> StagedModel:
    """A detector for `outputs` classes.

    `weights`: a path to the weights of a whole detector, or none. `backbone`: ImageNet weights,
    used where `weights` is none.

    Most of Faster R-CNN's cost is its head: it learns from `regions` regions of an image, and looks
    at up to `proposals` regions when it predicts.

    Raises:
        SpaceError: timm does not have the name, or its features are not a pyramid.
        DataError: The weights are missing or do not fit.
    """
    kind = name.partition("/")[0]
    strides = [4, 8, 16, 32] if kind == "fasterrcnn" else [8, 16, 32]
    body = build_body(home, name, weights, backbone, strides)
    model = build_detector(kind, body, outputs, regions, proposals)
    head = (
        "roi_heads.box_predictor" if kind == "fasterrcnn" else "head.classification_head.cls_logits"
    )
    notes = load_detector_weights(home, model, name, weights, head)
    return stage_detector(
        model, pyramid_stages(model.backbone), 1 if kind == "fasterrcnn" else 0, notes
    )
