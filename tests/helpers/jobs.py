"""What the engine tests have workers do, and a model that diverges."""

import inspect
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.errors import DataError


def pid(argument: Any, report: Callable[[Any], bool], slot: int) -> int:
    return os.getpid()


def hear_the_terminal(argument: Any, report: Callable[[Any], bool], slot: int) -> int:
    """Gets the signals that a terminal sends to all processes of a command."""
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
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


def python_started(argument: Any, report: Callable[[Any], bool], slot: int) -> tuple[Any, Any]:
    """What the programs inherit that a job starts, and where this process imports from first."""
    return os.environ.get("PYTHONSAFEPATH"), sys.path[0]


def threads(argument: Any, report: Callable[[Any], bool], slot: int) -> int:
    import torch

    return torch.get_num_threads()


def linear(outputs: int) -> Any:
    """A model without normalisation, which a large learning rate drives to infinity."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 32 * 32, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, outputs),
    )


def stop(argument: int, report: Callable[[Any], bool], slot: int) -> int:
    """Reports its process, stops it, and reports up to `argument` times more once it goes on."""
    report(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    return count(argument, report, slot)


def stop_amid_a_message(argument: Any, report: Callable[[Any], bool], slot: int) -> None:
    """Reports its process, and stops it when the first bytes of a long message are written."""
    report(os.getpid())
    pipe = inspect.getclosurevars(report).nonlocals["pipe"]
    os.write(pipe.fileno(), struct.pack("!i", 1_000_000) + b"x" * 10)
    os.kill(os.getpid(), signal.SIGSTOP)


def wait(argument: float | None, report: Callable[[Any], bool], slot: int) -> None:
    """Reports its process, and waits for a lock that nobody frees, for ever or for so many seconds."""
    report(os.getpid())
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=-1 if argument is None else argument)


def deaf(argument: Any, report: Callable[[Any], bool], slot: int) -> None:
    """Reports its process, and does not listen to SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report(os.getpid())
    time.sleep(60)


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


def where(argument: Any, report: Callable[[Any], bool], slot: int) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def same(argument: Any, report: Callable[[Any], bool], slot: int) -> Any:
    return argument


def listing(argument: str, report: Callable[[Any], bool], slot: int) -> dict[str, bytes]:
    """The files below a folder. Raises DataError where it is missing."""
    folder = Path(argument)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist")
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def steps(argument: tuple[int, float, str | None], report: Callable[[Any], bool], slot: int) -> int:
    """Takes so many steps of so many seconds; reports the pid at each, and writes the step to a file where one is named."""
    number, length, path = argument
    for i in range(1, number + 1):
        if path is not None:
            with open(path, "a") as file:
                file.write(f"{i} {time.time()}\n")
        if not report(os.getpid()):
            return i
        for _ in range(round(length / 0.05)):
            time.sleep(0.05)
    return number


def impatient_steps(
    argument: tuple[int, float, str | None], report: Callable[[Any], bool], slot: int
) -> int:
    """`steps` by a worker of Ray's that waits for an answer for a few seconds, not for thirty."""
    from tuner.engines import _ray_worker

    _ray_worker.ANSWER_TIMEOUT = 4.0  # of this process, which ends with the test's engine
    return steps(argument, report, slot)


def held(argument: str, report: Callable[[Any], bool], slot: int) -> None:
    """Holds a temporary file until asked to end, and can be asked at any time."""
    try:
        with open(argument, "w"):
            report(os.getpid())
            while True:
                time.sleep(0.05)
    finally:
        os.unlink(argument)


def checkpoint(step: int) -> str:
    return f"{step}-{'0' * 64}.safetensors"


def remember(argument: tuple[str, int], report: Callable[[Any], bool], slot: int) -> list[str]:
    """Keeps a file per step, named as a checkpoint is, in a folder, drops the step before, and says what was there at first. Ends its process at step -`last`."""
    folder, last = Path(argument[0]), argument[1]
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(found), abs(last)):
        (folder / checkpoint(i)).write_bytes(bytes([i]) * 1000)
        (folder / checkpoint(i - 2)).unlink(missing_ok=True)
        report(i)
    if last < 0:
        os._exit(1)
    return found


def filling(argument: tuple[Any, str], report: Callable[[Any], bool], slot: int) -> int:
    """A trial that notes each folder of remembered activations that it builds."""
    from tuner.training import cache_filling, worker_jobs

    assignment, path = argument
    real = cache_filling.atomic_folder

    def build(folder: Path, *more: Any, **named: Any) -> Any:
        with open(path, "a") as file:
            file.write(f"{folder.name}\n")
        return real(folder, *more, **named)

    cache_filling.atomic_folder = build
    try:
        return len(worker_jobs.run_trial(assignment, report, slot).epochs)
    finally:
        cache_filling.atomic_folder = real


class Unreadable:
    """A value that can be sent, and that cannot be read where it arrives."""

    def __reduce__(self) -> Any:
        return _refuse_to_be_read, (os.getpid(),)


def _refuse_to_be_read(pid: int) -> None:
    raise ImportError("no module named yours")


def unreadable(argument: Any, report: Callable[[Any], bool], slot: int) -> Any:
    return Unreadable()
