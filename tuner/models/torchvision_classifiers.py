"""torchvision's classifiers, but for ResNet and VGG, which have files of their own.

They are cut at the stem, the blocks or stages of blocks, and the head (`_cutter`).

The torchvision maintainers, TorchVision: PyTorch's Computer Vision library, 2016,
https://github.com/pytorch/vision.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torchvision.models import get_model
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import StochasticDepth

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel, split_sequential
from tuner.core.weights import (
    is_path,
    load_matching_state,
    read_torchvision_state,
    torchvision_preprocess,
)
from tuner.errors import SpaceError
from tuner.models._cutter import cut_model
from tuner.models._forward_pass import UncutModel
from tuner.models._model_units import find_units

TASKS = ("classification", "multilabel", "regression")
NAMES = (
    "alexnet",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_16gf",
    "regnet_x_1_6gf",
    "regnet_x_32gf",
    "regnet_x_3_2gf",
    "regnet_x_400mf",
    "regnet_x_800mf",
    "regnet_x_8gf",
    "regnet_y_128gf",
    "regnet_y_16gf",
    "regnet_y_1_6gf",
    "regnet_y_32gf",
    "regnet_y_3_2gf",
    "regnet_y_400mf",
    "regnet_y_800mf",
    "regnet_y_8gf",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_b",
    "swin_s",
    "swin_t",
    "swin_v2_b",
    "swin_v2_s",
    "swin_v2_t",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
)
# as timm's models of these kinds, with the sources there
NAMED_RECIPES = {
    "vit_*": {"classification": {"lr": 6e-5, "weight_decay": 0.05, "layer_decay": 0.75}},
    "convnext_*": {"classification": {"lr": 5e-5, "layer_decay": 0.8}},
    "swin_*": {"classification": {"lr": 5e-5, "warmup": 0.15, "min_lr": 0.01, "clip_norm": 5.0}},
}
# the classifiers beside the trunk of Inception, which are of use in long trainings only
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# these adapt their input from ImageNet's mean and deviation to that of their weights
INCEPTIONS = ("googlenet", "inception_v3")
SMALL_SIDE = 64  # pixels of the example for models that take any size
FIXED_SIZE = ("vit_", "maxvit_")  # how the names of models begin that are built for one size


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """The transform that torchvision publishes for the weights."""
    return torchvision_preprocess(name, weights)


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    size: int | None = None,
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
            description="share of the features before the head that training sets to 0; null: the "
            "model's own",
        ),
    ] = None,
    drop_path: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="stochastic depth: how often training leaves out the last residual block, "
            "and the others less; null: the model's own",
        ),
    ] = None,
) -> StagedModel:
    """Model `name` with `outputs` classes, for images of `size` pixels; None: those of its weights.

    Depth 1 freezes the stem, each depth after it one block or one stage of blocks more.

    Raises:
        SpaceError: The model does not take images of this size, has no dropout or no stochastic
            depth where a rate is given, or torchvision has no such weights.
        DataError: The weights are missing, damaged or of another model.
    """
    side = size or torchvision_preprocess(name, weights).size
    model = _create_model(name, outputs, side)
    if dropout is not None:
        _set_dropout(model, name, dropout)
    if drop_path is not None:
        _set_stochastic_depth(model, name, drop_path)
    head = find_units(model).heads[-1]
    notes: tuple[str, ...] = ()
    if weights != "none":
        state, source = read_torchvision_state(home, name, weights)
        state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
        if not is_path(weights):
            state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
        if name.startswith("vit_"):
            state = _resample_positions(model, state, side)
        notes = load_matching_state(model, state, head=head, source_name=f"weights: {source}")
    stages, reason = _cut(model, side if name.startswith(FIXED_SIZE) else SMALL_SIDE, side)
    is_new = weights == "none" or bool(notes)
    return StagedModel(model, stages, notes, head_is_new=is_new, uncut_reason=reason)


def _create_model(name: str, outputs: int, side: int) -> nn.Module:
    """torchvision's model with fresh parameters. Raises SpaceError where it takes no such images.

    Inception is built without the classifiers beside its trunk.
    """
    arguments: dict[str, Any] = {}
    if name.startswith("vit_"):
        arguments["image_size"] = side
    elif name.startswith("maxvit_"):
        arguments["input_size"] = (side, side)
    elif name in INCEPTIONS:
        arguments |= {"aux_logits": False, "transform_input": True, "init_weights": False}
    try:
        if name.startswith("regnet_"):  # it reads numbers while it is built, and meta has none
            device = torch.get_default_device()
            with torch.device("cpu"):
                model: nn.Module = get_model(name, weights=None, num_classes=outputs)
            return model.to(device)
        model = get_model(name, weights=None, num_classes=outputs, **arguments)
    except (AssertionError, ValueError) as error:  # both, depending on the model
        raise SpaceError(f"data.size: {side}, which {name} does not take: {error}") from None
    return model


def _set_dropout(model: nn.Module, name: str, rate: float) -> None:
    """Sets the rate of the dropouts that the model has behind its trunk. Raises SpaceError where it
    has none.
    """
    holder = find_units(model).heads[-1].rpartition(".")[0]
    around_head = model.get_submodule(holder) if holder else model
    dropouts = [child for child in around_head.children() if isinstance(child, nn.Dropout)]
    if not dropouts:
        raise SpaceError(f"model.dropout: {rate:g}, but {name} has none; leave the key out")
    for dropout in dropouts:
        dropout.p = rate


def _set_stochastic_depth(model: nn.Module, name: str, rate: float) -> None:
    """Sets the rates of the residual blocks: 0 for the first, rising evenly to `rate` for the last
    (Huang et al., Deep Networks with Stochastic Depth, ECCV 2016). Raises SpaceError where the
    model has no such blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if not blocks:
        raise SpaceError(f"model.drop_path: {rate:g}, but {name} has none; leave the key out")
    for number, block in enumerate(blocks):
        block.p = rate * number / max(1, len(blocks) - 1)


def _resample_positions(model: nn.Module, state: dict[str, Any], side: int) -> dict[str, Any]:
    """The weights of a ViT with the positions of its patches resampled for images of `side`."""
    patch = model.patch_size
    assert isinstance(patch, int)
    return dict(interpolate_embeddings(side, patch, state))


def _cut(model: nn.Module, *sides: int) -> tuple[dict[str, nn.Module], str | None]:
    """The stages, found with the first of `sides` that the model takes; or why there are none."""
    reason = None
    for side in dict.fromkeys(sides):
        image = torch.rand(
            1, 3, side, side, generator=torch.Generator().manual_seed(0), device="cpu"
        )
        try:
            return cut_model(model, image.to(next(model.parameters()).device))
        except UncutModel as error:
            reason = str(error)
    return dict(split_sequential(model).stages), reason
