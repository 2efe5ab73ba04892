"""What is in a checkpoint file: its header, and its tensors in pieces without a copy.

`safetensors.torch.save` copies every tensor while it holds Python's global lock, so a training
beside the thread that writes would stand still. The pieces of this module are read by hashing and
by writing, both of which leave the lock to others. The format:
https://github.com/huggingface/safetensors, "Format".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tuner.config.run import LoraOptions
from tuner.core.adapters import has_adapters, trained_state
from tuner.files.checkpoint_files import read_verified
from tuner.training.adapters import merged_state

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # bytes: the data begins at a multiple of it


def to_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> list[bytes | memoryview]:
    """The file's header, and the content of each tensor.

    Args:
        tensors: Contiguous tensors on the CPU, each with memory of its own.
        metadata: Texts by name.

    Raises:
        ValueError: safetensors has no such type.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    pieces: list[bytes | memoryview] = []
    end = 0
    # large types first, so that every tensor begins at a multiple of its type's size
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        if tensor.dtype not in TYPE_NAMES:
            raise ValueError(f"checkpoint: {name} is {tensor.dtype}, which safetensors cannot hold")
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        pieces.append(tensor.flatten().view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def read_header(content: bytes) -> dict[str, Any]:
    """The header of a checkpoint; empty where the content is no checkpoint of tuner's."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        values = json.loads(header["__metadata__"]["checkpoint"])
    except (ValueError, KeyError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}


def match_memory_layout(parameter: Tensor, value: Tensor) -> Tensor:
    """A value of the optimizer with the device and the memory format of its parameter, as it had
    before it was saved.
    """
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, named without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def to_independent_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors needs them: contiguous, on the CPU, no two in the same memory."""
    addresses: set[int] = set()
    independent = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        independent[name] = value.clone() if address in addresses else value
        addresses.add(address)
    return independent


def native_state(model: nn.Module, net: nn.Module) -> dict[str, Tensor]:
    """The trained parameters and the buffers of `net` under the names that they have in `model`."""
    names = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    return {
        names[id(value)]: value
        for value in trained_state(net, keep_vars=True).values()
        if id(value) in names
    }


def load_best_weights(
    path: Path, model: nn.Module, net: nn.Module, adapters: LoraOptions | None = None
) -> bool:
    """Loads what `Checkpoints.save_best_weights` wrote into `net`; False where it is damaged or of
    another model.

    `adapters`: those of a run with which the file was written. In a net that has none they are
    added to its weights.
    """
    content = read_verified(path)
    if content is None:
        return False
    tensors, own = safetensors.torch.load(content), native_state(model, net)
    if adapters is not None and not has_adapters(net):
        try:
            tensors = merged_state(model, tensors, adapters)
        except (AttributeError, KeyError, RuntimeError):  # layers or shapes that it does not have
            return False
        own = {name: value for name, value in own.items() if name in tensors}
    if {name: value.shape for name, value in tensors.items()} != {
        name: value.shape for name, value in own.items()
    }:
        return False
    model.load_state_dict(tensors, strict=False)
    return True
