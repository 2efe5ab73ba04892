"""Copies between the memories of the CPU and of a GPU for which no thread waits.

A copy from ordinary memory makes the CPU wait until the GPU has done all that was asked of it
before. One from page-locked ("pinned") memory does not: CUDA C++ Programming Guide, "Asynchronous
Concurrent Execution". torch keeps freed page-locked memory, and uses it again only when the copies
from it are done. On devices other than CUDA's these functions copy as torch does by default.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def copies_asynchronously(device: torch.device) -> bool:
    """Whether copies between the CPU and `device` need no waiting: on CUDA devices."""
    return device.type == "cuda"


def pin(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in page-locked memory."""
    return tensor.pin_memory()


def new_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new CPU tensor in page-locked memory, with any content."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. The CPU does not wait for the copy."""
    if tensor.device.type != "cpu" or not copies_asynchronously(device):
        return tensor.to(device)
    return pin(tensor).to(device, non_blocking=True)


def gather_rows(values: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """`values[rows]` on `device`. The CPU does not wait for the copy.

    Args:
        values: (n, ...), on the CPU or on the device; it may be mapped from a file.
        rows: int64, of any shape, on the CPU.
        device: Where the rows are needed.
    """
    if not copies_asynchronously(device):
        return values[rows.to(values.device)].to(device)
    if values.device.type != "cpu":
        # whoever drops the values must not have their memory used again before they are read
        values.record_stream(torch.cuda.current_stream(values.device))
        return values[send(rows, values.device)]
    gathered = new_pinned((rows.numel(), *values.shape[1:]), values.dtype)
    torch.index_select(values, 0, rows.flatten(), out=gathered)
    return gathered.view(*rows.shape, *values.shape[1:]).to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way from a device to the CPU.

    They are copied on the current stream of the device, so what is done to them later does not
    change the copy. `wait` gives the copies.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Begins to copy. Tensors that are on the CPU already are copied at once."""
        self.tensors: dict[str, Tensor] = {}
        devices = set()
        for name, tensor in tensors.items():
            value = tensor.detach()
            if copies_asynchronously(value.device):
                devices.add(value.device)
                target = new_pinned(tuple(value.shape), value.dtype)
                self.tensors[name] = target.copy_(value, non_blocking=True)
            else:
                self.tensors[name] = value.to("cpu", copy=True)
        self.events = [record_event(device) for device in devices]

    def is_ready(self) -> bool:
        """Whether `wait` would give the copies at once."""
        return all(event.query() for event in self.events)  # type: ignore[no-untyped-call]

    def wait(self) -> dict[str, Tensor]:
        """The copies, as soon as they are complete."""
        for event in self.events:
            event.synchronize()
        return self.tensors


def record_event(device: torch.device) -> torch.cuda.Event:
    """An event after all that the current stream of `device` was asked to do."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
