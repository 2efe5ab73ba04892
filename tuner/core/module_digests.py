"""Digests of modules: equal digests mean equal structure, settings and weights."""

import hashlib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# the rate in the representation of torch's dropout, torchvision's and timm's stochastic depth
DROPOUT_RATE = re.compile(
    r"(\b(?:\w*Dropout\w*|DropPath|StochasticDepth)\()(?:p|drop_prob)=[0-9.e-]+"
)
DROPOUT_CLASS = re.compile(r"\w*Dropout\w*|DropPath|StochasticDepth")


def module_digest(module: nn.Module, *, ignore_dropout: bool = False) -> str:
    """SHA-256 over a module's structure, settings, parameters and buffers.

    With `ignore_dropout` modules that differ in the rates of dropout alone have equal digests, as
    in eval mode they have equal outputs.
    """
    structure = repr(module)
    if ignore_dropout:
        structure = DROPOUT_RATE.sub(r"\1", structure)
    digest = hashlib.sha256(structure.encode())
    state = module.state_dict()
    others = {name: value for name, value in module.named_buffers() if name not in state}
    for path, part in module.named_modules():
        for name, value in _settings(part, ignore_dropout=ignore_dropout):
            if isinstance(value, Tensor):
                others[f"{path}.{name}"] = value
            else:
                digest.update(f"{path}.{name} {value}\n".encode(errors="surrogateescape"))
    for name, value in (state | others).items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def _settings(module: nn.Module, *, ignore_dropout: bool) -> Iterator[tuple[str, Any]]:
    """The public attributes of a module itself that are plain values, as text, or tensors.

    Its forward pass may follow them, and `repr` need not show them: such as the number of heads, or
    a factor in a module of the user's own.
    """
    if ignore_dropout and DROPOUT_CLASS.fullmatch(type(module).__name__):
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training" or (ignore_dropout and "drop" in name):
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif (text := _plain_text(value)) is not None:
            yield name, text


def _plain_text(value: Any) -> str | None:
    """A plain value as text, equal in every process; None for anything else."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (list, tuple)):
        parts = [_plain_text(each) for each in value]
    elif isinstance(value, Mapping):
        parts = [_plain_text(each) for pair in value.items() for each in pair]
    else:
        return None
    known = [part for part in parts if part is not None]
    return f"[{', '.join(known)}]" if len(known) == len(parts) else None
