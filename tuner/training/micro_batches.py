"""A batch that the memory does not hold at once is computed in parts, their gradients added up."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass
class MicroBatchSize:
    """How many examples the memory holds at once: `size`, halved whenever it runs out, never below `least`.

    `notes` says of each halving, until someone takes it.
    """

    value: int
    minimum: int = 1
    notes: list[str] = field(default_factory=list)

    def split_batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """`index` in parts of like length, of at most `size`, but of at least `least`."""
        count = min(math.ceil(len(index) / self.value), max(1, len(index) // self.minimum))
        return torch.tensor_split(index, count)


def initial_micro_batch_size(
    net: nn.Module, batch_size: int, micro_batches: int = 1
) -> MicroBatchSize:
    """Room for whole batches, or for one of `micro_batches`; BatchNorm cannot train on one example."""
    normed = any(isinstance(module, _BatchNorm) for module in net.modules())
    least = 2 if normed else 1
    if micro_batches == 1:
        return MicroBatchSize(batch_size + 1, least)  # the last batch may have one more
    size = max(least, math.ceil(batch_size / micro_batches))
    note = "earlier attempts were killed as by a memory limit; batches are taken in parts of"
    return MicroBatchSize(size, least, [f"{note} {size}, their gradients added up"])


def retry_on_oom(
    compute: Callable[[], Tensor], micro_batch_size: MicroBatchSize, example_count: int
) -> Tensor:
    """What `work` gives, called again with half the room each time that the memory does not hold it; `count` is the examples it wants.

    What a failed attempt has left in BatchNorm's running statistics and drawn of the random numbers stays so. Raises what `work` raises
    at the last.
    """
    while True:
        try:
            return compute()
        except RuntimeError as error:
            if (
                not is_out_of_memory(error)
                or min(micro_batch_size.value, example_count) <= micro_batch_size.minimum
            ):
                raise
        # out here, since the traceback, gone now, held what the failed attempt had computed
        before, micro_batch_size.value = (
            min(micro_batch_size.value, example_count),
            max(micro_batch_size.minimum, min(micro_batch_size.value, example_count) // 2),
        )
        micro_batch_size.notes.append(
            f"out of memory with {before} examples at once; batches go on in parts of {micro_batch_size.value}, their gradients added up"
        )
        release_memory()


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
