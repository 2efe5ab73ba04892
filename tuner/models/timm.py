"""timm's models by name, `timm/<name>` (extra `timm`).

They are cut at the stem, the blocks or stages of blocks, and the head (`_cutter`). Where a forward
pass cannot be read, there is one cut, between features and head.

Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.core.weights import is_path, load_matching_state, read_state_dict
from tuner.errors import SpaceError
from tuner.models._cutter import eval_mode
from tuner.models._forward_pass import TRACE_ERRORS
from tuner.models._timm import convert_state, download_timm_weights, import_timm, timm_config
from tuner.models._timm_stages import DEFAULT_SIDE, classifier_names, random_image, stages_of

TASKS = ("classification", "multilabel", "regression")
NAMES = ("timm/*",)
EXPORTS = (
    "safetensors",
    "torch_export",
    "onnx",
    "onnx_fp16",
    "onnx_int8",
    "openvino",
    "pretrained",
)
# Convolutional networks have tuner's own default recipe, because their authors publish recipes for
# training from scratch; it is measured in benchmarks/README.md, "Test scores". Transformers and
# ConvNeXts need smaller rates, smaller still in the first stages:
# ViT: MAE's FINETUNE.md: AdamW, lr 5e-4 for 256 images, here for 32; weight decay 0.05, decay by
# layer 0.65 for ViT-B and 0.75 for larger ones, cosine after 5 of 100 epochs of warm-up; BEiT's and
# DeiT III's fine-tuning is alike. https://github.com/facebookresearch/mae/blob/main/FINETUNE.md
# ConvNeXt: TRAINING.md: AdamW, lr 5e-5 for 512 images, weight decay 1e-8, decay by layer 0.8,
# cosine. https://github.com/facebookresearch/ConvNeXt/blob/main/TRAINING.md
# Swin: configs/swin/*_22kto1k_finetune.yaml: AdamW, lr 2e-5 for 512 images, weight decay 1e-8,
# cosine after 5 of 30 epochs of warm-up, at the end 1 % of lr, gradients clipped at 5
# https://github.com/microsoft/Swin-Transformer/tree/main/configs/swin
# The last two fine-tune for 30 epochs of a million images: for small data their rate is not scaled
# down to a batch of 32, and Swin has ConvNeXt's. The mixup, CutMix, stochastic depth, label
# smoothing and RandAugment of all these recipes are left out: they are for 30 to 100 epochs of a
# million images, and in a few epochs of hundreds of images they cost points (the same place).
NAMED_RECIPES = {
    "timm/vit*": {"classification": {"lr": 6e-5, "weight_decay": 0.05, "layer_decay": 0.75}},
    "timm/deit*": {"classification": {"lr": 6e-5, "weight_decay": 0.05, "layer_decay": 0.75}},
    "timm/beit*": {"classification": {"lr": 6e-5, "weight_decay": 0.05, "layer_decay": 0.75}},
    "timm/eva*": {"classification": {"lr": 6e-5, "weight_decay": 0.05, "layer_decay": 0.75}},
    "timm/flexivit*": {"classification": {"lr": 6e-5, "weight_decay": 0.05, "layer_decay": 0.75}},
    "timm/convnext*": {"classification": {"lr": 5e-5, "layer_decay": 0.8}},
    "timm/swin*": {
        "classification": {"lr": 5e-5, "warmup": 0.15, "min_lr": 0.01, "clip_norm": 5.0}
    },
}


def known_names() -> list[str]:
    """All of timm's names, without the tags of their weights. Raises SpaceError without timm."""
    return [f"timm/{name}" for name in import_timm().list_models()]


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """The transform that timm states for the model's weights."""
    timm = import_timm()
    data_config = timm.data.resolve_data_config(pretrained_cfg=timm_config(timm, name), model=None)
    size = data_config["input_size"][-1]
    mean, std = (tuple(float(v) for v in data_config[key]) for key in ("mean", "std"))
    resize = int(size / data_config["crop_pct"])
    return ImageInputSpec(size, resize, data_config["interpolation"], mean, std)  # type: ignore[arg-type]


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
            description="default: the published weights; none: fresh parameters; or a path to a "
            ".safetensors or .pth file"
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
    """Model `name` with `outputs` classes, for images of `size` pixels; None: of its own size.

    Depth 1 freezes the stem, each depth after it one block or one stage of blocks more. A model
    whose forward pass cannot be read has one cut.

    Raises:
        SpaceError: timm does not have a model or weights of that name, or the model has no such
            dropout, or it or its weights do not take images of this size.
        DataError: The weights are missing or do not fit.
    """
    timm = import_timm()
    config = timm_config(timm, name)
    rates = {"drop_rate": dropout, "drop_path_rate": drop_path}
    given = {key: rate for key, rate in rates.items() if rate is not None}
    model = _create_model(timm, name, outputs, given, config, size)
    notes: tuple[str, ...] = ()
    if weights != "none":
        if _is_resized(config, size) and not is_path(weights):
            _check_resampling(timm, name, config, size)
        notes = _load_weights(home, name, model, weights, config)
    side = size or _own_size(config)
    stages, uncut_reason = stages_of(model, config, side)
    return StagedModel(
        model,
        stages,
        notes,
        head_is_new=weights == "none" or bool(notes),
        uncut_reason=uncut_reason,
    )


