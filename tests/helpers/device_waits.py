"""Finds what makes a training step wait for the GPU.

On a GPU torch itself raises at a call that waits (`torch.cuda.set_sync_debug_mode`). On a CPU nothing waits, so the operators are
watched that would: those whose result Python reads, and those whose output's shape depends on the values. What a copy from
ordinary memory waits for can only be seen on a GPU.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "is_nonzero", "equal")
SHAPED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")


class WaitingOperators(TorchDispatchMode):
    """Lists the operators that would wait, while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.names = False, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        if self.watching and (by_mask or name in READS or name in SHAPED_BY_VALUES):
            self.names.append(f"{name} by a mask" if by_mask else name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watch_steps(
    optimizer: torch.optim.Optimizer, first: int, last: int, device: str
) -> Iterator[list[str]]:
    """Watches the steps after `first` and up to `last`, counted from 1. On a GPU a call that waits raises RuntimeError.

    The optimizer's own step is not watched on the CPU, where it reads its count of steps; this lies in ordinary memory
    on a GPU too.

    Yields the names of the operators that were found, on a CPU.
    """
    operators, steps = WaitingOperators(), 0

    def switch(on: bool) -> None:
        if device == "cpu":
            operators.watching = on
            return
        with warnings.catch_warnings():
            # torch says once that it does not find all calls that wait
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    def before(*_: Any) -> None:
        if device == "cpu":
            switch(on=False)

    def after(*_: Any) -> None:
        nonlocal steps
        steps += 1
        switch(on=first <= steps < last)

    hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        with operators if device == "cpu" else contextlib.nullcontext():
            yield operators.names
    finally:
        switch(on=False)
        for hook in hooks:
            hook.remove()
    assert steps >= last, f"{steps} steps were taken, {last} were to be watched"
