"""The activation cache: what a frozen prefix computes for an example is always the same, so it is
computed once.

`CachedSource` reads activations from memory-mapped files and fills them at the first use of a view;
`UncachedSource` is its plain version and computes at each take. `source_behind` chooses.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Container, Sequence
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
DISK_BYTES_PER_SECOND = 2e8  # of reading what does not fit into the memory


@dataclass(frozen=True)
class CacheLimits:
    """Where activations are cached and how much of them.

    `mode` is auto (what fits and is faster to read than to compute), always (whatever the size)
    or never.
    """

    home: Path
    gigabytes: float = 4.0
    mode: str = "auto"


@dataclass(frozen=True)
class FrozenPrefix:
    """Frozen stages as one device computes them.

    `stage_digests` has a digest for each stage: equal digests, equal outputs for equal inputs.
    """

    stages: Sequence[nn.Module]
    stage_digests: Sequence[str]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext  # e.g. of bfloat16

    def compute(self, x: TensorTree, begin: int = 0, end: int | None = None) -> TensorTree:
        """Sends `x`, an output of stage `begin`, through the stages after it up to `end` or the
        last.

        Stages count from 1; the output of stage 0 is the input of the model.
        """
        with torch.no_grad(), self.autocast():
            for stage in self.stages[begin:end]:
                x = stage(x)
        return x


def stage_digests(stages: Sequence[nn.Module], start: str) -> tuple[str, ...]:
    """A digest for each stage's output, which depends on `start` and on every stage up to it."""
    digests = [start]
    for stage in stages:
        content = f"{digests[-1]} {module_digest(stage)}"
        digests.append(hashlib.sha256(content.encode()).hexdigest()[:32])
    return tuple(digests[1:])


def source_behind(prefix: FrozenPrefix, source: Source, limits: CacheLimits) -> Source:
    """The outputs of `prefix` for `source`: cached where they fit the limits and it pays, else
    computed at each take.

    Raises StorageError when the cache's folder cannot be written.
    """
    if not prefix.stages:
        return source
    uncached = UncachedSource(prefix, source)
    if limits.mode == "never" or source.views is None:
        return uncached
    folder = limits.home / "activations"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if limits.mode == "always":
        return CachedSource(uncached, folder, math.inf)
    byte_limit = limits.gigabytes * 1e9
    cost = measure_costs(uncached, folder)
    bytes_needed = cost["bytes"] * len(source) * source.views
    if bytes_needed > min(byte_limit, 0.8 * shutil.disk_usage(folder).free):
        return uncached
    is_read_from_disk = bytes_needed > 0.5 * _available_memory()
    disk_seconds = cost["bytes"] / DISK_BYTES_PER_SECOND if is_read_from_disk else 0.0
    if cost["reading"] + disk_seconds > cost["computing"]:
        return uncached
    return CachedSource(uncached, folder, byte_limit)


