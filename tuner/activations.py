"""Remembered activations as files: one folder an entry, a memory-mapped file a leaf, written whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.core import Batch
from tuner.wanted import Tree, leaves

Reader = Callable[[Tensor], Batch]
Leaf = dict[str, Any]  # name, shape of one example, dtype


# A picture's activations are kept channels-last, which is how they are computed and how the suffix wants them.


def channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"), key=lambda path: int(path.stem))


def whole(folder: Path) -> list[Leaf] | None:
    """What a finished entry holds; None when there is none, or a damaged one."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        leaves_: list[Leaf] = meta["leaves"]
        return leaves_ if meta["bytes"] == [f.stat().st_size for f in files(folder)] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


class Writer:
    """Fills one entry, chunk by chunk; `close` says what it holds, and only then it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: list[Leaf] = []

    def add(self, chunk: dict[str, Tensor]) -> None:
        if not self.meta:
            self.meta = [{"name": k, "shape": list(v.shape[1:]), "dtype": str(v.dtype).removeprefix("torch.")} for k, v in chunk.items()]
        for i, value in enumerate(chunk.values()):
            with open(self.folder / f"{i}.bin", "ab") as file:
                file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> int:
        """The bytes written."""
        sizes = [f.stat().st_size for f in files(self.folder)]
        (self.folder / "meta.json").write_text(json.dumps({"bytes": sizes, "leaves": self.meta}))
        return sum(sizes)


def mapped(folder: Path, length: int) -> dict[str, Tensor]:
    """The leaves of a finished entry, each mapped from its file; the entry counts as used."""
    meta = whole(folder)
    assert meta is not None
    os.utime(folder)
    return {leaf["name"]: _leaf(folder / f"{i}.bin", leaf, length) for i, leaf in enumerate(meta)}


def _leaf(path: Path, leaf: Leaf, length: int) -> Tensor:
    shape = (length, *leaf["shape"])
    dtype = getattr(torch, leaf["dtype"])
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def fits_on_gpu(values: dict[str, Tensor], device: torch.device) -> bool:
    free, whole = torch.cuda.mem_get_info(device)
    free = min(free, int(whole * torch.cuda.get_per_process_memory_fraction(device)))  # of a GPU that is shared, this worker's part
    return sum(v.nbytes for v in values.values()) < 0.25 * free


def make_room(folder: Path, need: float, limit: float) -> None:
    """Removes the least recently used entries until `need` more bytes fit `limit`. Mapped files stay readable on POSIX."""
    entries = sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in entries}
    used = sum(sizes.values())
    for entry in entries:
        if used + need <= limit:
            break
        shutil.rmtree(entry, ignore_errors=True)
        used -= sizes[entry]


TRUTH = "y."  # begins the names of the leaves of a batch's y


def truth(y: Tree) -> dict[str, Tensor]:
    return {f"{TRUTH}{name}": leaf for name, leaf in leaves(y).items()}


def _tree(found: dict[str, Tensor]) -> Tree:
    """What `leaves` took apart."""
    return found[""] if set(found) == {""} else found


def reader(values: dict[str, Tensor], device: torch.device) -> Reader:
    """Batches of what an entry holds."""
    inputs = {name: value for name, value in values.items() if not name.startswith(TRUTH)}
    truths = {name.removeprefix(TRUTH): value for name, value in values.items() if name.startswith(TRUTH)}

    def read(index: Tensor) -> Batch:
        x = {name: channels_first(value[index.to(value.device)].to(device)) for name, value in inputs.items()}
        y = {name: value[index.to(value.device)].to(device) for name, value in truths.items()}
        return Batch(_tree(x), _tree(y))

    return read
