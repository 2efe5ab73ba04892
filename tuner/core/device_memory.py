"""How much memory is free, and how much a computation needs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def available_bytes(device: torch.device) -> int:
    """The bytes on a GPU that this process could still use; 0 on another device.

    What torch has reserved and no tensor uses counts as free. Of a GPU that several workers share,
    this worker has its fraction.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    own_limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free + unused, own_limit - allocated))


def available_main_memory() -> float:
    """The bytes of main memory that programs can use before the system swaps; infinite where the
    system does not say.

    Pages of files count as free.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return math.inf


_earlier_peaks: dict[torch.device, int] = {}  # those that `measure_need` made torch forget


def measure_need(compute: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """The result of `compute`, and the most bytes that its tensors had at once on a GPU; 0 on
    another device, which does not count them.
    """
    if device.type != "cuda":
        return compute(), 0
    _earlier_peaks[device] = peak_bytes(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = compute()
    return result, torch.cuda.max_memory_allocated(device) - before


def peak_bytes(device: torch.device) -> int:
    """The most bytes that tensors of this process had at once on a GPU since `forget_peak`."""
    return max(_earlier_peaks.get(device, 0), torch.cuda.max_memory_allocated(device))


def needed_again(device: torch.device) -> int:
    """The bytes of a GPU that are free now and were needed since `forget_peak`: a step of a
    training needs them, and the next step will; 0 on another device.
    """
    if device.type != "cuda":
        return 0
    return max(0, peak_bytes(device) - torch.cuda.memory_allocated(device))


def forget_peak(device: torch.device) -> None:
    """The peak of a GPU's memory is counted from now on."""
    if device.type == "cuda":
        _earlier_peaks.pop(device, None)
        torch.cuda.reset_peak_memory_stats(device)
