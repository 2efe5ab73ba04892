"""The digest of a module: equal digests mean equal functions."""

import hashlib
import re

import torch
from torch import nn

# the rate in the representation of torch's dropout, torchvision's and timm's stochastic depth
DROPOUT_RATE = re.compile(
    r"(\b(?:\w*Dropout\w*|DropPath|StochasticDepth)\()(?:p|drop_prob)=[0-9.e-]+"
)


def module_digest(module: nn.Module, *, ignore_dropout: bool = False) -> str:
    """SHA-256 over a module's structure, parameters and buffers.

    With `ignore_dropout` modules that differ in the rates of dropout alone have equal digests, as
    in eval mode they have equal outputs.
    """
    structure = repr(module)
    if ignore_dropout:
        structure = DROPOUT_RATE.sub(r"\1", structure)
    digest = hashlib.sha256(structure.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
