"""torchvision's ResNet, ResNeXt and Wide ResNet, and the ResNet-18 of quarter width in the package.

Cut at the stem and each layer.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016; Xie et al., CVPR 2017; Zagoruyko
and Komodakis, BMVC 2016.
"""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.core.weights import (
    is_path,
    load_matching_state,
    read_state_dict,
    torchvision_model,
    torchvision_preprocess,
)
from tuner.errors import SpaceError, suggest_names

TASKS = ("classification", "multilabel", "regression")
NAMES = (
    "resnet18_slim",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
FASHION_MNIST_SPEC = ImageInputSpec(
    size=32, resize=32, interpolation="bilinear", mean=(0.286,) * 3, std=(0.353,) * 3
)  # Fashion-MNIST's


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    return FASHION_MNIST_SPEC if name == "resnet18_slim" else torchvision_preprocess(name, weights)


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(
            description="default: torchvision's best; bundled: those of resnet18_slim; none: "
            "fresh parameters; or a torchvision name, or a path to a .safetensors or "
            ".pth file"
        ),
    ] = "default",
) -> StagedModel:
    """Model `name` with `outputs` classes.

    Depth 1 freezes the stem, each of the depths 2 to 5 one residual layer more.
    """
    if name == "resnet18_slim":
        model, notes = _load_slim(outputs, weights)
    else:
        model, notes = torchvision_model(home, name, outputs, weights, head="fc")
    stages = {
        "stem": nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool),
        "layer1": model.layer1,
        "layer2": model.layer2,
        "layer3": model.layer3,
        # with the pooling, so that the cached activation is a vector
        "layer4": nn.Sequential(model.layer4, model.avgpool, nn.Flatten(1)),
        "head": nn.Sequential(model.fc),
    }
    return StagedModel(model, stages, notes, head_is_new=weights == "none" or bool(notes))


def build_slim_resnet(outputs: int) -> ResNet:
    """torchvision's ResNet-18 at quarter width: 16, 32, 64, 128 channels."""
    # All layers of the wide one are replaced: on the meta device no time goes into their numbers.
    with torch.device("meta"):
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=outputs)
    model.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(16)
    channels = 16
    for i, width in enumerate((16, 32, 64, 128)):
        stride = 1 if i == 0 else 2
        setattr(
            model,
            f"layer{i + 1}",
            nn.Sequential(_basic_block(channels, width, stride), _basic_block(width, width, 1)),
        )
        channels = width
    model.fc = nn.Linear(channels, outputs)
    for module in model.modules():  # as ResNet's own constructor does
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _basic_block(channels: int, width: int, stride: int) -> BasicBlock:
    project = None
    if stride != 1 or channels != width:
        project = nn.Sequential(
            nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )
    return BasicBlock(channels, width, stride, project)


def _load_slim(outputs: int, weights: str) -> tuple[ResNet, tuple[str, ...]]:
    model = build_slim_resnet(outputs)
    if weights == "none":
        return model, ()
    if is_path(weights):
        return model, load_matching_state(
            model, read_state_dict(Path(weights)), head="fc", source_name=f"weights: {weights}"
        )
    if weights not in ("default", "bundled"):
        raise SpaceError(
            f"model.weights: {weights!r} is not known for "
            f"resnet18_slim{suggest_names(weights, ('bundled', 'none'))}; or give a path"
        )
    state = read_state_dict(Path(str(files("tuner.models") / "resnet18_slim.safetensors")))
    without_head = {k: v for k, v in state.items() if not k.startswith("fc.")}
    return model, load_matching_state(
        model, without_head, head="fc", source_name=f"weights: {weights}"
    )
