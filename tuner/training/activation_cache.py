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

from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.types import Batch, Source, module_digest
from tuner.files.atomic import (
    atomic_folder,
    atomic_path,
    disk_errors,
    file_lock,
    lock_path,
    remove_leftovers,
)
from tuner.files.cache_entries import evict_until_fits, open_or_create, try_open
from tuner.preprocessing.tensor_files import (
    EntryReader,
    ReadBatch,
    TensorWriter,
    prefix_targets,
    to_channels_last,
)

FILL_CHUNK = 64  # examples computed at once when filling
TIMED_EXAMPLES = 32  # examples on which computing and reading are timed
DISK_BYTES_PER_SECOND = 2e8  # bytes a second, of what does not fit into the memory


@dataclass(frozen=True)
class CacheLimits:
    """Where activations are kept and how much of them.

    `mode` is auto (what fits and is sooner read than computed), always (whatever the size) or never.
    """

    home: Path
    gigabytes: float = 4.0
    mode: str = "auto"


@dataclass(frozen=True)
class FrozenPrefix:
    """Frozen stages as one device computes them. `names` has one for what each stage gives: equal names, equal function."""

    stages: Sequence[nn.Module]
    stage_digests: Sequence[str]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext  # autocast, say

    def compute(self, x: TensorTree, begin: int = 0, end: int | None = None) -> TensorTree:
        """`x`, that has come through the first `begin` stages, on to stage `end`, or to the last."""
        with torch.no_grad(), self.autocast():
            for stage in self.stages[begin:end]:
                x = stage(x)
        return x


def stage_digests(stages: Sequence[nn.Module], start: str) -> tuple[str, ...]:
    """A name for what each stage gives, which depends on `start` and on every stage up to it."""
    names = [start]
    for stage in stages:
        names.append(
            hashlib.sha256(f"{names[-1]} {module_digest(stage)}".encode()).hexdigest()[:32]
        )
    return tuple(names[1:])


def source_behind(prefix: FrozenPrefix, source: Source, limits: CacheLimits) -> Source:
    """`source` seen through `prefix`: remembered when that fits the limits and pays, computed on the fly otherwise."""
    if not prefix.stages:
        return source
    live = UncachedSource(prefix, source)
    if limits.mode == "never" or source.views is None:
        return live
    folder = limits.home / "activations"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    limit = limits.gigabytes * 1e9
    if limits.mode == "always":
        limit = math.inf
    else:
        cost = measure_costs(live, folder)
        need = cost["bytes"] * len(source) * source.views
        if need > limit or need > 0.8 * shutil.disk_usage(folder).free:
            return live
        disk = cost["bytes"] / DISK_BYTES_PER_SECOND if need > 0.5 * _available_memory() else 0.0
        if cost["reading"] + disk > cost["computing"]:
            return live
    return CachedSource(live, folder, limit)


