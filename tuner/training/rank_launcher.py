"""The worker's side of a training on several GPUs: it starts a process for each and passes on what
the first one reports.

The processes are started, watched and ended by torchrun's own machinery
(`torch.distributed.elastic.multiprocessing`). What torchrun does beside that, finding other
machines over a port that trusts whoever connects, is not needed on one machine: the ranks meet in a
file, and talk to the worker through a socket, both in a folder that only this user can enter.
"""

import contextlib
import importlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes

from tuner.files import removal
from tuner.messages import Assignment, DefaultTestJob, FinalizeJob

POLL_SECONDS = 0.2
LINK_NAME, MEETING_NAME = "link", "meeting"  # of the socket and the file in the ranks' folder
LOOPBACK = Path("/sys/class/net/lo")  # of Linux: nothing on another machine reaches it
# gloo and NCCL listen there, unless the environment says otherwise
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
ELASTIC_LOGGER = "torch.distributed.elastic.multiprocessing.api"  # says what an error says anyway


class RankJob(NamedTuple):
    """What each rank calls: function(argument, report, slot), named as module:function."""

    function: str
    argument: Any
    slot: int


def call_on_ranks(
    function: str,
    argument: Any,
    report: Callable[[Any], bool],
    slot: int,
    *,
    trains: bool = True,
) -> Any:
    """Calls a function that trains on as many ranks as its engine's `gpus_per_trial` says: in this
    process where that is one.

    Ranks end as soon as one of them fails. Where their memory runs out they begin again, from
    the last checkpoint, with batches in twice as many parts. Where one is killed, this process ends
    in the same way: whoever waits for it sees what a training in one process would have shown.

    Args:
        function: module:function, which takes an Assignment or a job that has one.
        argument: Its argument.
        report: Hears what rank 0 reports, and answers whether the training goes on.
        slot: The worker's number, from 0.
        trains: False: it trains nothing this time, so it is called in this process.

    Returns:
        What the function returned on rank 0.

    Raises:
        Whatever it raised; torch.OutOfMemoryError where even the smallest parts are too large.
    """
    assignment = assignment_of(argument)
    count = assignment.engine.rank_count
    if count == 1 or not trains:
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(argument, report, slot)
    largest_share = math.ceil(assignment.run.recipe.batch_size / count)
    while True:
        job = RankJob(function, argument, slot)
        ending = run_once(job, report, count)
        if ending.kind == "done":
            return ending.value
        if ending.kind == "failed":
            raise ending.value
        if ending.kind == "died":
            end_as(ending.value)
        micro_batches = assignment_of(argument).micro_batches
        if micro_batches >= largest_share:
            raise torch.OutOfMemoryError(ending.value)
        argument = with_micro_batches(argument, 2 * micro_batches)


def assignment_of(argument: Any) -> Assignment:
    """The assignment that an argument is or has."""
    return argument if isinstance(argument, Assignment) else argument.assignment


def with_micro_batches(argument: Any, count: int) -> Any:
    """The argument of a training that takes a batch in so many parts."""
    assignment = replace(assignment_of(argument), micro_batches=count)
    if isinstance(argument, FinalizeJob | DefaultTestJob):
        return replace(argument, assignment=assignment)
    return assignment


class Ending(NamedTuple):
    """How a rank ended. done: `value` is what its function returned. failed: what it raised.
    memory: what it said when its memory ran out. died: its exit code, negative for a signal.
    """

    kind: str
    value: Any
    rank: int


def run_once(job: RankJob, report: Callable[[Any], bool], count: int) -> Ending:
    """Starts the ranks and waits until they have ended.

    Returns how rank 0 ended, or how a rank ended that did not succeed: one that said nothing, or
    else the first that said so. Other ranks may fail because of it.
    """
    with (
        removal.scratch() as folder,
        listen(folder / LINK_NAME) as listener,
        contextlib.closing(RankLinks(listener, job, report)) as links,
        started_ranks(folder, count) as processes,
    ):
        while (result := processes.wait(0)) is None:
            links.serve(POLL_SECONDS)
        while links.serve(0):
            pass
    said = {ending.rank for ending in links.endings}
    died = [
        Ending("died", failure.exitcode, rank)
        for rank, failure in result.failures.items()
        if rank not in said and failure.exitcode != -signal.SIGTERM  # with which others are ended
    ]
    bad = [ending for ending in links.endings if ending.kind != "done"]
    return [*died, *bad, *links.endings][0]


@dataclass
class RankLinks:
    """The worker's ends of the sockets to its ranks."""

    listener: socket.socket
    job: RankJob
    report: Callable[[Any], bool]
    links: list[Connection] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)  # in the order in which they arrived

    def serve(self, seconds: float) -> bool:
        """Answers what ranks send, at most so long after the last; whether there was something."""
        ready = wait([self.listener, *self.links], seconds)
        for link in ready:
            if isinstance(link, Connection):
                self._answer(link)
            else:
                accepted = Connection(self.listener.accept()[0].detach())
                self.links.append(accepted)
                accepted.send(self.job)
        return bool(ready)

    def _answer(self, link: Connection) -> None:
        try:
            kind, value, rank = link.recv()
        except (EOFError, OSError):  # it has ended
            self.links.remove(link)
            link.close()
            return
        if kind != "report":
            self.endings.append(Ending(kind, value, rank))
            return
        answer = self.report(value)
        with contextlib.suppress(OSError):  # it was killed meanwhile
            link.send(answer)

    def close(self) -> None:
        for link in self.links:
            link.close()


@contextlib.contextmanager
def listen(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


@contextlib.contextmanager
def started_ranks(folder: Path, count: int) -> Iterator[PContext]:
    """The processes of `count` ranks, which are killed where the block ends before them."""
    logging.getLogger(ELASTIC_LOGGER).setLevel(logging.CRITICAL)
    # torch's own handlers of signals replace a worker's while processes are started
    handlers = {number: signal.getsignal(number) for number in _handled_signals()}
    command = ("-P", "-m", "tuner.training.rank_process", str(folder))
    processes = start_processes(
        "ranks",
        sys.executable,
        dict.fromkeys(range(count), command),
        {rank: rank_environment(rank, count) for rank in range(count)},
        DefaultLogsSpecs(os.devnull),
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield processes
    finally:
        processes.close(signal.SIGKILL)


def _handled_signals() -> tuple[signal.Signals, ...]:
    return signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT


def rank_environment(rank: int, count: int) -> dict[str, str]:
    """What torchrun tells each process, its part of this process's threads, and where to find
    modules.
    """
    threads = str(max(1, torch.get_num_threads() // count))
    interfaces = {
        name: LOOPBACK.name
        for name in INTERFACE_VARIABLES
        if LOOPBACK.exists() and name not in os.environ
    }
    return interfaces | {
        # torch warns that parameters without a gradient are looked for where each has one
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def end_as(exit_code: int) -> None:
    """Ends this process with an exit code, or by the signal of a negative one."""
    if exit_code < 0:
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code)
