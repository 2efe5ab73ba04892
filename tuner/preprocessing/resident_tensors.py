"""Tensors that a GPU keeps in its memory for as long as training does not need the room.

Pixels and cached activations are read from mapped files. Where they fit, a copy of them in the
memory of the GPU saves the CPU all work on a batch.
"""

import weakref
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from tuner.core.device_memory import available_bytes, needed_again

SHARE = 0.5  # of the memory that is free or that such tensors have


class ResidentTensors:
    """Tensors on the CPU, and their copies on a device where these fit into its memory.

    The copies are made at the first use of `tensors`.
    """

    def __init__(self, on_cpu: Mapping[str, Tensor], device: torch.device) -> None:
        self.on_cpu, self.device = on_cpu, device
        self.on_device: Mapping[str, Tensor] | None = None
        self.was_tried = False

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The copies on the device, or the tensors on the CPU where there is no room for these."""
        if not self.was_tried:
            self.was_tried = True
            if fits(self._byte_count(), self.device):
                self.on_device = {
                    name: tensor.to(self.device, copy=True) for name, tensor in self.on_cpu.items()
                }
                _with_copies.add(self)
        return self.on_cpu if self.on_device is None else self.on_device

    def is_resident(self) -> bool:
        """Whether there are copies on the device."""
        return self.tensors is self.on_device

    def give_back(self) -> None:
        """Drops the copies. They are not made again."""
        self.on_device, self.was_tried = None, True

    def _byte_count(self) -> int:
        return sum(tensor.nbytes for tensor in self.on_cpu.values())


_with_copies: "weakref.WeakSet[ResidentTensors]" = weakref.WeakSet()
_shared: "weakref.WeakValueDictionary[Hashable, ResidentTensors]" = weakref.WeakValueDictionary()


def share_tensors(on_cpu: Mapping[str, Tensor], device: torch.device) -> ResidentTensors:
    """The copies of these tensors that the process has already, or new ones.

    Training and validation examples are rows of the same tensors, which must be in the memory of
    the GPU only once.
    """
    key = (device, *((name, value.data_ptr(), value.shape) for name, value in on_cpu.items()))
    shared = _shared.get(key)
    if shared is None:
        shared = _shared[key] = ResidentTensors(on_cpu, device)
    return shared


def fits(byte_count: int, device: torch.device) -> bool:
    """Whether copies of so many bytes may be made.

    With all others they have at most SHARE of the memory that nothing else uses. They leave free
    what the training has needed so far: what it made give back is not copied again meanwhile.
    """
    free, resident = available_bytes(device), resident_bytes(device)
    return resident + byte_count < SHARE * (free + resident) and byte_count <= free - needed_again(
        device
    )


def resident_bytes(device: torch.device) -> int:
    """The bytes of all copies that are on `device`."""
    return sum(
        tensor.nbytes
        for tensors in _with_copies
        if tensors.device == device and tensors.on_device is not None
        for tensor in tensors.on_device.values()
    )


def has_resident_tensors() -> bool:
    """Whether there are copies that can be given back."""
    return any(tensors.on_device is not None for tensors in _with_copies)


def give_back_memory() -> bool:
    """Drops all copies of the process; whether there were some."""
    dropped = list(_with_copies)
    for tensors in dropped:
        tensors.give_back()
    _with_copies.clear()
    return bool(dropped)
