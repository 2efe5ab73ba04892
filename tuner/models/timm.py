"""timm's models by name, `timm/<name>` (extra `timm`).

Models like ResNet, EfficientNet and MobileNet are cut at the stem, the stages and the head; others
between features and head.

Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel, split_sequential
from tuner.core.weights import is_path, load_matching_state, read_state_dict
from tuner.errors import SpaceError
from tuner.models._timm import convert_state, download_timm_weights, import_timm, timm_config

TASKS = ("classification",)
NAMES = ("timm/*",)
# Convolutional networks have tuner's own default recipe. Transformers and ConvNeXts need smaller
# rates, smaller still in the first stages:
# ViT: MAE's FINETUNE.md: AdamW, lr 5e-4 for 256 images, here for 32; weight decay 0.05, decay by
# layer 0.65 for ViT-B and 0.75 for larger ones, cosine after 5 of 100 epochs of warm-up; BEiT's and
# DeiT III's fine-tuning is alike. https://github.com/facebookresearch/mae/blob/main/FINETUNE.md
# ConvNeXt: TRAINING.md: AdamW, lr 5e-5 for 512 images, weight decay 1e-8, decay by layer 0.8,
# cosine. https://github.com/facebookresearch/ConvNeXt/blob/main/TRAINING.md
# Swin: configs/swin/*_22kto1k_finetune.yaml: AdamW, lr 2e-5 for 512 images, weight decay 1e-8,
# cosine after 5 of 30 epochs of warm-up, at the end 1 % of lr, gradients clipped at 5
# https://github.com/microsoft/Swin-Transformer/tree/main/configs/swin
# The last two fine-tune for 30 epochs of a million images: for small data their rate is not scaled
# down to a batch of 32, and Swin has ConvNeXt's.
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
    """Model `name` with `outputs` classes.

    Depth 1 freezes the stem, each depth after it one stage of blocks more. A model of another
    structure has one cut.

    Raises:
        SpaceError: timm does not have a model or weights of that name, or the model has no such
            dropout.
        DataError: The weights are missing or do not fit.
    """
    timm = import_timm()
    config = timm_config(timm, name)
    rates = {"drop_rate": dropout, "drop_path_rate": drop_path}
    model = _create_model(timm, name, outputs, {k: v for k, v in rates.items() if v is not None})
    notes: tuple[str, ...] = ()
    if weights != "none":
        path = (
            Path(weights)
            if is_path(weights)
            else download_timm_weights(home, name, weights, config)
        )
        head = str(config["classifier"])
        state = {
            k: v
            for k, v in convert_state(model, read_state_dict(path)).items()
            if is_path(weights) or not k.startswith(f"{head}.")
        }
        notes = load_matching_state(
            model,
            state,
            head=head,
            source_name=f"weights: {weights if is_path(weights) else path.name}",
        )
    return StagedModel(
        model, stages_of(model, config), notes, head_is_new=weights == "none" or bool(notes)
    )


def _create_model(timm: Any, name: str, outputs: int, rates: dict[str, float]) -> nn.Module:
    """timm's model with fresh parameters. Raises SpaceError where it does not take the `rates`."""
    try:
        model: nn.Module = timm.create_model(
            name.partition("/")[2], pretrained=False, num_classes=outputs, **rates
        )
    except TypeError as error:
        key = next((key for key in rates if f"'{key}'" in str(error)), None)
        if key is None:
            raise
        written = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}[key]
        raise SpaceError(
            f"model.{written}: {rates[key]:g}, but {name} has none; leave the key out"
        ) from None
    return model


