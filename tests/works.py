"""What the engine tests have workers do, and a model that diverges."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from tuner.errors import DataError


def pid(argument: Any, report: Callable[[Any], bool], slot: int) -> int:
    return os.getpid()


def count(argument: int, report: Callable[[Any], bool], slot: int) -> int:
    """Reports 1, 2, … up to `argument`, or until told to stop; returns the last."""
    for i in range(1, argument + 1):
        if not report(i):
            return i
    return argument


def die(argument: int, report: Callable[[Any], bool], slot: int) -> None:
    report("about to die")
    os.kill(os.getpid(), argument)
    time.sleep(10)


def leave(argument: int, report: Callable[[Any], bool], slot: int) -> None:
    os._exit(argument)


def fail(argument: str, report: Callable[[Any], bool], slot: int) -> None:
    raise ValueError(argument)


def refuse(argument: str, report: Callable[[Any], bool], slot: int) -> None:
    raise DataError(argument, "and more")


def hang(argument: str, report: Callable[[Any], bool], slot: int) -> None:
    """Holds a temporary file until asked to end, as a download does."""
    path = argument
    try:
        with open(path, "w"):
            report(os.getpid())
            time.sleep(60)
    finally:
        os.unlink(path)


def torch_loaded(argument: Any, report: Callable[[Any], bool], slot: int) -> tuple[bool, int]:
    import torch

    return "torch" in sys.modules, torch.get_num_threads()


def linear(outputs: int) -> Any:
    """A model without normalisation, which a large learning rate drives to infinity."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def stop(argument: int, report: Callable[[Any], bool], slot: int) -> int:
    """Reports its process, stops it, and reports up to `argument` times more once it goes on."""
    report(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    return count(argument, report, slot)


def sleep(argument: float, report: Callable[[Any], bool], slot: int) -> int:
    """Says nothing for so many seconds."""
    time.sleep(argument)
    return os.getpid()


def ticks(argument: int, report: Callable[[Any], bool], slot: int) -> int:
    """Reports (its process, a count) five times a second."""
    for i in range(argument):
        report((os.getpid(), i))
        time.sleep(0.2)
    return os.getpid()
