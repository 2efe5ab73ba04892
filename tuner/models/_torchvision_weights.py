"""Weights of torchvision's detectors: its own, ImageNet's in the backbone, or none.

The value LOADED_LATER stands for weights that come from elsewhere, such as an export. Then the
model gets the layers that a model with weights has.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from tuner.config.data_options import RgbTriple
from tuner.config.run import LOADED_LATER
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
WITHOUT_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn")
NOT_LOADED = ("none", LOADED_LATER)  # for these values no file is read


def letterbox_spec(
    size: int, mean: RgbTriple = IMAGENET_MEAN, std: RgbTriple = IMAGENET_STD
) -> ImageInputSpec:
    """An input spec of a square canvas of `size` pixels, to which images are letterboxed."""
    return ImageInputSpec(size, size, "bilinear", mean, std, "letterbox")


def stretched_spec(size: int, mean: RgbTriple, std: RgbTriple) -> ImageInputSpec:
    """An input spec of a square canvas of `size` pixels, to which images are stretched, as SSD's
    authors do.
    """
    return ImageInputSpec(size, size, "bilinear", mean, std, "stretch")


def weights_entry(name: str, weights: str, key: str) -> Any:
    """One of torchvision's weights; `key` is the key of the model section that names them.

    Raises:
        SpaceError: The name is unknown.
    """
    known = get_model_weights(name)
    if weights != "default" and weights not in known.__members__:
        allowed = ", ".join(["default", "none", *known.__members__])
        raise SpaceError(
            f"model.{key}: {weights!r} is not known for {name} (allowed: {allowed}); or give a "
            "path to a .safetensors or .pth file"
        )
    return known.DEFAULT if weights == "default" else known[weights]


def load_detector_weights(
    home: Path, model: nn.Module, name: str, weights: str, head: str | tuple[str, ...]
) -> tuple[str, ...]:
    """Load the weights of a whole detector and return notes for the user.

    torchvision's weights are loaded without the head. A head from a path is loaded where it fits.

    Args:
        home: The folder of caches and downloads.
        model: The detector.
        name: Its name in torchvision.
        weights: default, a name of torchvision's, none, LOADED_LATER, or a path.
        head: The name of the layers that depend on the classes, or several.

    Raises:
        SpaceError: The name is unknown.
        DataError: The weights are missing, damaged or do not fit.
    """
    if weights in NOT_LOADED:
        return ()
    if is_path(weights):
        state, source = read_state_dict(Path(weights)), weights
    else:
        entry = weights_entry(name, weights, "weights")
        heads = (head,) if isinstance(head, str) else head
        state = {
            k: v
            for k, v in read_state_dict(fetch_weights(home, entry.url)).items()
            if not k.startswith(tuple(f"{name}." for name in heads))
        }
        source = str(entry)
    model_keys = set(model.state_dict())
    # frozen BatchNorm counts no batches
    state = {k: v for k, v in state.items() if "num_batches_tracked" not in k or k in model_keys}
    return load_matching_state(model, state, head=head, source_name=f"weights: {source}")


@torch.no_grad()
def load_backbone_weights(
    home: Path, body: nn.Module, architecture: str, weights: str, default: str
) -> None:
    """Load a classifier's weights into the backbone of a detector.

    The backbone has the layers of the classifier in the same order under other names.

    Args:
        home: The folder of caches and downloads.
        body: The backbone.
        architecture: The classifier's name in torchvision.
        weights: default, a name of torchvision's, none, LOADED_LATER, or a path.
        default: The name of torchvision's weights that `default` stands for.

    Raises:
        SpaceError: The name is unknown.
        DataError: The weights are missing, damaged or do not fit.
    """
    if weights in NOT_LOADED:
        return
    if weights == "default":
        weights = default
    elif not is_path(weights):
        weights = weights_entry(architecture, weights, "backbone").name
    head = "fc" if architecture.startswith("res") else "classifier"
    classifier, _ = torchvision_model(home, architecture, 1000, weights, head=head)
    classifier_tensors = [
        value
        for key, value in classifier.state_dict().items()
        if not key.startswith(f"{head}.") and "num_batches" not in key
    ]
    body_tensors = [
        value
        for key, value in body.state_dict().items()
        if "num_batches" not in key and key != "scale_weight"
    ]
    # not strict: SSD's own layers come after those of the classifier
    for body_tensor, classifier_tensor in zip(body_tensors, classifier_tensors, strict=False):
        body_tensor.copy_(classifier_tensor)


def freeze_batch_norm(module: nn.Module, eps: float | None = None) -> None:
    """Replace every BatchNorm inside by a frozen one, as in torchvision's pretrained backbones.

    Its statistics, scale and shift do not change in training.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps if eps is None else eps)
            frozen.to(child.weight.device)
            module.add_module(name, frozen)
        else:
            freeze_batch_norm(child, eps)


def build_pyramid_detector(
    home: Path, name: str, classes: int, weights: str, backbone: str, head: str | tuple[str, ...]
) -> tuple[Any, tuple[str, ...]]:
    """torchvision's detector `name` over a feature pyramid, and notes for the user.

    It is built as torchvision's own function builds it.
    """
    model: Any = get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if (weights != "none" or backbone != "none") and not name.endswith("_v2"):
        # torchvision's weights of these were trained when its BatchNorm added nothing to the
        # variance
        without_eps = name in WITHOUT_EPS and weights != "none"
        freeze_batch_norm(model.backbone.body, 0.0 if without_eps else None)
    if weights != "none":
        return model, load_detector_weights(home, model, name, weights, head)
    architecture = "mobilenet_v3_large" if "mobilenet" in name else "resnet50"
    load_backbone_weights(home, model.backbone.body, architecture, backbone, "IMAGENET1K_V1")
    return model, ()
