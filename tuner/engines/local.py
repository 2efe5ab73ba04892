"""Jobs in worker processes of this machine. Workers persist, so that torch, data and caches stay loaded between jobs."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tuner.config.run import Engine
from tuner.engines import _process_settings
from tuner.engines._job_runner import carry_out
from tuner.jobs import Carry, GoOn, Job, NextJob, OnEnd, OnReport, Outcome

POLL = 0.2  # seconds between looks at `go_on`
SILENCE = 120.0  # seconds without a sign of life after which a worker is given up
BEATS = 20  # signs of life in that time
YOUNG = 10  # times as long for a worker that has shown none yet: it may be reading torch from a slow disk


@dataclass
class Worker:
    process: BaseProcess
    pipe: Connection
    slot: int
    job: Job | None = None
    silent: float = 0.0  # seconds, as far as they were watched
    young: bool = True


@contextlib.contextmanager
def run(  # noqa: C901
    engine: Engine = Engine(),
    warn: Callable[[str], None] = lambda _: None,
    *,
    silence: float = SILENCE,
) -> Iterator[Carry]:
    """Workers live as long as the `with` block, but for one that is `silent` for so many seconds (stopped, or stuck)."""
    crew: list[Worker] = []

    def carry(jobs: NextJob, report: OnReport, ended: OnEnd, go_on: GoOn, workers: int) -> None:
        look = time.monotonic()
        while go_on():
            hand_out(crew, jobs, workers, silence / BEATS)
            busy = [w for w in crew if w.job]
            if not busy:
                return
            heard = wait([w.pipe for w in busy], timeout=POLL)
            # by looks: what passed while the coordinator itself was stopped or at work is nobody's silence
            passed, look = min(time.monotonic() - look, 2 * POLL), time.monotonic()
            for worker in busy:
                if worker.pipe in heard:
                    if not listen(worker, report, ended):
                        crew.remove(worker)
                elif overdue(worker, passed, silence):
                    crew.remove(worker)
                    give_up(worker, silence, ended)
        for worker in [w for w in crew if w.job]:
            crew.remove(worker)
            job = worker.job
            dismiss(worker)
            if job:
                ended(job, Outcome("lost", reason="interrupted", cause="interrupted"))

    try:
        yield carry
    finally:
        for worker in crew:
            dismiss(worker)


def hand_out(workers: list[Worker], jobs: NextJob, room: int, beat: float) -> None:
    """A job for each idle worker, and new workers as long as there are jobs and room."""
    while True:
        idle = next((w for w in workers if w.job is None), None)
        if idle is None and len(workers) >= room:
            return
        job = jobs()
        if job is None:
            return
        if idle is None:
            taken = {w.slot for w in workers}
            idle = hire(next(i for i in range(room) if i not in taken), beat)
            workers.append(idle)
        idle.job, idle.silent = job, 0.0
        with contextlib.suppress(OSError):  # a worker that just died is noticed when listened to
            idle.pipe.send((job, room))


def hire(slot: int, beat: float) -> Worker:
    _process_settings.quiet_threads()  # its environment is the worker's
    context = multiprocessing.get_context("spawn")  # a forked torch or SQLite breaks
    ours, theirs = context.Pipe()
    process = context.Process(
        target=work, args=(theirs, slot, beat), name=f"tuner-worker-{slot}", daemon=True
    )
    process.start()
    theirs.close()
    return Worker(process, ours, slot)


def listen(worker: Worker, report: OnReport, ended: OnEnd) -> bool:
    """Takes one message. False: the worker is dead."""
    job = worker.job
    assert job is not None
    worker.silent, worker.young = 0.0, False
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        worker.job = None
        dismiss(worker)
        ended(job, death(worker.process.exitcode))
        return False
    if kind == "alive":
        return True
    if kind == "report":
        answer = report(job, value)
        with contextlib.suppress(OSError):  # a worker that just died is noticed when listened to
            worker.pipe.send(answer)
        return True
    worker.job = None
    ended(job, value)
    return True


def overdue(worker: Worker, passed: float, silence: float) -> bool:
    """Counts the seconds of a worker that said nothing; whether they are too many."""
    worker.silent += passed
    return worker.silent > silence * (YOUNG if worker.young else 1)


def give_up(worker: Worker, silence: float, ended: OnEnd) -> None:
    """Ends a silent worker. SIGKILL reaches a stopped process too, and its pipe is closed: it cannot come back to report."""
    job = worker.job
    assert job is not None
    worker.process.kill()
    dismiss(worker)
    reason = f"worker silent for {silence * (YOUNG if worker.young else 1):g} s"
    ended(job, Outcome("lost", reason=reason, cause="silent"))


def death(code: int | None) -> Outcome:
    """How the job of a worker that ended by itself did; `code` is the exit code, negative for a signal."""
    if code == -signal.SIGKILL:  # the kernel's way where memory runs out
        reason = "worker ended by SIGKILL (out of memory?)"
        return Outcome("lost", reason=reason, cause="memory")
    if code is not None and code < 0:
        return Outcome("lost", reason=f"worker ended by {signal.Signals(-code).name}", cause="died")
    return Outcome("lost", reason=f"worker ended with exit code {code}", cause="died")


def dismiss(worker: Worker) -> None:
    """Ends a worker: an idle one by closing its pipe, a busy one by SIGTERM, so that it can remove a half-finished
    download, and either by SIGKILL when it does not listen."""
    worker.pipe.close()
    if worker.job is not None and worker.process.is_alive():
        worker.process.terminate()
    worker.process.join(3)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


# -- the worker's side


def work(pipe: Connection, slot: int, beat: float) -> None:
    """The life of a worker process: jobs from the pipe until it closes."""
    _process_settings.end_with_parent()
    _process_settings.keep_memory()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the coordinator decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    voice = Voice(pipe)
    threading.Thread(target=voice.beat, args=(beat,), daemon=True).start()

    def report(value: Any) -> bool:
        voice.say("report", value)
        return bool(pipe.recv())

    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            job, sharing = pipe.recv()
            limit_threads(sharing)
            voice.busy.set()
            outcome = carry_out(job, report, slot)
            voice.busy.clear()
            voice.say("ended", outcome)


class Voice:
    """What a worker says, one at a time: its work's reports, and every few seconds that it lives."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.lock, self.busy = pipe, threading.Lock(), threading.Event()

    def say(self, kind: str, value: Any = None) -> None:
        with self.lock:
            self.pipe.send((kind, value))

    def beat(self, every: float) -> None:
        """While there is a job, for only then is anyone listening; an operator that computes for minutes lets this thread run."""
        with contextlib.suppress(OSError):  # the coordinator has dismissed this worker
            while self.busy.wait():
                self.say("alive")
                time.sleep(every)


def _die_with(parent: BaseProcess) -> None:
    """A coordinator that was killed leaves no worker behind."""
    wait([parent.sentinel])
    os._exit(1)


def limit_threads(sharing: int) -> None:
    """A fair share of the cores for one of `sharing` workers."""
    import torch  # here: the coordinator imports this module too, and stays without torch

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(max(1, cores // sharing))
