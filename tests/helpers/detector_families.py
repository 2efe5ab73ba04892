"""A small member of each family of detectors in the folder, with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tuner.config import plugins
from tuner.core.types import StagedModel

# for each kind of head the member that is computed soonest; the packages that it needs
SMALL_DETECTORS: dict[str, tuple[str, ...]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": (),
    "retinanet_resnet50_fpn": (),
    "fcos_resnet50_fpn": (),
    "ssd300_vgg16": (),
    "ssdlite320_mobilenet_v3_large": (),
    "fasterrcnn/timm/mobilenetv3_small_050": ("timm",),
    "retinanet/timm/mobilenetv3_small_050": ("timm",),
    "fcos/timm/mobilenetv3_small_050": ("timm",),
    "rtdetr_r18": ("transformers",),
    "dfine_n": ("transformers",),
    "yolox_nano": ("libreyolo", "cv2"),
    "yolov9_t": ("libreyolo", "cv2"),
}


def list_detector_families() -> set[str]:
    """The files in models/ that build detectors."""
    names = [name for name in plugins.list_names("model") if is_detector(name)]
    return {family for name in names if (family := plugins.find_model_family(name))}


def is_detector(name: str) -> bool:
    return "detection" in plugins.list_tasks("model", name)


def build_detector(name: str, outputs: int = 3, **options: Any) -> StagedModel:
    """The model with random weights, the same for equal arguments; skips without its packages."""
    for package in SMALL_DETECTORS.get(name, ()):
        pytest.importorskip(package, exc_type=ImportError)
    torch.manual_seed(0)
    backbone = {"backbone": "none"} if "backbone" in plugins.read_keys("model", name).fields else {}
    build = plugins.import_plugin("model", name).build
    staged: StagedModel = build(
        Path(), name, "detection", outputs, **{"weights": "none", **backbone, **options}
    )
    return staged


def look_at_few_regions(model: nn.Module, count: int = 16) -> None:
    """For time, where a model has a second stage: it looks at `count` regions of an image and learns from as many.

    torchvision's own look at 1000, learn from 512, and draw a mask for each of 100 objects.
    """
    if not hasattr(model, "roi_heads"):
        return
    stages: Any = model
    limits = dict.fromkeys(("training", "testing"), count)
    stages.rpn._pre_nms_top_n = stages.rpn._post_nms_top_n = limits
    stages.roi_heads.fg_bg_sampler.batch_size_per_image = count
    stages.roi_heads.detections_per_img = count


def adapt_statistics(net: nn.Module, x: Any) -> None:
    """Gives each BatchNorm the statistics of `x`, as a trained model has: random layers in a row would otherwise shrink
    what they pass on to nothing, or let it grow without end."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(x)
    net.eval()
