"""What a frozen prefix computes is a fixed function of the data, so it can be remembered: a Source over memory-mapped files."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core import Batch, Source, Tree, digest_of, leaves
from tuner.files import atomic_folder, disk_errors, lock_of, locked, sweep

CHUNK = 256
Leaf = dict[str, Any]  # name, shape of one example, dtype


@dataclass(frozen=True)
class Limits:
    """Where activations are kept and how much of them. `mode` is auto, always (whatever the size) or never."""

    home: Path
    gigabytes: float = 4.0
    mode: str = "auto"


def through(prefix: nn.Module, source: Source, device: torch.device, precision: str, limits: Limits) -> Source:
    """`source` seen through `prefix`: remembered when that fits the limits, computed on the fly otherwise."""
    if len(list(prefix.children())) == 0:
        return source
    live = Live(prefix, source)
    if limits.mode == "never" or source.views is None:
        return live
    need = _bytes_per_example(live) * len(source) * source.views
    limit = math.inf if limits.mode == "always" else limits.gigabytes * 1e9
    folder = limits.home / "activations"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if limits.mode == "auto" and (need > limit or need > 0.8 * shutil.disk_usage(folder).free):
        return live
    key = f"1 {digest_of(prefix)} {source.digest} {precision} {device.type}"
    return Remembered(live, folder, hashlib.sha256(key.encode()).hexdigest()[:32], device, limit)


def _bytes_per_example(live: "Live") -> int:
    batch = live.take(torch.arange(min(2, len(live))), 0)
    return sum(math.prod(leaf.shape[1:]) * leaf.element_size() for leaf in leaves(batch.x).values())


class Live:
    """A source seen through a prefix, computed at each take: the plain twin of Remembered."""

    def __init__(self, prefix: nn.Module, source: Source) -> None:
        self.prefix, self.source = prefix, source
        self.views, self.digest = source.views, source.digest

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.source.take(index, view)
        with torch.no_grad():
            return Batch(self.prefix(x), y)


class Remembered:
    """A source seen through a prefix, computed once per view and kept in `folder` for every later trial and worker."""

    def __init__(self, live: Live, folder: Path, key: str, device: torch.device, limit: float) -> None:
        self.live, self.folder, self.key, self.device, self.limit = live, folder, key, device, limit
        self.views, self.digest = live.views, live.digest
        self.opened: dict[int, tuple[dict[str, Tensor], Tensor]] = {}

    def __len__(self) -> int:
        return len(self.live)

    def take(self, index: Tensor, view: int) -> Batch:
        view %= self.views or 1
        if view not in self.opened:
            self.opened[view] = self._open(view)
        values, y = self.opened[view]
        found = {name: _channels_first(value[index.to(value.device)].to(self.device)) for name, value in values.items()}
        x: Tree = found[""] if set(found) == {""} else found
        return Batch(x, y[index.to(y.device)].to(self.device))

    def _open(self, view: int) -> tuple[dict[str, Tensor], Tensor]:
        place = self.folder / f"{self.key}-{view}"
        if _whole(place) is None:
            with locked(lock_of(place)):
                if _whole(place) is None:
                    sweep(self.folder)
                    self._compute(place, view)
        meta = _whole(place)
        assert meta is not None
        os.utime(place)
        values = {leaf["name"]: _mapped(place / f"{i}.bin", leaf, len(self)) for i, leaf in enumerate(meta)}
        y = values.pop("y")
        if self.device.type == "cuda" and _fits_on_gpu(values, self.device):
            values = {name: value.to(self.device) for name, value in values.items()}
        return values, y

    def _compute(self, place: Path, view: int) -> None:
        with atomic_folder(place) as temporary:
            meta = _write(temporary, self._chunks(view))
            (temporary / "meta.json").write_text(json.dumps({"bytes": [f.stat().st_size for f in _files(temporary)], "leaves": meta}))
            make_room(self.folder, sum(f.stat().st_size for f in temporary.iterdir()), self.limit)

    def _chunks(self, view: int) -> Iterator[dict[str, Tensor]]:
        for index in torch.split(torch.arange(len(self)), CHUNK):
            x, y = self.live.take(index, view)
            yield {**{k: _channels_last(v) for k, v in leaves(x).items()}, "y": y}


# A picture's activations are kept channels-last, which is how they are computed and how the suffix wants them.


def _channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def _channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"), key=lambda path: int(path.stem))


def _whole(folder: Path) -> list[Leaf] | None:
    """What a finished entry holds; None when there is none, or a damaged one."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        leaves_: list[Leaf] = meta["leaves"]
        return leaves_ if meta["bytes"] == [f.stat().st_size for f in _files(folder)] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, chunks: Iterator[dict[str, Tensor]]) -> list[Leaf]:
    meta: list[Leaf] = []
    for chunk in chunks:
        if not meta:
            meta = [{"name": k, "shape": list(v.shape[1:]), "dtype": str(v.dtype).removeprefix("torch.")} for k, v in chunk.items()]
        for i, value in enumerate(chunk.values()):
            with open(folder / f"{i}.bin", "ab") as file:
                file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return meta


def _mapped(path: Path, leaf: Leaf, length: int) -> Tensor:
    shape = (length, *leaf["shape"])
    dtype = getattr(torch, leaf["dtype"])
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def _fits_on_gpu(values: dict[str, Tensor], device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
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
