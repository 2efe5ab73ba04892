"""Stores tensors in a cache entry: one folder per entry, one memory-mapped file per tensor.

A tensor is dense, (examples, ...), or ragged, (tokens of all examples, ...): a text then takes the
bytes of its own tokens, whatever the longest text has.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.core.device_transfers import gather_rows
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.types import Batch
from tuner.files.cache_entries import PinnedEntry, write_checksums
from tuner.preprocessing.ragged_tensors import find_tokens, make_offsets, restore_padding
from tuner.preprocessing.resident_tensors import ResidentTensors

ReadBatch = Callable[[Tensor], Batch]
META_FILE = "meta.json"  # the tensors of an entry, in the order of its files 0.bin, 1.bin, …
ORDER = "entry.order"  # int64 (n,): the place of each example among the stored ones
OFFSETS = "entry.offsets"  # int64 (n + 1,): where the tokens of each stored example begin
TARGET_PREFIX = "y."  # the names of the tensors of a batch's y begin with it


# Activations of images are stored channels-last, as they are computed and as the suffix needs them.


def to_channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def to_channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


class TensorFile:
    """One tensor that is written chunk by chunk. Its chunks differ in nothing but their rows."""

    def __init__(self, path: Path, name: str, first: Tensor) -> None:
        self.path, self.name = path, name
        self.shape, self.dtype = list(first.shape[1:]), str(first.dtype).removeprefix("torch.")
        self.rows = 0
        self.width: int | None = None  # the most columns of a batch, where the tensor is ragged
        self.digest = hashlib.sha256()

    def append(self, value: Tensor, width: int | None) -> None:
        """Writes a chunk. Raises ValueError where it has another shape."""
        if list(value.shape[1:]) != self.shape:
            raise ValueError(
                f"tensor {self.name!r} has the shape {self.shape} for some examples and "
                f"{list(value.shape[1:])} for others; only the length of a text may differ"
            )
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        with open(self.path, "ab") as file:
            file.write(data)
        self.digest.update(data)
        self.rows += len(value)
        if width is not None:
            self.width = max(width, self.width or 0)

    def describe(self) -> dict[str, Any]:
        """The tensor's line in META_FILE."""
        ragged = {} if self.width is None else {"width": self.width}
        facts = {"name": self.name, "shape": self.shape, "dtype": self.dtype, "rows": self.rows}
        return {**facts, **ragged}


class TensorWriter:
    """Writes the tensors of one entry, chunk by chunk. The entry is complete after `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, TensorFile] = {}
        self.counts: list[Tensor] = []

    def append(
        self,
        chunk: Mapping[str, Tensor],
        widths: Mapping[str, int] | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Writes the tensors of some examples.

        Args:
            chunk: dense tensors (examples, ...) and ragged ones (tokens of all examples, ...).
            widths: the columns that each ragged tensor had when it was padded, by its name.
            counts: int64 (examples,), the tokens of each; None where nothing is ragged.

        Raises:
            ValueError: a tensor has another shape than in the chunk before.
        """
        for name, value in chunk.items():
            self._file(name, value).append(value, widths.get(name) if widths else None)
        if counts is not None:
            self.counts.append(counts)

    def close(self, order: Tensor | None = None) -> None:
        """Completes the entry; `order` has the indices of the examples as they were appended."""
        if order is not None:
            self._file(ORDER, order).append(order.argsort(), None)
        if self.counts:
            offsets = make_offsets(self.counts)
            self._file(OFFSETS, offsets).append(offsets, None)
        files = self.files.values()
        (self.folder / META_FILE).write_text(json.dumps([file.describe() for file in files]))
        write_checksums(self.folder, {file.path.name: file.digest.hexdigest() for file in files})

    def _file(self, name: str, first: Tensor) -> TensorFile:
        if name not in self.files:
            path = self.folder / f"{len(self.files)}.bin"
            self.files[name] = TensorFile(path, name, first)
        return self.files[name]


