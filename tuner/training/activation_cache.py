"""What a frozen prefix computes is a fixed function of the data, so it can be remembered: a Source over memory-mapped files."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import Tree, leaves
from tuner.core.types import Batch, Source, digest_of
from tuner.files.atomic import atomic_folder, atomic_path, disk_errors, lock_of, locked, sweep
from tuner.files.cache_entries import hold, make_room, opened
from tuner.preprocessing.tensor_files import Entry, Reader, Writer, channels_last, truth

CHUNK = 64  # examples computed at once when filling
PROBE = 32  # examples on which computing and reading are timed
DISK = 2e8  # bytes a second, of what does not fit into the memory


@dataclass(frozen=True)
class Limits:
    """Where activations are kept and how much of them.

    `mode` is auto (what fits and is sooner read than computed), always (whatever the size) or never.
    """

    home: Path
    gigabytes: float = 4.0
    mode: str = "auto"


@dataclass(frozen=True)
class Prefix:
    """Frozen stages as one device computes them. `names` has one for what each stage gives: equal names, equal function."""

    stages: Sequence[nn.Module]
    names: Sequence[str]
    device: torch.device
    around: Callable[[], AbstractContextManager[None]] = nullcontext  # autocast, say

    def compute(self, x: Tree, begin: int = 0, end: int | None = None) -> Tree:
        """`x`, that has come through the first `begin` stages, on to stage `end`, or to the last."""
        with torch.no_grad(), self.around():
            for stage in self.stages[begin:end]:
                x = stage(x)
        return x


def names_of(stages: Sequence[nn.Module], start: str) -> tuple[str, ...]:
    """A name for what each stage gives, which depends on `start` and on every stage up to it."""
    names = [start]
    for stage in stages:
        names.append(hashlib.sha256(f"{names[-1]} {digest_of(stage)}".encode()).hexdigest()[:32])
    return tuple(names[1:])


def through(prefix: Prefix, source: Source, limits: Limits) -> Source:
    """`source` seen through `prefix`: remembered when that fits the limits and pays, computed on the fly otherwise."""
    if not prefix.stages:
        return source
    live = Live(prefix, source)
    if limits.mode == "never" or source.views is None:
        return live
    folder = limits.home / "activations"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    limit = limits.gigabytes * 1e9
    if limits.mode == "always":
        limit = math.inf
    else:
        cost = timed(live, folder)
        need = cost["bytes"] * len(source) * source.views
        if need > limit or need > 0.8 * shutil.disk_usage(folder).free:
            return live
        disk = cost["bytes"] / DISK if need > 0.5 * _free_memory() else 0.0
        if cost["reading"] + disk > cost["computing"]:
            return live
    return Remembered(live, folder, limit)


def timed(live: "Live", folder: Path) -> dict[str, float]:
    """What one example costs through a prefix: seconds for `computing` it and for `reading` it from memory, and `bytes`.

    Timed once on a batch, and kept beside the activations: trials that are repeated must find the same answer.
    """
    shape = [
        tuple(leaf.shape) for leaf in leaves(live.source.take(torch.tensor([0]), 0).x).values()
    ]
    note = (
        folder
        / f"{hashlib.sha256(f'{live.prefix.names[-1]} {shape}'.encode()).hexdigest()[:32]}.cost.json"
    )
    try:
        known = json.loads(note.read_text())
        return {key: float(known[key]) for key in ("computing", "reading", "bytes")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    index = torch.arange(min(PROBE, len(live)))
    before = live.source.take(index, 0).x
    computing, x = _seconds(lambda: live.prefix.compute(before), live.prefix.device)
    held = [channels_last(leaf).contiguous() for leaf in leaves(x).values()]
    reading, _ = _seconds(
        lambda: [leaf[torch.randperm(len(leaf)).to(leaf.device)] for leaf in held],
        live.prefix.device,
    )
    found = {
        "computing": computing,
        "reading": reading,
        "bytes": float(sum(leaf.nbytes for leaf in held)),
    }
    found = {key: value / len(index) for key, value in found.items()}
    with disk_errors(note), atomic_path(note, what="note") as temporary:
        temporary.write_text(json.dumps(found))
    return found


def _seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The shortest of three runs, and what the last gave."""
    best, found = math.inf, None
    for _ in range(3):
        start = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best, found


