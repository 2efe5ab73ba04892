"""Stores tensors in a cache entry: one folder per entry, one memory-mapped file per tensor."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.types import Batch
from tuner.files.cache_entries import PinnedEntry, write_checksums

ReadBatch = Callable[[Tensor], Batch]
TensorMeta = dict[str, Any]  # name, shape of one example, dtype
META_FILE = "meta.json"  # the tensors of an entry, in the order of its files 0.bin, 1.bin, …


# Activations of images are stored channels-last, as they are computed and as the suffix needs them.


def to_channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def to_channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


class TensorWriter:
    """Writes the tensors of one entry, chunk by chunk. The entry is complete after `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: list[TensorMeta] = []
        self.hashes: list[Any] = []  # the SHA-256 of each file so far
        self.bytes_written = 0

    def append(self, chunk: dict[str, Tensor]) -> None:
        if not self.meta:
            self.hashes = [hashlib.sha256() for _ in chunk]
            self.meta = [
                {
                    "name": name,
                    "shape": list(tensor.shape[1:]),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }
                for name, tensor in chunk.items()
            ]
        for i, value in enumerate(chunk.values()):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            self.hashes[i].update(data)
            self.bytes_written += len(data)
            with open(self.folder / f"{i}.bin", "ab") as file:
                file.write(data)

    def close(self) -> None:
        (self.folder / META_FILE).write_text(json.dumps(self.meta))
        write_checksums(
            self.folder, {f"{i}.bin": digest.hexdigest() for i, digest in enumerate(self.hashes)}
        )


def map_tensors(entry: PinnedEntry, length: int) -> dict[str, Tensor]:
    """The tensors of an entry, each mapped from its file.

    Args:
        entry: the entry. Keep it as long as the tensors are used, so that it is not evicted.
        length: the number of examples, the first dimension of each tensor.
    """
    metas: list[TensorMeta] = json.loads((entry.folder / META_FILE).read_text())
    return {
        meta["name"]: _map_tensor(entry.folder / f"{i}.bin", meta, length)
        for i, meta in enumerate(metas)
    }


def _map_tensor(path: Path, meta: TensorMeta, length: int) -> Tensor:
    shape = (length, *meta["shape"])
    dtype = getattr(torch, meta["dtype"])
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def fits_on_gpu(tensors: dict[str, Tensor], device: torch.device) -> bool:
    """Whether the tensors need less than a quarter of the GPU's free memory."""
    free, total = torch.cuda.mem_get_info(device)
    # of a GPU that several workers share, this worker's fraction
    own_limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return sum(tensor.nbytes for tensor in tensors.values()) < 0.25 * min(free, own_limit)


TARGET_PREFIX = "y."  # the names of the tensors of a batch's y begin with it


def prefix_targets(y: TensorTree) -> dict[str, Tensor]:
    return {f"{TARGET_PREFIX}{name}": tensor for name, tensor in tree_to_dict(y).items()}


def _dict_to_tree(tensors: dict[str, Tensor]) -> TensorTree:
    """The inverse of `tree_to_dict`."""
    return tensors[""] if set(tensors) == {""} else tensors


class EntryReader:
    """Reads batches from an entry, onto `device`. It pins the entry as long as it lives."""

    def __init__(
        self, entry: PinnedEntry, length: int, device: torch.device, *, into_memory: bool = False
    ) -> None:
        """`into_memory`: copy the whole entry into the memory of the GPU, if it fits."""
        self.entry, self.device = entry, device
        values = map_tensors(entry, length)
        if into_memory and device.type == "cuda" and fits_on_gpu(values, device):
            values = {name: value.to(device) for name, value in values.items()}
        self.inputs = {
            name: value for name, value in values.items() if not name.startswith(TARGET_PREFIX)
        }
        self.targets = {
            name.removeprefix(TARGET_PREFIX): value
            for name, value in values.items()
            if name.startswith(TARGET_PREFIX)
        }

    def __call__(self, index: Tensor) -> Batch:
        x = {
            name: to_channels_first(value[index.to(value.device)].to(self.device))
            for name, value in self.inputs.items()
        }
        y = {
            name: value[index.to(value.device)].to(self.device)
            for name, value in self.targets.items()
        }
        return Batch(_dict_to_tree(x), _dict_to_tree(y))
