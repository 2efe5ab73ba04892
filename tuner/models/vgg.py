"""torchvision's VGG, with and without BatchNorm.

Cut after each max-pool and each fully connected layer.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
ICLR 2015.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import nn

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.core.weights import torchvision_model, torchvision_preprocess

TASKS = ("classification", "multilabel", "regression")
NAMES = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    return torchvision_preprocess(name, weights)


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(
            description="default: torchvision's best; none: fresh parameters; or a torchvision "
            "name, or a path to a .safetensors or .pth file"
        ),
    ] = "default",
    dropout: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="share of the features behind each hidden fully connected layer that "
            "training sets to 0; null: torchvision's own, 0.5",
        ),
    ] = None,
) -> StagedModel:
    """Model `name` with `outputs` classes.

    The depths 1 to 5 freeze blocks of convolutions, 6 and 7 the fully connected layers too.
    """
    model, notes = torchvision_model(home, name, outputs, weights, head="classifier.6")
    stages: dict[str, nn.Module] = {}
    block: list[nn.Module] = []
    features = model.features
    fc = model.classifier  # Linear ReLU Dropout Linear ReLU Dropout Linear
    assert (
        isinstance(features, nn.Sequential)
        and isinstance(fc, nn.Sequential)
        and isinstance(model.avgpool, nn.Module)
    )
    for layer in fc:
        if dropout is not None and isinstance(layer, nn.Dropout):
            layer.p = dropout
    for layer in features:
        block.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            stages[f"block{len(stages) + 1}"] = nn.Sequential(*block)
            block = []
    stages["block5"] = nn.Sequential(*stages["block5"].children(), model.avgpool, nn.Flatten(1))
    stages["fc1"] = nn.Sequential(*fc[:2])
    stages["fc2"] = nn.Sequential(*fc[2:5])
    stages["head"] = nn.Sequential(*fc[5:])
    return StagedModel(model, stages, notes, head_is_new=weights == "none" or bool(notes))
