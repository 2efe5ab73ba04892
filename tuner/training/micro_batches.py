"""Micro-batches: a batch that does not fit into the memory is computed in parts, and their
gradients are added up.
"""

import gc
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuner.config.run import Run
from tuner.core.types import Dataset
from tuner.errors import DataError
from tuner.preprocessing.resident_tensors import give_back_memory, has_resident_tensors

Result = TypeVar("Result")

OUT_OF_MEMORY = re.compile(
    "can't allocate memory"  # the CPU's allocator
    "|(CUDA|HIP|XPU) error: out of memory"  # a runtime's own allocation, as AcceleratorError
    "|MPS backend out of memory"
    # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, …
    "|CU[A-Z]+_STATUS_[A-Z_]*ALLOC(ATION)?_FAILED"
)


@dataclass
class MicroBatchSize:
    """How many examples fit into the memory at once.

    `value` is halved whenever the memory runs out, but never below `minimum`. `notes` has a line
    for the user for each halving.
    """

    value: int
    minimum: int = 1
    notes: list[str] = field(default_factory=list)

    def split_batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """Splits `index` into parts of similar length: at most `value` long, but at least
        `minimum`.
        """
        count = min(math.ceil(len(index) / self.value), max(1, len(index) // self.minimum))
        return torch.tensor_split(index, count)


def initial_micro_batch_size(
    net: nn.Module, batch_size: int, micro_batches: int = 1
) -> MicroBatchSize:
    """The size of a whole batch, or of one of its `micro_batches`.

    BatchNorm cannot train on one example.
    """
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in net.modules())
    minimum = 2 if has_batch_norm else 1
    if micro_batches == 1:
        return MicroBatchSize(batch_size + 1, minimum)  # the last batch may have one more
    size = max(minimum, math.ceil(batch_size / micro_batches))
    note = "earlier attempts were killed as by a memory limit; batches are taken in parts of"
    return MicroBatchSize(size, minimum, [f"{note} {size}, their gradients added up"])


def retry_on_oom(
    compute: Callable[[], Result], micro_batch_size: MicroBatchSize, example_count: int
) -> Result:
    """Calls `compute`, and calls it again with half the micro-batch size each time that the memory
    runs out.

    Before the size is halved, copies of pixels and activations that a GPU keeps are given back.

    A failed call may have changed BatchNorm's running statistics and the random states; they are
    not reset. The error of the last call is raised.

    Args:
        compute: Reads `micro_batch_size`.
        micro_batch_size: Is halved after each failed call.
        example_count: The number of examples in the batch.
    """
    while True:
        try:
            return compute()
        except RuntimeError as error:
            is_smallest = min(micro_batch_size.value, example_count) <= micro_batch_size.minimum
            if not is_out_of_memory(error) or (is_smallest and not has_resident_tensors()):
                raise
        # outside of the except block: the error's traceback kept the tensors of the failed call
        if give_back_memory():
            micro_batch_size.notes.append(
                "out of memory; images and activations that the GPU kept are read from files again"
            )
            release_memory()
            continue
        failed_size = min(micro_batch_size.value, example_count)
        micro_batch_size.value = max(micro_batch_size.minimum, failed_size // 2)
        micro_batch_size.notes.append(
            f"out of memory with {failed_size} examples at once; batches go on in parts of "
            f"{micro_batch_size.value}, their gradients added up"
        )
        release_memory()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the memory of the GPU or of the CPU ran out.

    Only PyTorch's own allocators raise OutOfMemoryError. Whatever else asks for memory (CUDA's
    runtime, cuBLAS, cuDNN, MPS) raises a RuntimeError that says so. None of these errors stays: by
    CUDA's documentation cudaErrorMemoryAllocation leaves the process as it was, unlike an illegal
    access or a failed assertion, after which each call fails until the process ends.
    """
    return isinstance(error, torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def release_memory() -> None:
    """Frees tensors that nothing uses any more, on the GPU too."""
    gc.collect()
    release_reserved_memory()


def release_reserved_memory() -> None:
    """Gives back to the GPU what torch has reserved and no tensor uses, so that whoever shares the
    GPU has it too.
    """
    torch.cuda.empty_cache()  # does nothing where no GPU was used
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def check_batch_size(dataset: Dataset, run: Run) -> list[str]:
    """Warnings about a batch size that the data cannot fill.

    Raises:
        DataError: There are fewer than 2 training examples.
    """
    count = len(dataset.train)
    if count < 2:
        raise DataError(f"data: {count} training examples; at least 2 are needed")
    recipe = run.recipe
    if recipe.batch_size <= count <= recipe.batch_size * (recipe.accumulate - 1):
        return [
            f"recipe.accumulate: {recipe.accumulate} batches of {recipe.batch_size}, but there are "
            f"{count} training examples; each epoch is one step"
        ]
    if recipe.batch_size > count:
        return [
            f"recipe.batch_size: {recipe.batch_size}, but there are {count} training examples; "
            f"each epoch is one batch of {count}"
        ]
    return []