def _load_weights(
    home: Path, name: str, model: nn.Module, weights: str, config: dict[str, Any]
) -> tuple[str, ...]:
    """Loads weights into the model and returns notes for the user.

    timm's own weights are loaded without their classifiers.
    """
    heads = classifier_names(config)
    if is_path(weights):
        path, source = Path(weights), f"weights: {weights}"
    else:
        path = download_timm_weights(home, name, weights, config)
        source = f"weights: {path.name}"
    state = convert_state(model, read_state_dict(path))
    if not is_path(weights):
        state = {
            key: value
            for key, value in state.items()
            if not key.startswith(tuple(f"{head}." for head in heads))
        }
    return load_matching_state(model, state, head=heads, source_name=source)


def _create_model(
    timm: Any,
    name: str,
    outputs: int,
    rates: dict[str, float],
    config: dict[str, Any],
    size: int | None,
) -> nn.Module:
    """timm's model with fresh parameters, for images of `size` pixels.

    A model of a fixed size gets positions for `size`; `convert_state` resamples those of its
    weights.

    Raises:
        SpaceError: It does not take the rates or the size.
    """
    arguments: dict[str, Any] = dict(rates)
    is_resized = _is_resized(config, size)
    if is_resized:
        arguments["img_size"] = size
    bare = name.partition("/")[2]
    try:
        model: nn.Module = timm.create_model(
            bare, pretrained=False, num_classes=outputs, **arguments
        )
        if is_resized and size is not None:
            with torch.no_grad(), eval_mode(model):
                model(random_image(model, size))
    except TRACE_ERRORS as error:
        key = next((key for key in rates if f"'{key}'" in str(error)), None)
        if key is not None:
            written = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}[key]
            raise SpaceError(
                f"model.{written}: {rates[key]:g}, but {name} has none; leave the key out"
            ) from None
        if not is_resized:
            raise
        raise _other_size(name, config, size, "timm does not change that") from None
    return model


def _is_resized(config: dict[str, Any], size: int | None) -> bool:
    """Whether a model that is made for one size of images gets another one."""
    return bool(config.get("fixed_input_size")) and size not in (None, _own_size(config))


def _own_size(config: dict[str, Any]) -> int:
    """The side of the images that the weights were trained with, in pixels."""
    return int(config.get("input_size", (3, DEFAULT_SIDE, DEFAULT_SIDE))[-1])


def _other_size(name: str, config: dict[str, Any], size: int | None, reason: str) -> SpaceError:
    own = _own_size(config)
    return SpaceError(
        f"data.size: {size}, but {name} is made for {own} pixels and {reason}; leave data.size out "
        f"or write {own}"
    )


def _check_resampling(timm: Any, name: str, config: dict[str, Any], size: int | None) -> None:
    """Checks that timm can resample the published weights for images of another size.

    It is seen by names and shapes alone, before anything is downloaded.

    Raises:
        SpaceError: It cannot.
    """
    with torch.device("meta"):
        published = timm.create_model(name.partition("/")[2], pretrained=False)
        model = _create_model(timm, name, published.num_classes, {}, config, size)
        own = model.state_dict()
        state = convert_state(model, published.state_dict())
    heads = tuple(f"{head}." for head in classifier_names(config))
    if any(
        key in own and own[key].shape != value.shape
        for key, value in state.items()
        if not key.startswith(heads)
    ):
        reason = "timm does not resample its weights; take another model, such as a ViT or Swin"
        raise _other_size(name, config, size, reason)
