"""Remembered activations as files: one folder an entry, a memory-mapped file a leaf, written whole or not at all."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.core.input_spec import Tree, leaves
from tuner.core.types import Batch
from tuner.files.cache_entries import Held, seal

Reader = Callable[[Tensor], Batch]
Leaf = dict[str, Any]  # name, shape of one example, dtype
META = "meta.json"  # the leaves of an entry, in the order of its files 0.bin, 1.bin, …


# A picture's activations are kept channels-last, which is how they are computed and how the suffix wants them.


def channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


class Writer:
    """Fills one entry, chunk by chunk; `close` says what it holds, and only then it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: list[Leaf] = []
        self.seen: list[Any] = []  # the SHA-256 of each file so far
        self.bytes = 0

    def add(self, chunk: dict[str, Tensor]) -> None:
        if not self.meta:
            self.seen = [hashlib.sha256() for _ in chunk]
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
            self.seen[i].update(data)
            self.bytes += len(data)
            with open(self.folder / f"{i}.bin", "ab") as file:
                file.write(data)

    def close(self) -> None:
        (self.folder / META).write_text(json.dumps(self.meta))
        seal(self.folder, {f"{i}.bin": seen.hexdigest() for i, seen in enumerate(self.seen)})


def mapped(held: Held, length: int) -> dict[str, Tensor]:
    """The leaves of an entry, each mapped from its file. Whoever uses them keeps `held`."""
    meta: list[Leaf] = json.loads((held.folder / META).read_text())
    return {
        leaf["name"]: _leaf(held.folder / f"{i}.bin", leaf, length) for i, leaf in enumerate(meta)
    }


def _leaf(path: Path, leaf: Leaf, length: int) -> Tensor:
    shape = (length, *leaf["shape"])
    dtype = getattr(torch, leaf["dtype"])
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def fits_on_gpu(values: dict[str, Tensor], device: torch.device) -> bool:
    free, whole = torch.cuda.mem_get_info(device)
    free = min(
        free, int(whole * torch.cuda.get_per_process_memory_fraction(device))
    )  # of a GPU that is shared, this worker's part
    return sum(v.nbytes for v in values.values()) < 0.25 * free


TRUTH = "y."  # begins the names of the leaves of a batch's y


def truth(y: Tree) -> dict[str, Tensor]:
    return {f"{TRUTH}{name}": leaf for name, leaf in leaves(y).items()}


def _tree(found: dict[str, Tensor]) -> Tree:
    """What `leaves` took apart."""
    return found[""] if set(found) == {""} else found


class Entry:
    """Batches of what an entry holds, on `device`. The entry stays as long as this object lives."""

    def __init__(
        self, held: Held, length: int, device: torch.device, *, into_memory: bool = False
    ) -> None:
        """`into_memory`: on a GPU, in its memory, where it fits."""
        self.held, self.device = held, device
        values = mapped(held, length)
        if into_memory and device.type == "cuda" and fits_on_gpu(values, device):
            values = {name: value.to(device) for name, value in values.items()}
        self.inputs = {name: value for name, value in values.items() if not name.startswith(TRUTH)}
        self.truths = {
            name.removeprefix(TRUTH): value
            for name, value in values.items()
            if name.startswith(TRUTH)
        }

    def __call__(self, index: Tensor) -> Batch:
        x = {
            name: channels_first(value[index.to(value.device)].to(self.device))
            for name, value in self.inputs.items()
        }
        y = {
            name: value[index.to(value.device)].to(self.device)
            for name, value in self.truths.items()
        }
        return Batch(_tree(x), _tree(y))
