"""torchvision's Mask R-CNN over any convolutional backbone of timm, `maskrcnn/timm/<name>`.

It is cut as Faster R-CNN over the same backbone, and shares what its frozen stages compute.

He et al., Mask R-CNN, ICCV 2017; Lin et al., Feature Pyramid Networks, CVPR 2017.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.models._timm_pyramid import backbone_spec, build_body, build_detector
from tuner.models._torchvision_detectors import pyramid_stages, stage_detector
from tuner.models._torchvision_weights import load_detector_weights

TASKS = ("instance_segmentation",)
NAMES = ("maskrcnn/timm/*",)
# as torchvision's references train Mask R-CNN from a classifier's weights: see timm_detectors.py
RECIPES = {
    "instance_segmentation": {
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
EXPORTS = ("safetensors", "onnx")
HEADS = ("roi_heads.box_predictor", "roi_heads.mask_predictor")  # they depend on the classes


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
        Field(ge=8, le=4096, description="proposals per image that the head learns from"),
    ] = 512,
    proposals: Annotated[
        int,
        Field(ge=8, le=4096, description="proposals per image that the second stage looks at"),
    ] = 1000,
) -> StagedModel:
    """Mask R-CNN for `outputs` classes over timm's classifier `name`.

    Most of its cost is its head: it learns boxes from `regions` regions of an image and masks from
    those that are objects, and looks at up to `proposals` regions when it predicts.

    Raises:
        SpaceError: timm does not have the name, or its features are not a pyramid.
        DataError: The weights are missing or do not fit.
    """
    body = build_body(home, name, weights, backbone, [4, 8, 16, 32])
    model = build_detector("maskrcnn", body, outputs, regions, proposals)
    notes = load_detector_weights(home, model, name, weights, HEADS)
    return stage_detector(model, pyramid_stages(model.backbone), 1, notes)