def measure_costs(uncached: "UncachedSource", folder: Path) -> dict[str, float]:
    """What one example costs through a prefix.

    It is measured once on a batch and written to `folder`, because trials that are repeated must
    make the same choice between reading and computing.

    Returns:
        `computing` and `reading`: seconds to compute it, and to read it from memory. `bytes`: the
        size of its activations.
    """
    prefix = uncached.prefix
    first_example = tree_to_dict(uncached.source.take(torch.tensor([0]), 0).x)
    shapes = [tuple(tensor.shape) for tensor in first_example.values()]
    name = hashlib.sha256(f"{prefix.stage_digests[-1]} {shapes}".encode()).hexdigest()[:32]
    path = folder / f"{name}.cost.json"
    try:
        known = json.loads(path.read_text())
        return {key: float(known[key]) for key in ("computing", "reading", "bytes")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    index = torch.arange(min(TIMED_EXAMPLES, len(uncached)))
    x = uncached.source.take(index, 0).x
    computing, outputs = _time_call(lambda: prefix.compute(x), prefix.device)
    tensors = [to_channels_last(tensor).contiguous() for tensor in tree_to_dict(outputs).values()]
    reading, _ = _time_call(
        lambda: [tensor[torch.randperm(len(tensor)).to(tensor.device)] for tensor in tensors],
        prefix.device,
    )
    byte_count = sum(tensor.nbytes for tensor in tensors)
    totals = {"computing": computing, "reading": reading, "bytes": float(byte_count)}
    costs = {key: value / len(index) for key, value in totals.items()}
    with disk_errors(path), atomic_path(path, crash_prefix="note") as temporary:
        temporary.write_text(json.dumps(costs))
    return costs


def _time_call(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The seconds of the shortest of three calls, and the result of the last."""
    shortest, result = math.inf, None
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest, result


def _available_memory() -> float:
    """Bytes that new files can fill before some of them must be read from the disk again."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return math.inf


class UncachedSource:
    """The outputs of a prefix for a source, computed at each take: the plain version of
    CachedSource.
    """

    def __init__(self, prefix: FrozenPrefix, source: Source) -> None:
        self.prefix, self.source = prefix, source
        self.views, self.digest, self.lengths = source.views, source.digest, source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.source.take(index, view)
        return Batch(self.prefix.compute(x), y)


class CacheFull(Exception):
    """Entries that other processes read leave too little space within the limit."""


class CachedSource:
    """The outputs of a prefix for a source, computed once per view and kept for every later trial
    and worker.

    The files are in `folder`. Where entries that other processes read leave too little space for a
    view, its outputs are computed at each take.
    """

    def __init__(self, uncached: UncachedSource, folder: Path, byte_limit: float) -> None:
        self.uncached, self.folder, self.byte_limit = uncached, folder, byte_limit
        self.device = uncached.prefix.device
        self.views, self.digest, self.lengths = uncached.views, uncached.digest, uncached.lengths
        self.readers: dict[int, ReadBatch] = {}

    def __len__(self) -> int:
        return len(self.uncached)

    def take(self, index: Tensor, view: int) -> Batch:
        view %= self.views or 1
        if view not in self.readers:
            self.readers[view] = self._open_entry(view)
        return self.readers[view](index)

    def entry_folder(self, depth: int, view: int) -> Path:
        """The folder for the outputs of stage `depth`, which counts from 1."""
        name = f"2 {self.uncached.prefix.stage_digests[depth - 1]} {self.uncached.source.digest}"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}-{view}"

    def _open_entry(self, view: int) -> ReadBatch:
        """A function that reads batches of a view.

        The entry is filled first where it is not there.
        """
        entry_folder = self.entry_folder(len(self.uncached.prefix.stages), view)
        try:
            pinned_entry = open_or_create(entry_folder, CacheFill(self, view).run)
        except CacheFull:
            return lambda index: self.uncached.take(index, view)
        return EntryReader(pinned_entry, len(self), self.device, into_memory=True)


@dataclass(frozen=True)
class FillChunk:
    """Some examples on their way through a prefix: what goes into its first computed stage, and the
    outputs of its stages.
    """

    x: TensorTree
    outputs: dict[int, TensorTree]  # by stage, from 1
    y: TensorTree


class CacheFill:
    """One pass over a source that fills the entry of a view, and entries of shallower stages that
    are small.

    The pass begins at the deepest shallower stage that is in the cache. The first chunk shows how
    large each stage's outputs are. From it follows the plan: which stages are kept, and how many
    bytes each needs. Then the entries are opened, and each chunk is computed and written.
    """

    def __init__(self, cached: CachedSource, view: int) -> None:
        self.cached, self.view = cached, view
        self.prefix, self.example_count = cached.uncached.prefix, len(cached)
        self.depth = len(self.prefix.stages)

    def run(self) -> None:
        """Fills the entries; the caller has the lock of the deepest.

        Raises CacheFull, StorageError.
        """
        remove_leftovers(self.cached.folder)
        begin, take = self._nearest_cached_stage()
        first, *later = torch.split(torch.arange(self.example_count), FILL_CHUNK)
        chunk = self._compute(begin, take(first), range(begin + 1, self.depth + 1))
        bytes_needed = self._plan(chunk)
        self._evict_until_fits(sum(bytes_needed.values()))
        with ExitStack() as stack:
            writers = self._open_writers(stack, bytes_needed)
            self._write(writers, chunk)
            del chunk  # it has the outputs of every stage; memory is sized for one such chunk
            for index in later:
                self._write(writers, self._compute(begin, take(index), writers))
            for writer in writers.values():
                writer.close()
            self._evict_until_fits(0.0)  # other processes may have filled entries meanwhile

    def _nearest_cached_stage(self) -> tuple[int, ReadBatch]:
        """The deepest shallower stage that is cached, and what reads it; stage 0 is the source
        itself.
        """
        for stage in range(self.depth - 1, 0, -1):
            pinned_entry = try_open(self.cached.entry_folder(stage, self.view))
            if pinned_entry is not None:
                return stage, EntryReader(pinned_entry, self.example_count, self.cached.device)
        return 0, lambda index: self.cached.uncached.source.take(index, self.view)

    def _compute(self, begin: int, batch: Batch, kept: Container[int]) -> FillChunk:
        """Sends a batch, outputs of stage `begin`, through all stages after it; keeps the outputs
        of some.
        """
        x, outputs = batch.x, dict[int, TensorTree]()
        for stage in range(begin + 1, self.depth + 1):
            x = self.prefix.compute(x, stage - 1, stage)
            if stage in kept:
                outputs[stage] = x
        return FillChunk(batch.x, outputs, batch.y)

    def _plan(self, chunk: FillChunk) -> dict[int, float]:
        """The stages to keep, deepest first, and the bytes that each needs for this view.

        The deepest is always kept. Of the others those are kept, deepest first, that are no larger
        than what the pass began with and that together fit a quarter of the limit with all views.
        """
        sizes = {stage: _bytes_per_example(x) for stage, x in chunk.outputs.items()}
        largest_size = _bytes_per_example(chunk.x)
        free_bytes = self.cached.byte_limit / 4
        stages = [self.depth]
        for stage in sorted(sizes.keys() - {self.depth}, reverse=True):
            free_bytes -= sizes[stage] * self.example_count * (self.cached.views or 1)
            if free_bytes >= 0 and sizes[stage] <= largest_size:
                stages.append(stage)
        target_size = _bytes_per_example(chunk.y)
        return {stage: self.example_count * (sizes[stage] + target_size) for stage in stages}

    def _open_writers(
        self, stack: ExitStack, bytes_needed: dict[int, float]
    ) -> dict[int, TensorWriter]:
        """A writer for each planned entry, until `stack` closes.

        A shallower entry has none where it is there already, or where another process fills it.
        """
        writers = {}
        for stage, byte_count in bytes_needed.items():
            entry_folder = self.cached.entry_folder(stage, self.view)
            if stage != self.depth:  # the caller has the lock of the deepest
                is_locked = stack.enter_context(file_lock(lock_path(entry_folder), wait=False))
                if not is_locked or try_open(entry_folder) is not None:
                    continue
            writers[stage] = TensorWriter(
                stack.enter_context(atomic_folder(entry_folder, byte_count, "activations"))
            )
        return writers

    def _write(self, writers: dict[int, TensorWriter], chunk: FillChunk) -> None:
        for stage, writer in writers.items():
            tensors = tree_to_dict(chunk.outputs[stage])
            inputs = {name: to_channels_last(tensor) for name, tensor in tensors.items()}
            writer.append({**inputs, **prefix_targets(chunk.y)})

    def _evict_until_fits(self, byte_count: float) -> None:
        if not evict_until_fits(self.cached.folder, byte_count, self.cached.byte_limit):
            raise CacheFull


def _bytes_per_example(x: TensorTree) -> float:
    """Bytes of one example."""
    return sum(tensor.nbytes / len(tensor) for tensor in tree_to_dict(x).values())
