"""The largest batch that fits into the memory of a GPU, for `tuner plan`."""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from tuner.core.device_memory import forget_peak, peak_bytes
from tuner.preprocessing.resident_tensors import resident_bytes
from tuner.training.gpu_use import CONTEXT_BYTES
from tuner.training.preparation import LoadedRun, few_examples
from tuner.training.training_loop import fit

SHARE = 0.9  # of the memory: what is free is in pieces


def largest_batch(loaded: LoadedRun, depth: int, workers: int) -> int | None:
    """Return the largest batch of a training at a freeze depth; None: not on a GPU, or not even
    one example fits.

    Args:
        loaded: The run.
        depth: The freeze depth.
        workers: How many workers share the GPU.
    """
    device = loaded.device_context.device
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    capacity = int(SHARE * total / workers)
    return find_largest(
        lambda size: trains_within(loaded, depth, size, capacity),
        loaded.run.recipe.batch_size,
        len(loaded.dataset.train),
    )


def find_largest(fits: Callable[[int], bool], start: int, limit: int) -> int | None:
    """Return the largest size that fits, of `start` doubled or halved; None: not even 1.

    Args:
        fits: Whether a size fits.
        start: The size that is tried first.
        limit: The largest size of use; where it fits, it is the answer.
    """
    size = min(start, limit)
    if fits(size):
        while size < limit and fits(min(2 * size, limit)):
            size = min(2 * size, limit)
        return size
    while size > 1:
        size //= 2
        if fits(size):
            return size
    return None


def trains_within(
    loaded: LoadedRun, depth: int, batch_size: int, capacity: int = sys.maxsize
) -> bool:
    """Return whether a batch is trained at once, and in no more bytes than `capacity`."""
    device = loaded.device_context.device
    recipe = loaded.run.recipe.model_copy(
        update={
            "epochs": 1,
            "freeze_depth": depth,
            "batch_size": batch_size,
            "accumulate": 1,
            "validate_every": 1,
            "patience": None,
        }
    )
    context = loaded.make_context(depth, recipe)
    few = replace(
        context,
        train=few_examples(context.train, batch_size),
        valid=few_examples(context.valid, 1),
    )
    forget_peak(device)
    notes = [note for progress in fit(few, recipe, seed=0) for note in progress.epoch.notes]
    if any(note.startswith("out of memory with") for note in notes):
        return False
    if device.type != "cuda":
        return True
    needed = peak_bytes(device) - resident_bytes(device) + CONTEXT_BYTES
    return needed <= capacity
