"""A folder that transformers or timm load by themselves, as `save_pretrained` writes it.

`AutoModelForSequenceClassification.from_pretrained(folder)` with the tokenizer beside it, or
`timm.create_model("local-dir:folder", pretrained=True)`. The temperature is folded into the last
layer, so the logits are those of the other formats. timm's models get normalised images.
"""

from collections.abc import Callable
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
    divide_logits(native, model)
    try:
        if type(native).__module__.startswith("transformers."):
            native.save_pretrained(path.parent)  # type: ignore[operator]
        elif type(native).__module__.startswith("timm."):
            save_timm(native, model, path.parent)
        else:
            raise SpaceError(
                f"export: pretrained is for models of timm and transformers, and this is "
                f"{type(native).__name__}"
            )
    finally:
        multiply_logits(native, model)


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


def last_layer(native: Any) -> nn.Linear | nn.Conv2d:
    """The layer that gives the logits. Raises SpaceError where it is none that can be scaled."""
    layers = [m for m in native.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers:
        raise SpaceError("export: pretrained: the model has no last layer to scale; use another")
    return layers[-1]


def divide_logits(native: Any, model: ExportModule) -> None:
    _scale(native, 1 / model.temperature if model.has_temperature else None)


def multiply_logits(native: Any, model: ExportModule) -> None:
    _scale(native, model.temperature if model.has_temperature else None)


@torch.no_grad()
def _scale(native: Any, factor: Tensor | None) -> None:
    """Multiplies the last layer, and so the logits."""
    if factor is None:
        return
    layer = last_layer(native)
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor)


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
