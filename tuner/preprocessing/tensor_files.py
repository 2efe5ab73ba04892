"""Remembered activations as files: one folder an entry, a memory-mapped file a leaf, written whole or not at all."""

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
META_FILE = "meta.json"  # the leaves of an entry, in the order of its files 0.bin, 1.bin, …


# A picture's activations are kept channels-last, which is how they are computed and how the suffix wants them.


def to_channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def to_channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


class TensorWriter:
    """Fills one entry, chunk by chunk; `close` says what it holds, and only then it is whole."""

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
                    "name": k,
                    "shape": list(v.shape[1:]),
                    "dtype": str(v.dtype).removeprefix("torch."),
                }
                for k, v in chunk.items()
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
            self.folder, {f"{i}.bin": seen.hexdigest() for i, seen in enumerate(self.hashes)}
        )


def map_tensors(entry: PinnedEntry, length: int) -> dict[str, Tensor]:
    """The leaves of an entry, each mapped from its file. Whoever uses them keeps `held`."""
    meta: list[TensorMeta] = json.loads((entry.folder / META_FILE).read_text())
    return {
        leaf["name"]: _map_tensor(entry.folder / f"{i}.bin", leaf, length)
        for i, leaf in enumerate(meta)
    }


def _map_tensor(path: Path, leaf: TensorMeta, length: int) -> Tensor:
    shape = (length, *leaf["shape"])
    dtype = getattr(torch, leaf["dtype"])
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def fits_on_gpu(values: dict[str, Tensor], device: torch.device) -> bool:
    free, whole = torch.cuda.mem_get_info(device)
    free = min(
        free, int(whole * torch.cuda.get_per_process_memory_fraction(device))
    )  # of a GPU that is shared, this worker's part
    return sum(v.nbytes for v in values.values()) < 0.25 * free


TARGET_PREFIX = "y."  # begins the names of the leaves of a batch's y


def prefix_targets(y: TensorTree) -> dict[str, Tensor]:
    return {f"{TARGET_PREFIX}{name}": leaf for name, leaf in tree_to_dict(y).items()}


def _dict_to_tree(found: dict[str, Tensor]) -> TensorTree:
    """What `leaves` took apart."""
    return found[""] if set(found) == {""} else found


class EntryReader:
    """Batches of what an entry holds, on `device`. The entry stays as long as this object lives."""

    def __init__(
        self, entry: PinnedEntry, length: int, device: torch.device, *, into_memory: bool = False
    ) -> None:
        """`into_memory`: on a GPU, in its memory, where it fits."""
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