def measure_costs(uncached: "UncachedSource", folder: Path) -> dict[str, float]:
    """What one example costs through a prefix: seconds for `computing` it and for `reading` it from memory, and `bytes`.

    Timed once on a batch, and kept beside the activations: trials that are repeated must find the same answer.
    """
    shape = [
        tuple(leaf.shape)
        for leaf in tree_to_dict(uncached.source.take(torch.tensor([0]), 0).x).values()
    ]
    note = (
        folder
        / f"{hashlib.sha256(f'{uncached.prefix.stage_digests[-1]} {shape}'.encode()).hexdigest()[:32]}.cost.json"
    )
    try:
        known = json.loads(note.read_text())
        return {key: float(known[key]) for key in ("computing", "reading", "bytes")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    index = torch.arange(min(TIMED_EXAMPLES, len(uncached)))
    before = uncached.source.take(index, 0).x
    computing, x = _time_call(lambda: uncached.prefix.compute(before), uncached.prefix.device)
    held = [to_channels_last(leaf).contiguous() for leaf in tree_to_dict(x).values()]
    reading, _ = _time_call(
        lambda: [leaf[torch.randperm(len(leaf)).to(leaf.device)] for leaf in held],
        uncached.prefix.device,
    )
    found = {
        "computing": computing,
        "reading": reading,
        "bytes": float(sum(leaf.nbytes for leaf in held)),
    }
    found = {key: value / len(index) for key, value in found.items()}
    with disk_errors(note), atomic_path(note, crash_prefix="note") as temporary:
        temporary.write_text(json.dumps(found))
    return found


def _time_call(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The shortest of three runs, and what the last gave."""
    best, found = math.inf, None
    for _ in range(3):
        start = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best, found


def _available_memory() -> float:
    """Bytes that new files can fill before some must be read from the disk again."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return math.inf


class UncachedSource:
    """A source seen through a prefix, computed at each take: the plain twin of Remembered."""

    def __init__(self, prefix: FrozenPrefix, source: Source) -> None:
        self.prefix, self.source = prefix, source
        self.views, self.digest, self.lengths = source.views, source.digest, source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.source.take(index, view)
        return Batch(self.prefix.compute(x), y)


class CacheFull(Exception):
    """What others read leaves no room within the limit."""


class CachedSource:
    """A source seen through a prefix, computed once per view and kept in `folder` for every later trial and worker.

    Where what others are reading leaves no room for it, it is computed at each take.
    """

    def __init__(self, live: UncachedSource, folder: Path, limit: float) -> None:
        self.uncached, self.folder, self.byte_limit, self.device = (
            live,
            folder,
            limit,
            live.prefix.device,
        )
        self.views, self.digest, self.lengths = live.views, live.digest, live.lengths
        self.readers: dict[int, ReadBatch] = {}

    def __len__(self) -> int:
        return len(self.uncached)

    def take(self, index: Tensor, view: int) -> Batch:
        view %= self.views or 1
        if view not in self.readers:
            self.readers[view] = self._open_entry(view)
        return self.readers[view](index)

    def entry_folder(self, depth: int, view: int) -> Path:
        """Where the source is kept as it comes out of stage `depth`."""
        name = f"2 {self.uncached.prefix.stage_digests[depth - 1]} {self.uncached.source.digest}"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}-{view}"

    def _open_entry(self, view: int) -> ReadBatch:
        depth = len(self.uncached.prefix.stages)
        place = self.entry_folder(depth, view)
        try:
            held = open_or_create(place, lambda: self._fill_entry(depth, view))
        except CacheFull:
            return lambda index: self.uncached.take(index, view)
        return EntryReader(held, len(self), self.device, into_memory=True)

    def _fill_entry(self, depth: int, view: int) -> None:
        """One pass over the source, beginning at the nearest shallower stage that is kept; keeps what it passes if small.

        Raises NoRoom.
        """
        remove_leftovers(self.folder)
        begin, take = self._nearest_cached_stage(depth, view)
        writers: dict[int, TensorWriter] = {}
        with ExitStack() as stack:
            for index in torch.split(torch.arange(len(self)), FILL_CHUNK):
                first, y = take(index)
                x, passed = first, dict[int, TensorTree]()
                for reached in range(begin + 1, depth + 1):
                    x = self.uncached.prefix.compute(x, reached - 1, reached)
                    if not writers or reached in writers:
                        passed[reached] = x
                if not writers:
                    needs = {
                        at: len(self) * (_bytes_per_example(passed[at]) + _bytes_per_example(y))
                        for at in self._stages_to_keep(passed, depth, _bytes_per_example(first))
                    }
                    self._evict_until_fits(sum(needs.values()))
                    claims = {
                        at: self._claim_entry(stack, at, view, need, at == depth)
                        for at, need in needs.items()
                    }
                    writers = {
                        at: TensorWriter(folder)
                        for at, folder in claims.items()
                        if folder is not None
                    }
                for at, writer in writers.items():
                    writer.append(
                        {
                            **{k: to_channels_last(v) for k, v in tree_to_dict(passed[at]).items()},
                            **prefix_targets(y),
                        }
                    )
            for writer in writers.values():
                writer.close()
            self._evict_until_fits(0.0)  # others may have filled theirs meanwhile

    def _evict_until_fits(self, need: float) -> None:
        if not evict_until_fits(self.folder, need, self.byte_limit):
            raise CacheFull

    def _nearest_cached_stage(self, depth: int, view: int) -> tuple[int, ReadBatch]:
        """The deepest stage before `depth` that is kept, and how its outputs are had; the source itself is stage 0."""
        for kept in range(depth - 1, 0, -1):
            held = try_open(self.entry_folder(kept, view))
            if held is not None:
                return kept, EntryReader(held, len(self), self.device)
        return 0, lambda index: self.uncached.source.take(index, view)

    def _stages_to_keep(
        self, passed: dict[int, TensorTree], depth: int, largest: float
    ) -> list[int]:
        """The stages to keep: `depth`, and of those on the way the deepest that are no larger than what they began with
        and fit a quarter of the limit together."""
        room, kept = self.byte_limit / 4, [depth]
        for at in sorted(passed.keys() - {depth}, reverse=True):
            room -= _bytes_per_example(passed[at]) * len(self) * (self.views or 1)
            if room >= 0 and _bytes_per_example(passed[at]) <= largest:
                kept.append(at)
        return kept

    def _claim_entry(
        self, stack: ExitStack, depth: int, view: int, need: float, held: bool
    ) -> Path | None:
        """A folder to fill until `stack` closes. None: it is there, or being filled. `held`: its lock is ours already."""
        place = self.entry_folder(depth, view)
        if not held and (
            not stack.enter_context(file_lock(lock_path(place), wait=False))
            or try_open(place) is not None
        ):
            return None
        return stack.enter_context(atomic_folder(place, need, "activations"))


def _bytes_per_example(x: TensorTree) -> float:
    """Bytes of one example."""
    return sum(leaf.nbytes / len(leaf) for leaf in tree_to_dict(x).values())
