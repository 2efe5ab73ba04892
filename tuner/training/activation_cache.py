"""The activation cache: what a frozen prefix computes for an example is always the same, so it is
computed once.

`CachedSource` reads activations from memory-mapped files and fills them at the first use of a view;
`UncachedSource` is its plain version and computes at each take. `source_behind` chooses.
"""

import hashlib
import math
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuner.core.device_memory import available_main_memory
from tuner.core.subset import Subset
from tuner.core.types import Batch, Source
from tuner.files.atomic import disk_errors
from tuner.files.cache_entries import PinnedEntry, open_or_create
from tuner.files.removal import SUMS
from tuner.preprocessing.tensor_files import EntryReader, ReadBatch
from tuner.training.cache_costs import measure_costs
from tuner.training.cache_filling import CacheFill, CacheFull
from tuner.training.frozen_prefix import FrozenPrefix, UncachedSource

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
    byte_limit = math.inf if limits.mode == "always" else limits.gigabytes * 1e9
    choices = [CachedSource(uncached, folder, byte_limit)]
    if isinstance(source, Subset):
        whole = UncachedSource(prefix, source.whole)
        choices.insert(0, CachedSource(whole, folder, byte_limit, source))
    if limits.mode == "always":
        return choices[0]
    return next((choice for choice in choices if is_worthwhile(choice)), uncached)


def is_worthwhile(cached: "CachedSource") -> bool:
    """Whether activations fit the limit and the disk, and are faster to read than to compute."""
    cost = measure_costs(cached.uncached, cached.folder)
    bytes_needed = cost["bytes"] * len(cached.uncached) * (cached.views or 1)
    if bytes_needed > min(cached.byte_limit, 0.8 * shutil.disk_usage(cached.folder).free):
        return False
    is_read_from_disk = bytes_needed > 0.5 * available_main_memory()
    disk_seconds = cost["bytes"] / DISK_BYTES_PER_SECOND if is_read_from_disk else 0.0
    return cost["reading"] + disk_seconds <= cost["computing"]


class CachedSource:
    """The outputs of a prefix for a source, computed once per view and kept for every later trial
    and worker.

    The files are in `folder`. Where entries that other processes read leave too little space for a
    view, its outputs are computed at each take.
    """

    def __init__(
        self,
        uncached: UncachedSource,
        folder: Path,
        byte_limit: float,
        subset: Subset | None = None,
    ) -> None:
        """`subset`: which examples of `uncached` these are; None: all. All of them are kept."""
        self.uncached, self.folder, self.byte_limit = uncached, folder, byte_limit
        self.device = uncached.prefix.device
        examples = uncached if subset is None else subset
        self.views, self.digest, self.lengths = examples.views, examples.digest, examples.lengths
        self.rows = None if subset is None else subset.rows
        self.readers: dict[int, ReadBatch] = {}

    def __len__(self) -> int:
        return len(self.uncached) if self.rows is None else len(self.rows)

    def take(self, index: Tensor, view: int) -> Batch:
        return self._reader_of(view)(index if self.rows is None else self.rows[index])

    def is_resident(self, view: int) -> bool:
        reader = self._reader_of(view)
        return isinstance(reader, EntryReader) and reader.is_resident()

    def _reader_of(self, view: int) -> ReadBatch:
        view %= self.views or 1
        if view not in self.readers:
            self.readers[view] = self._open_entry(view)
        return self.readers[view]

    def entry_folder(self, depth: int, view: int) -> Path:
        """The folder for the outputs of stage `depth`, which counts from 1."""
        name = f"3 {self.uncached.prefix.stage_digests[depth - 1]} {self.uncached.source.digest}"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}-{view}"

    def _open_entry(self, view: int) -> ReadBatch:
        """A function that reads batches of a view.

        The entry is filled first where it is not there.
        """
        entry_folder = self.entry_folder(len(self.uncached.prefix.stages), view)
        try:
            fill = CacheFill(self.uncached, view, self.entry_folder, self.byte_limit)
            pinned_entry = open_or_create(entry_folder, fill.run)
        except CacheFull:
            return lambda index: self.uncached.take(index, view)
        return shared_reader(pinned_entry, len(self.uncached), self.device)


_readers: weakref.WeakValueDictionary[tuple[Path, int, torch.device], EntryReader] = (
    weakref.WeakValueDictionary()
)


def shared_reader(entry: PinnedEntry, length: int, device: torch.device) -> EntryReader:
    """The reader of an entry that this process has on a device already, or a new one.

    Training and validation examples, and those of all folds, are in one entry. It must not be in
    the memory of the GPU once for each of them.
    """
    key = entry.folder, (entry.folder / SUMS).stat().st_ino, device
    reader = _readers.get(key)
    if reader is None:
        reader = _readers[key] = EntryReader(entry, length, device, into_memory=True)
    return reader
