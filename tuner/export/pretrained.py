"""A folder that transformers or timm load by themselves, as `save_pretrained` writes it.

`AutoModelForSequenceClassification.from_pretrained(folder)` with the tokenizer beside it, or
`timm.create_model("local-dir:folder", pretrained=True)`. The temperature, or the scale of the
targets, is folded into the last layer, so the outputs are those of the other formats. timm's models
get normalised images.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree, TextInputSpec
from tuner.errors import SpaceError

FILE = "pretrained/model.safetensors"


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    native = model.staged[0].model
    with outputs_folded_in(native, model):
        if type(native).__module__.startswith("transformers."):
            native.save_pretrained(path.parent)  # type: ignore[operator]
        elif type(native).__module__.startswith("timm."):
            save_timm(native, model, path.parent)
        else:
            raise SpaceError(
                f"export: pretrained is for models of timm and transformers, and this is "
                f"{type(native).__name__}"
            )


def save_timm(native: Any, model: ExportModule, folder: Path) -> None:
    """timm's config.json and weights, with the normalisation and size of the examples."""
    from timm.models import save_for_hf

    spec = model.input_spec
    config = {
        "input_size": [3, spec.size, spec.size],  # type: ignore[attr-defined]
        "crop_pct": spec.size / spec.resize,  # type: ignore[attr-defined]
        "interpolation": spec.interpolation,  # type: ignore[attr-defined]
        "mean": list(spec.mean),  # type: ignore[attr-defined]
        "std": list(spec.std),  # type: ignore[attr-defined]
        "num_classes": native.num_classes,
    }
    save_for_hf(
        native, str(folder), model_config={"pretrained_cfg": config}, safe_serialization=True
    )


def last_layers(native: Any) -> list[nn.Linear | nn.Conv2d]:
    """The layer that gives the outputs; two where the model takes the mean of two classifiers, as
    timm's distilled ones do.

    Raises SpaceError where there is none that can be scaled.
    """
    heads = native.get_classifier() if hasattr(native, "get_classifier") else native
    layers = [
        [part for part in head.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        for head in (heads if isinstance(heads, tuple) else (heads,))
    ]
    if not all(layers):
        raise SpaceError("export: pretrained: the model has no last layer to scale; use another")
    return [of_head[-1] for of_head in layers]


@contextmanager
def outputs_folded_in(native: Any, model: ExportModule) -> Iterator[None]:
    """In this block the model's own outputs are those of the export: divided by the temperature, or
    in the units of the targets.

    Raises SpaceError where its last layer cannot give them.
    """
    if not (model.has_temperature or model.has_target_scale):
        yield
        return
    layers = last_layers(native)
    if model.has_target_scale and any(layer.bias is None for layer in layers):
        raise SpaceError(
            "export: pretrained: the model's last layer has no bias, which the units of the "
            "targets need; leave this format out"
        )
    before = [(value, value.detach().clone()) for layer in layers for value in layer.parameters()]
    try:
        for layer in layers:
            _fold_in(layer, model)
        yield
    finally:
        with torch.no_grad():
            for value, earlier in before:
                value.copy_(earlier)


@torch.no_grad()
def _fold_in(layer: nn.Linear | nn.Conv2d, model: ExportModule) -> None:
    """Scales the outputs of the layer, and shifts them where they are targets."""
    bias: Tensor | None = layer.bias
    if model.has_temperature:
        for value in layer.parameters():
            value.div_(model.temperature)
    if model.has_target_scale and bias is not None:
        deviation = model.target_deviation
        layer.weight.mul_(deviation.view(-1, *[1] * (layer.weight.dim() - 1)))
        bias.mul_(deviation).add_(model.target_mean)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The folder as the library itself loads it."""
    model = blank()
    if isinstance(model.input_spec, TextInputSpec):
        import transformers

        kind = type(model.staged[0].model).__name__
        family = getattr(transformers, kind)
        native = family.from_pretrained(path.parent, trust_remote_code=False).eval()
        return lambda x: native(**x).logits  # type: ignore[arg-type]
    import timm

    module = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
    return lambda x: module((x - model.mean) / model.std)  # type: ignore[operator]
