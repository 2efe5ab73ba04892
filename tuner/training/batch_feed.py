"""Makes batches ahead of their use, so that a GPU does not wait for the CPU.

While the GPU computes one batch, a thread gathers the next ones in page-locked memory, copies them
and augments them on a CUDA stream of its own. The batches are the ones, in the order and to the
bit, that are made one by one where there is no such stream: what is in a batch is a function of
its rows and the view alone.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from tuner.core.device_transfers import copies_asynchronously
from tuner.core.input_spec import tree_to_dict
from tuner.core.types import Batch, ResidentSource, Source
from tuner.training.micro_batches import is_out_of_memory, release_memory

BATCHES_AHEAD = 2  # one is computed, two are made: double buffering


class SideStream(Protocol):
    """A queue of work of a device beside the one on which it trains."""

    def begin(self) -> None:
        """Later work of this stream sees all that the training has computed so far."""

    def make(self, compute: Callable[[], Batch]) -> "MadeBatch":
        """Calls `compute` in the calling thread; the device does its work on this stream."""


class MadeBatch(Protocol):
    """A batch of which the device may not have computed all."""

    def hand_over(self) -> Batch:
        """The batch. Whatever the device is asked to do after this call finds it complete."""


class CudaSideStream:
    """A stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def make(self, compute: Callable[[], Batch]) -> "CudaBatch":
        with torch.cuda.stream(self.stream):
            return CudaBatch(self.device, compute(), self.stream.record_event())


@dataclass(frozen=True)
class CudaBatch:
    """A batch of a CudaSideStream; `complete` comes after all work on it."""

    device: torch.device
    batch: Batch
    complete: torch.cuda.Event

    def hand_over(self) -> Batch:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.complete)
        for tree in self.batch:
            for tensor in tree_to_dict(tree).values():
                if tensor.is_cuda:
                    # its memory is not used again before the training has read it
                    tensor.record_stream(stream)
        return self.batch


def side_stream_for(source: Source, view: int, device: torch.device) -> SideStream | None:
    """A stream on which batches of `source` are made; None where they are made when they are used.

    That is on the CPU, which has nothing to do it with, and where the examples are in the memory of
    the device already: then a batch costs less than the change of threads.
    """
    if not copies_asynchronously(device):
        return None
    if isinstance(source, ResidentSource) and source.is_resident(view):
        return None
    return CudaSideStream(device)


@dataclass(frozen=True)
class _Part:
    """A part of a batch. `made` is None where it is made when it is used."""

    step: int
    is_first: bool  # of its step
    index: Tensor
    made: "Future[MadeBatch] | None" = None


class BatchFeed:
    """The batches of a pass over a source, some of them made ahead; a context manager.

    Args:
        source: The examples.
        view: The view of all batches.
        steps: The batches (int64 indices) of each step.
        split: Splits a batch into the parts that are taken one by one. Where it begins to split
            otherwise, the step is asked for again.
        stream: Where batches are made ahead; None: they are made when they are used.
    """

    def __init__(
        self,
        source: Source,
        view: int,
        steps: Sequence[Sequence[Tensor]],
        split: Callable[[Tensor], Sequence[Tensor]],
        stream: SideStream | None = None,
    ) -> None:
        self.source, self.view, self.steps, self.split = source, view, steps, split
        self.stream = stream
        self.thread = None if stream is None else ThreadPoolExecutor(1, "batches")
        self.is_memory_short = False
        self.queue: deque[_Part] = deque()
        self.upcoming: Iterator[_Part] = iter(())

    def __enter__(self) -> "BatchFeed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
        self.queue.clear()

    def parts(self, step: int) -> Iterator[tuple[Tensor, Batch]]:
        """The parts of the batches of a step, which counts from 0: indices and examples.

        A step may be asked for again. The first part of a pass is made by the calling thread: what
        a source does once, such as filling its cache, happens there.
        """
        if self.thread is None:
            for batch in self.steps[step]:
                for index in self.split(batch):
                    yield index, self._take(index)
            return
        if not (self.queue and self.queue[0].step == step and self.queue[0].is_first):
            self._forget_made()
            self.upcoming = self._parts_from(step)
            self.queue = deque([next(self.upcoming)])
        while self.queue and self.queue[0].step == step:
            part = self.queue.popleft()
            examples = self._receive(part)
            self._look_ahead()
            yield part.index, examples

    def _parts_from(self, first: int) -> Iterator[_Part]:
        for step in range(first, len(self.steps)):
            is_first = True
            for batch in self.steps[step]:
                for index in self.split(batch):
                    yield _Part(step, is_first, index)
                    is_first = False

    def _look_ahead(self) -> None:
        """Fills the queue, and begins to make what is new in it."""
        for part in islice(self.upcoming, BATCHES_AHEAD - len(self.queue)):
            made = None
            if self.thread is not None and self.stream is not None and not self.is_memory_short:
                made = self.thread.submit(self.stream.make, partial(self._take, part.index))
            self.queue.append(replace(part, made=made))

    def _take(self, index: Tensor) -> Batch:
        return self.source.take(index, self.view)

    def _receive(self, part: _Part) -> Batch:
        """The examples of a part. Where there is no memory for them, no more are made ahead."""
        if part.made is not None:
            try:
                return part.made.result().hand_over()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # outside of the except block: the error's traceback kept the tensors of the failed call
            self.is_memory_short = True
            self._forget_made()
            release_memory()
        batch = self._take(part.index)
        if self.stream is not None:
            self.stream.begin()
        return batch

    def _forget_made(self) -> None:
        """Throws away what was made ahead; what the thread is making is waited for."""
        for part in self.queue:
            if part.made is not None and not part.made.cancel():
                part.made.exception()
        self.queue = deque(replace(part, made=None) for part in self.queue)
