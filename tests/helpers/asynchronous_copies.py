"""Stand-ins on the CPU for what a CUDA device does beside the thread that asks for it: page-locked memory, events, a side stream."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tuner.core import device_transfers, input_spec
from tuner.core.input_spec import TensorTree
from tuner.core.types import Batch


@dataclass
class Copies:
    """What was copied: tensors through page-locked memory, and events that were recorded."""

    pinned: int = 0
    events: list["DelayedEvent"] = field(default_factory=list)


@dataclass
class DelayedEvent:
    """An event that has happened when it was asked for as often as `questions` says."""

    questions: int = 2
    waited: bool = False

    def query(self) -> bool:
        self.questions -= 1
        return self.questions < 0

    def synchronize(self) -> None:
        self.waited = True


def pretend(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """From now on copies to the CPU take the way of copies to a CUDA device."""
    copies = Copies()

    def pin(tensor: Tensor) -> Tensor:
        copies.pinned += 1
        return tensor.clone()

    def new_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        copies.pinned += 1
        return torch.empty(shape, dtype=dtype)

    def record_event(device: torch.device) -> DelayedEvent:
        copies.events.append(DelayedEvent())
        return copies.events[-1]

    for module in (device_transfers, input_spec):
        monkeypatch.setattr(module, "copies_asynchronously", lambda device: True)
    monkeypatch.setattr(device_transfers, "pin", pin)
    monkeypatch.setattr(device_transfers, "new_pinned", new_pinned)
    monkeypatch.setattr(device_transfers, "record_event", record_event)
    return copies


class DelayedStream:
    """A side stream whose batches have wrong content until they are handed over."""

    def __init__(self) -> None:
        self.threads: list[int] = []  # in which batches were made
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1

    def make(self, compute: Callable[[], Batch]) -> "DelayedBatch":
        self.threads.append(threading.get_ident())
        batch = compute()
        hidden = Batch(*(map_tree(tree, Tensor.clone) for tree in batch))
        for tree in batch:
            map_tree(tree, Tensor.zero_)
        return DelayedBatch(batch, hidden)


@dataclass(frozen=True)
class DelayedBatch:
    shown: Batch
    hidden: Batch

    def hand_over(self) -> Batch:
        for shown, hidden in zip(self.shown, self.hidden, strict=True):
            if isinstance(shown, Tensor):
                assert isinstance(hidden, Tensor)
                shown.copy_(hidden)
            else:
                assert isinstance(hidden, dict)
                for name, tensor in shown.items():
                    tensor.copy_(hidden[name])
        return self.shown


def map_tree(tree: TensorTree, function: Callable[[Tensor], Tensor]) -> TensorTree:
    if isinstance(tree, Tensor):
        return function(tree)
    return {name: function(tensor) for name, tensor in tree.items()}