def map_tensors(entry: PinnedEntry, length: int) -> dict[str, Tensor]:
    """The tensors of an entry, each mapped from its file.

    Args:
        entry: the entry. Keep it as long as the tensors are used, so that it is not evicted.
        length: the number of examples; of use for an older entry, which does not state its rows.
    """
    return {
        meta["name"]: _map_tensor(entry.folder / f"{i}.bin", meta, length)
        for i, meta in enumerate(_read_meta(entry))
    }


def _map_tensor(path: Path, meta: dict[str, Any], length: int) -> Tensor:
    shape = (meta.get("rows", length), *meta["shape"])
    dtype = getattr(torch, meta["dtype"])
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def _read_meta(entry: PinnedEntry) -> list[dict[str, Any]]:
    metas: list[dict[str, Any]] = json.loads((entry.folder / META_FILE).read_text())
    return metas


def prefix_targets(y: TensorTree) -> dict[str, Tensor]:
    return {f"{TARGET_PREFIX}{name}": tensor for name, tensor in tree_to_dict(y).items()}


def _dict_to_tree(tensors: dict[str, Tensor]) -> TensorTree:
    """The inverse of `tree_to_dict`."""
    return tensors[""] if set(tensors) == {""} else tensors


@dataclass(frozen=True)
class StoredExamples:
    """Examples in the form in which an entry has them.

    Args:
        tensors: dense ones as (examples, ...), ragged ones as (tokens of all examples, ...).
        widths: the most columns that a batch of a ragged tensor may have, by its name.
        order: int64 (n,), the place of each example; None: they are in their order.
        offsets: int64 (n + 1,), where the tokens at each place begin; None: nothing is ragged.
    """

    tensors: Mapping[str, Tensor]
    widths: Mapping[str, int] = field(default_factory=dict)
    order: Tensor | None = None
    offsets: Tensor | None = None

    def token_counts(self, index: Tensor) -> Tensor | None:
        """The number of tokens of each example, int64 (n,); None where nothing is ragged."""
        if self.offsets is None:
            return None
        places = self._find_places(index)
        return self.offsets[places + 1] - self.offsets[places]

    def take(
        self, index: Tensor, device: torch.device, tensors: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """The examples at `index` (int64, (n,)) on `device`.

        `tensors`: the same tensors elsewhere, such as in the memory of a GPU.
        Texts are padded with zeros, to the longest of the batch.
        """
        places = self._find_places(index)
        tokens = None
        if self.offsets is not None:
            tokens = find_tokens(self.offsets, places, max(self.widths.values()))
        x: dict[str, Tensor] = {}
        y: dict[str, Tensor] = {}
        for name, value in (self.tensors if tensors is None else tensors).items():
            if tokens is not None and name in self.widths:
                x[name] = restore_padding(value, tokens, device)
                continue
            batch = gather_rows(value, places, device)
            if name.startswith(TARGET_PREFIX):
                y[name.removeprefix(TARGET_PREFIX)] = batch
            else:
                x[name] = to_channels_first(batch)
        return Batch(_dict_to_tree(x), _dict_to_tree(y))

    def _find_places(self, index: Tensor) -> Tensor:
        return index if self.order is None else self.order[index]


class EntryReader:
    """Reads batches from an entry, onto `device`. It pins the entry as long as it lives."""

    def __init__(
        self, entry: PinnedEntry, length: int, device: torch.device, *, into_memory: bool = False
    ) -> None:
        """`into_memory`: keep the whole entry in the memory of the GPU, if it fits."""
        self.entry, self.device = entry, device
        tensors = map_tensors(entry, length)
        order, offsets = tensors.pop(ORDER, None), tensors.pop(OFFSETS, None)
        widths = {meta["name"]: meta["width"] for meta in _read_meta(entry) if "width" in meta}
        self.resident = ResidentTensors(tensors, device) if into_memory else None
        self.examples = StoredExamples(tensors, widths, order, offsets)

    def __call__(self, index: Tensor) -> Batch:
        tensors = None if self.resident is None else self.resident.tensors
        return self.examples.take(index, self.device, tensors)

    def is_resident(self) -> bool:
        """Whether the entry is in the memory of the GPU."""
        return self.resident is not None and self.resident.is_resident()
