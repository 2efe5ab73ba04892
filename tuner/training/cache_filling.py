"""Fills entries of the activation cache: one pass of a source through a frozen prefix."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tuner.core.device_memory import available_bytes, available_main_memory, measure_need
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.files.atomic import atomic_folder, file_lock, lock_path, remove_leftovers
from tuner.files.cache_entries import evict_until_fits, try_open
from tuner.preprocessing.ragged_tensors import drop_padding
from tuner.preprocessing.resident_tensors import give_back_memory, has_resident_tensors
from tuner.preprocessing.tensor_files import (
    EntryReader,
    TensorWriter,
    prefix_targets,
    to_channels_last,
)
from tuner.preprocessing.tokenization import token_counts
from tuner.training.frozen_prefix import UncachedSource
from tuner.training.micro_batches import is_out_of_memory, release_memory

Result = TypeVar("Result")

FIRST_CHUNK = 8  # examples; what they need tells how many fit into the memory
MAX_CHUNK_ON_GPU = 512  # examples; larger chunks would not be computed faster
MEMORY_SHARE = 0.25  # of the memory that is free, for a chunk


class CacheFull(Exception):
    """Entries that other processes read leave too little space within the limit."""


def compute_in_chunks(
    index: Tensor,
    length: int,
    compute: Callable[[Tensor], Result],
    later_length: Callable[[Result], int] | None = None,
) -> Iterator[Result]:
    """Yields `compute(chunk)` for one chunk of `index` after the other.

    Chunks have `length` examples; those after the first have as many as `later_length` makes of
    its result. Where the memory runs out, they become half as long, and stay so. Only where one
    example is too much, even when a GPU keeps nothing else, the error is raised.
    """
    begin = 0
    while begin < len(index):
        chunk = index[begin : begin + length]
        try:
            result = compute(chunk)
            begin += len(chunk)
            if later_length is not None:
                length, later_length = later_length(result), None
            yield result
            del result  # before the next one is computed
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error) or (len(chunk) == 1 and not has_resident_tensors()):
                raise
        # outside of the except block: the error's traceback kept the tensors of the failed call
        if len(chunk) == 1:
            give_back_memory()
        length, later_length = max(1, len(chunk) // 2), None
        release_memory()


def order_by_length(lengths: Tensor | None, count: int) -> Tensor:
    """The order of filling: the longest texts first, anything else as it comes.

    A chunk is then hardly padded, and none needs more memory than the first.
    """
    return torch.arange(count) if lengths is None else lengths.argsort(descending=True, stable=True)


@dataclass(frozen=True)
class StageTensors:
    """The tensors of some examples between two stages, as they are stored, on the CPU.

    Args:
        tensors: dense ones as (examples, ...), ragged ones as (tokens of all examples, ...).
        widths: the columns that each ragged tensor had when it was padded, by its name.
    """

    tensors: dict[str, Tensor]
    widths: dict[str, int]

    def bytes_for(self, ratio_of_examples: float, ratio_of_tokens: float) -> float:
        """The bytes of the dense tensors and those of the ragged ones, each times its ratio."""
        return sum(
            tensor.nbytes * (ratio_of_tokens if name in self.widths else ratio_of_examples)
            for name, tensor in self.tensors.items()
        )


@dataclass(frozen=True)
class StageInput:
    """Some examples before the first stage that is computed.

    `counts` has the tokens of each text, int64 (n,); None where the examples have no length.
    """

    x: TensorTree
    y: TensorTree
    counts: Tensor | None


@dataclass(frozen=True)
class FillChunk:
    """Some examples that went through a prefix, between the stages that are kept.

    `device_bytes` is the most memory that they needed at once on a GPU.
    """

    stages: dict[int, StageTensors]  # after which stage
    targets: StageTensors
    example_count: int
    counts: Tensor | None  # as in StageInput
    device_bytes: int

    def length_that_fits(self, device: torch.device, max_length: int) -> int:
        """How many examples like these fit into MEMORY_SHARE of what is free.

        At most `max_length`; on a GPU, which tells what was needed, MAX_CHUNK_ON_GPU. Below that it
        is a power of two, so that it does not follow every change of the free memory.
        """
        stored_bytes = sum(part.bytes_for(1, 1) for part in (*self.stages.values(), self.targets))
        needs = [(available_main_memory(), stored_bytes)]
        if self.device_bytes:
            needs.append((available_bytes(device), self.device_bytes))
            max_length = MAX_CHUNK_ON_GPU
        fitting = min(MEMORY_SHARE * free * self.example_count / need for free, need in needs)
        if fitting >= max_length:
            return max_length
        return 1 << max(0, int(fitting).bit_length() - 1)


class PrefixPass:
    """Sends examples through the stages of a prefix, and gives their outputs as they are stored.

    `kept_stages` are the stages whose outputs are given.
    """

    def __init__(
        self, uncached: UncachedSource, view: int, begin: int = 0, reader: EntryReader | None = None
    ) -> None:
        """`reader` reads the outputs of stage `begin`; stage 0 is the source itself."""
        self.uncached, self.view, self.prefix = uncached, view, uncached.prefix
        self.begin, self.reader = begin, reader
        self.order = order_by_length(uncached.lengths, len(uncached))
        self.kept_stages = set(range(begin, len(self.prefix.stages) + 1))
        self.ragged_names = self._find_ragged()

    def take(self, index: Tensor) -> StageInput:
        """The outputs of stage `begin`."""
        if self.reader is not None:
            return StageInput(*self.reader(index), self.reader.examples.token_counts(index))
        x, y = self.uncached.take_input(index, self.view)
        if self.uncached.lengths is None or not isinstance(x, dict) or "attention_mask" not in x:
            return StageInput(x, y, None)
        return StageInput(x, y, token_counts(x["attention_mask"]).clamp(min=1).cpu())

    def outputs(self, x: TensorTree) -> Iterator[tuple[int, TensorTree]]:
        """`x`, and what each stage after `begin` makes of it, with the number of the stage."""
        yield self.begin, x
        for stage in range(self.begin + 1, len(self.prefix.stages) + 1):
            x = self.prefix.compute(x, stage - 1, stage)
            yield stage, x

    def _find_ragged(self) -> dict[int, set[str]]:
        """The names of each stage's tensors whose second dimension is the length of the text.

        The longest and the shortest text are computed alone: what differs in this dimension follows
        the length. One text would not tell, as a vector may be as wide as the text is long.
        """
        if self.uncached.lengths is None:
            return {stage: set() for stage in self.kept_stages}
        longest, shortest = self.take(self.order[:1]), self.take(self.order[-1:])
        return {
            stage: {
                name
                for name, tensor in tree_to_dict(long).items()
                if tensor.dim() > 1 and tensor.shape[1] != tree_to_dict(short)[name].shape[1]
            }
            for (stage, long), (_, short) in zip(
                self.outputs(longest.x), self.outputs(shortest.x), strict=True
            )
        }

    def compute(self, index: Tensor) -> FillChunk:
        """Sends the examples at `index` through the stages, and measures what that needs."""
        chunk, device_bytes = measure_need(lambda: self._compute(index), self.prefix.device)
        return replace(chunk, device_bytes=device_bytes)

    def _compute(self, index: Tensor) -> FillChunk:
        inputs = self.take(index)
        stages = {
            stage: self.to_stored(stage, x, inputs.counts)
            for stage, x in self.outputs(inputs.x)
            if stage in self.kept_stages
        }
        targets = StageTensors(prefix_targets(inputs.y), {})
        return FillChunk(stages, targets, len(index), inputs.counts, device_bytes=0)

    def to_stored(self, stage: int, x: TensorTree, counts: Tensor | None) -> StageTensors:
        """The outputs of a stage as they are stored."""
        tensors: dict[str, Tensor] = {}
        widths: dict[str, int] = {}
        for name, value in tree_to_dict(x).items():
            if counts is not None and name in self.ragged_names[stage]:
                widths[name] = value.shape[1]
                tensors[name] = drop_padding(value, counts).cpu()
            else:
                tensors[name] = to_channels_last(value).cpu()
        return StageTensors(tensors, widths)


class CacheFill:
    """One pass over a source that fills the entry of a view, and entries of shallower stages that
    are small.

    The pass begins at the deepest shallower stage that is in the cache. The first chunk is small
    and shows how large each stage's outputs are and how much memory computing them needs. From it
    follow the plan (which stages are kept, and how many bytes each needs) and the length of the
    later chunks. Then the entries are opened, and each chunk is computed and written.

    Args:
        uncached: what is computed.
        view: the view of the source.
        entry_folder: gives the folder of an entry by its stage and view.
        byte_limit: of all entries together.
    """

    def __init__(
        self,
        uncached: UncachedSource,
        view: int,
        entry_folder: Callable[[int, int], Path],
        byte_limit: float,
    ) -> None:
        self.uncached, self.view = uncached, view
        self.entry_folder, self.byte_limit = entry_folder, byte_limit
        self.depth = len(uncached.prefix.stages)
        self.folder = entry_folder(self.depth, view).parent

    def run(self) -> None:
        """Fills the entries; the caller has the lock of the deepest.

        Raises CacheFull, StorageError.
        """
        remove_leftovers(self.folder)
        prefix_pass = self._begin_pass()
        prefix = self.uncached.prefix
        chunks = compute_in_chunks(
            prefix_pass.order,
            min(FIRST_CHUNK, prefix.max_batch),
            prefix_pass.compute,
            lambda chunk: chunk.length_that_fits(prefix.device, prefix.max_batch),
        )
        chunk = next(chunks)
        bytes_needed = self._plan(chunk, prefix_pass.begin)
        self._evict_until_fits(sum(bytes_needed.values()))
        with ExitStack() as stack:
            writers = self._open_writers(stack, bytes_needed)
            prefix_pass.kept_stages = set(writers)
            self._write(writers, chunk)
            del chunk  # it has the outputs of every stage; memory is sized for one such chunk
            for chunk in chunks:
                self._write(writers, chunk)
                del chunk  # before the next one is computed
            for writer in writers.values():
                writer.close(None if self.uncached.lengths is None else prefix_pass.order)
            self._evict_until_fits(0.0)  # other processes may have filled entries meanwhile

    def _begin_pass(self) -> PrefixPass:
        """A pass that begins at the deepest shallower stage that is cached, or at the source."""
        for stage in range(self.depth - 1, 0, -1):
            pinned_entry = try_open(self.entry_folder(stage, self.view))
            if pinned_entry is not None:
                reader = EntryReader(pinned_entry, len(self.uncached), self.uncached.prefix.device)
                return PrefixPass(self.uncached, self.view, stage, reader)
        return PrefixPass(self.uncached, self.view)

    def _plan(self, chunk: FillChunk, begin: int) -> dict[int, float]:
        """The stages to keep, deepest first, and the bytes that each needs for this view.

        The deepest is always kept. Of the others those are kept, deepest first, that are no larger
        than what the pass began with and that together fit a quarter of the limit with all views.
        """
        examples = len(self.uncached) / chunk.example_count
        tokens = examples
        if chunk.counts is not None and self.uncached.lengths is not None:
            tokens = float(self.uncached.lengths.sum()) / float(chunk.counts.sum())
        sizes = {
            stage: tensors.bytes_for(examples, tokens) for stage, tensors in chunk.stages.items()
        }
        largest_size = sizes.pop(begin)
        free_bytes = self.byte_limit / 4
        stages = [self.depth]
        for stage in sorted(sizes.keys() - {self.depth}, reverse=True):
            free_bytes -= sizes[stage] * (self.uncached.views or 1)
            if free_bytes >= 0 and sizes[stage] <= largest_size:
                stages.append(stage)
        target_size = chunk.targets.bytes_for(examples, tokens)
        return {stage: sizes[stage] + target_size for stage in stages}

    def _open_writers(
        self, stack: ExitStack, bytes_needed: dict[int, float]
    ) -> dict[int, TensorWriter]:
        """A writer for each planned entry, until `stack` closes.

        A shallower entry has none where it is there already, or where another process fills it.
        """
        writers = {}
        for stage, byte_count in bytes_needed.items():
            entry_folder = self.entry_folder(stage, self.view)
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
            stored = chunk.stages[stage]
            counts = chunk.counts if stored.widths else None
            writer.append({**stored.tensors, **chunk.targets.tensors}, stored.widths, counts)

    def _evict_until_fits(self, byte_count: float) -> None:
        if not evict_until_fits(self.folder, byte_count, self.byte_limit):
            raise CacheFull