def _free_memory() -> float:
    """Bytes that new files can fill before some must be read from the disk again."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return math.inf


class Live:
    """A source seen through a prefix, computed at each take: the plain twin of Remembered."""

    def __init__(self, prefix: Prefix, source: Source) -> None:
        self.prefix, self.source = prefix, source
        self.views, self.digest, self.lengths = source.views, source.digest, source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.source.take(index, view)
        return Batch(self.prefix.compute(x), y)


class NoRoom(Exception):
    """What others read leaves no room within the limit."""


class Remembered:
    """A source seen through a prefix, computed once per view and kept in `folder` for every later trial and worker.

    Where what others are reading leaves no room for it, it is computed at each take.
    """

    def __init__(self, live: Live, folder: Path, limit: float) -> None:
        self.live, self.folder, self.limit, self.device = live, folder, limit, live.prefix.device
        self.views, self.digest, self.lengths = live.views, live.digest, live.lengths
        self.opened: dict[int, Reader] = {}

    def __len__(self) -> int:
        return len(self.live)

    def take(self, index: Tensor, view: int) -> Batch:
        view %= self.views or 1
        if view not in self.opened:
            self.opened[view] = self._open(view)
        return self.opened[view](index)

    def place(self, depth: int, view: int) -> Path:
        """Where the source is kept as it comes out of stage `depth`."""
        name = f"2 {self.live.prefix.names[depth - 1]} {self.live.source.digest}"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}-{view}"

    def _open(self, view: int) -> Reader:
        depth = len(self.live.prefix.stages)
        place = self.place(depth, view)
        try:
            held = opened(place, lambda: self._fill(depth, view))
        except NoRoom:
            return lambda index: self.live.take(index, view)
        return Entry(held, len(self), self.device, into_memory=True)

    def _fill(self, depth: int, view: int) -> None:
        """One pass over the source, beginning at the nearest shallower stage that is kept; keeps what it passes if small.

        Raises NoRoom.
        """
        sweep(self.folder)
        begin, take = self._begin(depth, view)
        writers: dict[int, Writer] = {}
        with ExitStack() as stack:
            for index in torch.split(torch.arange(len(self)), CHUNK):
                first, y = take(index)
                x, passed = first, dict[int, Tree]()
                for reached in range(begin + 1, depth + 1):
                    x = self.live.prefix.compute(x, reached - 1, reached)
                    if not writers or reached in writers:
                        passed[reached] = x
                if not writers:
                    needs = {
                        at: len(self) * (_size(passed[at]) + _size(y))
                        for at in self._small(passed, depth, _size(first))
                    }
                    self._make_room(sum(needs.values()))
                    claims = {
                        at: self._claim(stack, at, view, need, at == depth)
                        for at, need in needs.items()
                    }
                    writers = {
                        at: Writer(folder) for at, folder in claims.items() if folder is not None
                    }
                for at, writer in writers.items():
                    writer.add(
                        {**{k: channels_last(v) for k, v in leaves(passed[at]).items()}, **truth(y)}
                    )
            for writer in writers.values():
                writer.close()
            self._make_room(0.0)  # others may have filled theirs meanwhile

    def _make_room(self, need: float) -> None:
        if not make_room(self.folder, need, self.limit):
            raise NoRoom

    def _begin(self, depth: int, view: int) -> tuple[int, Reader]:
        """The deepest stage before `depth` that is kept, and how its outputs are had; the source itself is stage 0."""
        for kept in range(depth - 1, 0, -1):
            held = hold(self.place(kept, view))
            if held is not None:
                return kept, Entry(held, len(self), self.device)
        return 0, lambda index: self.live.source.take(index, view)

    def _small(self, passed: dict[int, Tree], depth: int, largest: float) -> list[int]:
        """The stages to keep: `depth`, and of those on the way the deepest that are no larger than what they began with
        and fit a quarter of the limit together."""
        room, kept = self.limit / 4, [depth]
        for at in sorted(passed.keys() - {depth}, reverse=True):
            room -= _size(passed[at]) * len(self) * (self.views or 1)
            if room >= 0 and _size(passed[at]) <= largest:
                kept.append(at)
        return kept

    def _claim(
        self, stack: ExitStack, depth: int, view: int, need: float, held: bool
    ) -> Path | None:
        """A folder to fill until `stack` closes. None: it is there, or being filled. `held`: its lock is ours already."""
        place = self.place(depth, view)
        if not held and (
            not stack.enter_context(locked(lock_of(place), wait=False)) or hold(place) is not None
        ):
            return None
        return stack.enter_context(atomic_folder(place, need, "activations"))


def _size(x: Tree) -> float:
    """Bytes of one example."""
    return sum(leaf.nbytes / len(leaf) for leaf in leaves(x).values())