def stages_of(model: nn.Module, config: dict[str, Any]) -> dict[str, nn.Module]:
    """The model's own modules in the order of its forward pass.

    The last stage before the head ends with the pooling.
    """
    parts = dict(model.named_children())
    order = list(parts)
    stages: dict[str, nn.Module] = {}
    if order[:3] == ["conv_stem", "bn1", "blocks"] and order[-1] == "classifier":
        stages["stem"] = nn.Sequential(parts["conv_stem"], parts["bn1"])
        stages |= {f"blocks{i}": block for i, block in enumerate(parts["blocks"].children())}
        stages["features"] = nn.Sequential(*(parts[name] for name in order[3:-1]))
        stages["head"] = _head_stage(model, parts["classifier"])
    elif (
        order[:3] == ["conv1", "bn1", "act1"]
        and order[-2:] == ["global_pool", "fc"]
        and set(order[3:-2]) <= RESNET_PARTS
    ):
        stages["stem"] = nn.Sequential(
            *(parts[name] for name in ("conv1", "bn1", "act1", "maxpool") if name in parts)
        )
        stages |= {f"layer{i}": parts[f"layer{i}"] for i in (1, 2, 3)}
        stages["layer4"] = nn.Sequential(parts["layer4"], parts["global_pool"])
        stages["head"] = _head_stage(model, parts["fc"])
    else:
        return _features_and_head(model, config)
    return stages if _stages_agree(model, stages, config) else _features_and_head(model, config)


RESNET_PARTS = {"maxpool", "layer1", "layer2", "layer3", "layer4"}


def _head_stage(model: nn.Module, classifier: nn.Module) -> nn.Module:
    rate = float(getattr(model, "drop_rate", 0.0))
    return nn.Sequential(nn.Dropout(rate), classifier) if rate else classifier


@torch.no_grad()
def _stages_agree(model: nn.Module, stages: dict[str, nn.Module], config: dict[str, Any]) -> bool:
    """Whether the stages in a row compute what the model computes.

    Some models do more in `forward` than to call their modules in a row.
    """
    # the stages have a module that the model has not: the dropout before the head
    with _EvalMode(nn.ModuleList([model, *stages.values()])):
        x = y = _random_image(model, config)
        try:
            for stage in stages.values():
                y = stage(y)
        except (RuntimeError, ValueError, TypeError):
            return False
        expected = model(x)
        return y.shape == expected.shape and (y.is_meta or torch.equal(y, expected))


def _random_image(model: nn.Module, config: dict[str, Any]) -> Tensor:
    size = 64 if not config.get("fixed_input_size") else config.get("input_size", (3, 224, 224))[-1]
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, size, size, generator=generator, device="cpu").to(
        next(model.parameters()).device
    )


class _EvalMode:
    """Eval mode inside the block; at its end every module gets its earlier mode back."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = {module: module.training for module in model.modules()}
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode


class MethodStage(nn.Module):
    """One method of a model as a module that holds the model's own children, and no others."""

    def __init__(self, model: nn.Module, method: str, children: list[str], *, loose: bool) -> None:
        """`loose`: the parameters and buffers that are in no child belong to the stage too."""
        super().__init__()
        self.model_holder = (model,)  # in a tuple, so that the whole model does not become a child
        self.method = method
        for name in children:
            self.add_module(name, getattr(model, name))
        if loose:
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, buffer in model.named_buffers(recurse=False):
                self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self.model_holder[0], self.method)(x)
        return y


@torch.no_grad()
def _features_and_head(model: nn.Module, config: dict[str, Any]) -> dict[str, nn.Module]:
    """Features and head by timm's own methods.

    The head's children are those that only the method `forward_head` calls.
    """
    called: set[str] = set()
    hooks = [
        child.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, child in _named_inner_modules(model)
    ]
    try:
        with _EvalMode(model):
            y = model.forward_features(_random_image(model, config))  # type: ignore[operator]
            called_by_features = set(called)
            called.clear()
            model.forward_head(y)  # type: ignore[operator]
    except (AttributeError, RuntimeError, ValueError, TypeError, AssertionError):
        return dict(split_sequential(model).stages)
    finally:
        for hook in hooks:
            hook.remove()
    children = [name for name, _ in model.named_children()]
    head = [name for name in children if name in called - called_by_features]
    if not any(True for name in head for _ in getattr(model, name).parameters()):
        return dict(split_sequential(model).stages)
    features = [name for name in children if name not in head]
    return {
        "features": MethodStage(model, "forward_features", features, loose=True),
        "head": MethodStage(model, "forward_head", head, loose=False),
    }


def _named_inner_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module inside, with the name of the model's child that contains it."""
    for name, child in model.named_children():
        for module in child.modules():
            yield name, module
