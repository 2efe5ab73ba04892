"""torchvision's detectors with its own weights, with ImageNet's in their backbone, or with none.

`later` stands for weights that come from elsewhere, such as an export: the layers are those that weights go with.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from tuner.config.run import LOADED_LATER, RgbTriple
from tuner.core.input_spec import ImageInputSpec
from tuner.core.weights import (
    fetch_weights,
    is_path,
    load_matching_state,
    read_state_dict,
    torchvision_model,
)
from tuner.errors import SpaceError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOT_LOADED = ("none", LOADED_LATER)  # nothing is read for these


def letterbox_spec(
    size: int, mean: RgbTriple = IMAGENET_MEAN, std: RgbTriple = IMAGENET_STD
) -> ImageInputSpec:
    return ImageInputSpec(size, size, "bilinear", mean, std, "letterbox")


def weights_entry(name: str, weights: str, key: str) -> Any:
    """One of torchvision's weights. Raises SpaceError on an unknown name."""
    known = get_model_weights(name)
    if weights != "default" and weights not in known.__members__:
        allowed = ", ".join(["default", "none", *known.__members__])
        raise SpaceError(
            f"model.{key}: {weights!r} is not known for {name} (allowed: {allowed}); or give a path to a .safetensors or .pth file"
        )
    return known.DEFAULT if weights == "default" else known[weights]


def load_detector_weights(
    home: Path, model: nn.Module, name: str, weights: str, head: str
) -> tuple[str, ...]:
    """Loads weights of the whole; `head` is what depends on the classes. Those of a path keep theirs where it fits."""
    if weights in NOT_LOADED:
        return ()
    if is_path(weights):
        state, where = read_state_dict(Path(weights)), weights
    else:
        found = weights_entry(name, weights, "weights")
        state = {
            k: v
            for k, v in read_state_dict(fetch_weights(home, found.url)).items()
            if not k.startswith(f"{head}.")
        }
        where = str(found)
    own = set(model.state_dict())
    state = {
        k: v for k, v in state.items() if "num_batches_tracked" not in k or k in own
    }  # frozen BatchNorm counts no batches
    return load_matching_state(model, state, head=head, source_name=f"weights: {where}")


@torch.no_grad()
def load_backbone_weights(
    home: Path, body: nn.Module, architecture: str, weights: str, default: str
) -> None:
    """Loads a classifier's weights into a detector's `body`, which holds the same layers in the same order under other names."""
    if weights in NOT_LOADED:
        return
    if not is_path(weights):
        weights = (
            default
            if weights == "default"
            else weights_entry(architecture, weights, "backbone").name
        )
    head = "fc" if architecture.startswith("res") else "classifier"
    classifier, _ = torchvision_model(home, architecture, 1000, weights, head=head)
    theirs = [
        value
        for key, value in classifier.state_dict().items()
        if not key.startswith(f"{head}.") and "num_batches" not in key
    ]
    ours = [
        value
        for key, value in body.state_dict().items()
        if "num_batches" not in key and key != "scale_weight"
    ]
    for own, value in zip(
        ours, theirs, strict=False
    ):  # SSD's own layers stand behind the classifier's
        own.copy_(value)


def freeze_batch_norm(module: nn.Module, eps: float | None = None) -> None:
    """Every BatchNorm inside as torchvision has it in pretrained backbones: statistics, scale and shift stand still."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            still = FrozenBatchNorm2d(child.num_features, child.eps if eps is None else eps)
            still.to(child.weight.device)
            module.add_module(name, still)
        else:
            freeze_batch_norm(child, eps)


def build_pyramid_detector(
    home: Path, name: str, classes: int, weights: str, backbone: str, head: str
) -> tuple[Any, tuple[str, ...]]:
    """torchvision's detector `name` over a feature pyramid, built as torchvision's own function builds it."""
    model: Any = get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if (weights != "none" or backbone != "none") and not name.endswith("_v2"):
        # torchvision's weights of these were trained when its BatchNorm added nothing to the variance
        old = name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn") and weights != "none"
        freeze_batch_norm(model.backbone.body, 0.0 if old else None)
    if weights != "none":
        return model, load_detector_weights(home, model, name, weights, head)
    architecture = "mobilenet_v3_large" if "mobilenet" in name else "resnet50"
    load_backbone_weights(home, model.backbone.body, architecture, backbone, "IMAGENET1K_V1")
    return model, ()
