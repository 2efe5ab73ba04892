"""Jobs in worker processes of this machine.

Workers persist, so that torch, data and caches stay loaded between jobs.
"""

import contextlib
import importlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tuner.config.run import EngineSettings
from tuner.engines import _process_settings
from tuner.engines._job_runner import failure, run_job
from tuner.engines._watch import HEARTBEATS, POLL, SILENCE, Clock, Watch
from tuner.jobs import Job, NextJob, OnEnd, OnReport, Outcome, RunJobs, ShouldContinue

# Seconds in which workers that are stopped can end by themselves. They need 0.2 s; a machine that
# swaps or writes a large file can hold a process up for several.
STOP_TIMEOUT = 10.0


@dataclass(eq=False)
class Worker:
    process: BaseProcess
    pipe: Connection
    slot: int
    job: Job | None = None
    watch: Watch = field(default_factory=lambda: Watch("worker", SILENCE, None, starting=True))
    begun: bool = False  # it has taken the job


Message = tuple[Worker, str, Any]
"""The worker; the kind (begun, alive, report, ended, unreadable, or closed: dead); the value."""


@contextlib.contextmanager
def run(
    engine: EngineSettings = EngineSettings(),
    warn: Callable[[str], None] = lambda _: None,
    *,
    silence: float = SILENCE,
) -> Iterator[RunJobs]:
    """Start the engine. Its workers live as long as the `with` block.

    A worker without a sign of life for `silence` seconds is given up.
    """
    pool = WorkerPool(silence)
    try:
        yield pool.run_jobs
    finally:
        stop_workers(pool.workers)


class WorkerPool:
    """The workers of one engine.

    A thread per worker reads its pipe, so that half a message of a stopped worker does not block
    the coordinator.
    """

    def __init__(self, silence: float) -> None:
        self.silence = silence
        self.workers: list[Worker] = []
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.undelivered: list[Job] = []  # assigned to workers that died before they read them

    def run_jobs(
        self,
        next_job: NextJob,
        on_report: OnReport,
        on_end: OnEnd,
        should_continue: ShouldContinue,
        workers: int,
    ) -> None:
        """Carries out jobs until there are none, `workers` at a time."""
        self.stop_surplus(workers)
        clock = Clock()
        try:
            while should_continue():
                self.assign_jobs(next_job, workers)
                if not self.busy():
                    return
                for message in self.receive():
                    self.handle(*message, on_report, on_end)
                self.give_up_unresponsive(clock.passed(), on_end)
        finally:  # whether there are no jobs left, time is up, or the coordinator failed
            unfinished = self.stop_busy()
        for job in unfinished:
            on_end(job, Outcome("lost", reason="interrupted", loss_cause="interrupted"))

    def busy(self) -> list[Worker]:
        return [w for w in self.workers if w.job is not None]

    def stop_surplus(self, limit: int) -> None:
        """Stop workers beyond `limit`, so that the others have their memory. All are idle."""
        surplus = self.workers[limit:]
        del self.workers[limit:]
        stop_workers(surplus)

    def assign_jobs(self, jobs: NextJob, limit: int) -> None:
        """A job for each idle worker, and new workers up to `limit` as long as there are jobs."""
        while True:
            idle = next((w for w in self.workers if w.job is None), None)
            if idle is None and len(self.workers) >= limit:
                return
            job = self.undelivered.pop() if self.undelivered else jobs()
            if job is None:
                return
            worker = idle or self.start_worker(limit)
            worker.job, worker.begun = job, False
            worker.watch = Watch("worker", self.silence, job.stall, starting=worker.watch.starting)
            with contextlib.suppress(OSError):  # a worker that just died is noticed by its reader
                worker.pipe.send((job, limit))

    def start_worker(self, limit: int) -> Worker:
        taken = {w.slot for w in self.workers}
        worker = start_worker(
            next(i for i in range(limit) if i not in taken), self.silence / HEARTBEATS
        )
        self.workers.append(worker)
        threading.Thread(target=read_messages, args=(worker, self.inbox), daemon=True).start()
        return worker

    def receive(self) -> Iterator[Message]:
        """The messages that are there; waits a moment for the first one."""
        with contextlib.suppress(queue.Empty):
            yield self.inbox.get(timeout=POLL)
        for _ in range(self.inbox.qsize()):  # no more: the loop must ask `should_continue`
            yield self.inbox.get_nowait()

    def handle(self, worker: Worker, kind: str, value: Any, report: OnReport, ended: OnEnd) -> None:
        if worker not in self.workers:  # stopped a moment ago
            return
        if kind == "closed":
            self.remove_dead(worker, ended)
        elif kind == "begun":
            worker.begun = True
        elif worker.job is not None:
            worker.watch.alive()
            if kind == "report":
                worker.watch.reported(value)
                answer = report(worker.job, value)
                with contextlib.suppress(OSError):  # as above
                    worker.pipe.send(answer)
            elif kind == "ended":
                job, worker.job = worker.job, None
                ended(job, value)
            elif kind == "unreadable":
                self.give_up(worker, value, ended)

    def remove_dead(self, worker: Worker, ended: OnEnd) -> None:
        """End the job of a dead worker.

        A job that the worker never read, because it died idle, is assigned again.
        """
        worker.process.join(STOP_TIMEOUT)
        outcome = death_outcome(worker.process.exitcode)
        job, worker.job = worker.job, None
        self.workers.remove(worker)
        stop_workers([worker])
        if job is not None and not worker.begun and not worker.watch.starting:
            self.undelivered.append(job)
        elif job is not None:
            ended(job, outcome)

    def give_up_unresponsive(self, passed: float, ended: OnEnd) -> None:
        """Give up workers that are silent or whose job hangs.

        `passed`: seconds since the last call.
        """
        for worker in self.busy():
            outcome = worker.watch.passed(passed)
            if outcome is None:
                continue
            if outcome.loss_cause == "silent":
                # also ends a stopped process, which therefore cannot come back
                worker.process.kill()
            self.give_up(worker, outcome, ended)

    def give_up(self, worker: Worker, outcome: Outcome, ended: OnEnd) -> None:
        job = worker.job
        assert job is not None
        self.workers.remove(worker)
        stop_workers([worker])
        ended(job, outcome)

    def stop_busy(self) -> list[Job]:
        """Stops busy workers at once. Returns the jobs that did not end."""
        busy = self.busy()
        unfinished = [*self.undelivered, *(w.job for w in busy if w.job is not None)]
        self.workers, self.undelivered = [w for w in self.workers if w.job is None], []
        stop_workers(busy)
        return unfinished


def start_worker(slot: int, heartbeat: float) -> Worker:
    _process_settings.set_thread_wait_policy()  # its environment is the worker's
    context = multiprocessing.get_context("spawn")  # a forked torch or SQLite breaks
    ours, theirs = context.Pipe()
    process = context.Process(
        target=run_worker, args=(theirs, slot, heartbeat), name=f"tuner-worker-{slot}", daemon=True
    )
    with _process_settings.safe_path(), _process_settings.without_main_module():
        process.start()
    theirs.close()
    return Worker(process, ours, slot)


def read_messages(worker: Worker, inbox: "queue.SimpleQueue[Message]") -> None:
    """Move messages from a worker's pipe to the inbox until the worker is dead. Runs in a thread.

    The process is waited for too: where it leaves children, its pipe stays open after its death.
    """
    try:
        while worker.pipe in wait([worker.pipe, worker.process.sentinel]):
            inbox.put((worker, *worker.pipe.recv()))
        inbox.put((worker, "closed", None))
    except (EOFError, OSError):
        inbox.put((worker, "closed", None))
    except Exception as error:  # a value of the user's own class that cannot be unpickled here
        inbox.put((worker, "unreadable", failure(error)))


def death_outcome(code: int | None) -> Outcome:
    """Return the outcome of a job whose worker died by itself.

    `code`: its exit code, negative for a signal.
    """
    if code == -signal.SIGKILL:  # the kernel's way where memory runs out
        reason = "worker ended by SIGKILL (out of memory?)"
        return Outcome("lost", reason=reason, loss_cause="memory")
    if code is not None and code < 0:
        return Outcome(
            "lost", reason=f"worker ended by {signal.Signals(-code).name}", loss_cause="died"
        )
    return Outcome("lost", reason=f"worker ended with exit code {code}", loss_cause="died")


def stop_workers(workers: list[Worker]) -> None:
    """Stops workers, all at the same time, and waits until they are dead.

    An idle worker gets None instead of a job. A busy one gets SIGTERM, so that it can remove a
    half-finished download. Those that do not end within STOP_TIMEOUT get SIGKILL.
    """
    for worker in workers:
        if worker.job is not None:
            worker.process.terminate()
        else:
            with contextlib.suppress(OSError):  # it is dead
                worker.pipe.send(None)
    deadline = time.monotonic() + STOP_TIMEOUT
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()


# -- the worker's side


def run_worker(pipe: Connection, slot: int, heartbeat: float) -> None:
    """Take jobs from the pipe until it gives None or closes: what a worker process does."""
    _process_settings.forget_safe_path()
    _process_settings.die_with_parent()
    _process_settings.keep_freed_memory()
    _process_settings.use_expandable_segments()
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to all processes
        signal.signal(number, signal.SIG_IGN)  # the coordinator decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    channel = WorkerChannel(pipe)
    threading.Thread(target=channel.send_heartbeats, args=(heartbeat,), daemon=True).start()

    def report(value: Any) -> bool:
        channel.send("report", value)
        return bool(pipe.recv())

    # read before limit_threads writes OMP_NUM_THREADS
    cores = _process_settings.cores()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while (message := pipe.recv()) is not None:
            job: Job = message[0]
            worker_count: int = message[1]
            channel.send("begun")
            # Heartbeats begin when torch is loaded. While it is loaded, no other thread of this
            # process may run for minutes.
            module = job.function.partition(":")[0]
            with contextlib.suppress(Exception):  # run_job reports what is wrong with the module
                importlib.import_module(module)
            limit_threads(cores / worker_count)
            channel.busy.set()
            outcome = run_job(job, report, slot)
            channel.busy.clear()
            channel.send("ended", outcome)


class WorkerChannel:
    """A worker's end of the pipe. Two threads send: one the job's reports, one heartbeats."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.lock, self.busy = pipe, threading.Lock(), threading.Event()

    def send(self, kind: str, value: Any = None) -> None:
        with self.lock:
            self.pipe.send((kind, value))

    def send_heartbeats(self, every: float) -> None:
        """Send a sign of life every few seconds while there is a job.

        An operator that computes for minutes does not block this thread.
        """
        with contextlib.suppress(OSError):  # the coordinator has stopped this worker
            while self.busy.wait():
                self.send("alive")
                time.sleep(every)


def _exit_with_parent(parent: BaseProcess) -> None:
    """A coordinator that was killed leaves no worker behind."""
    wait([parent.sentinel])
    os._exit(1)


def limit_threads(share: float) -> None:
    """Give torch `share` cores, rounded down, and at least one.

    The environment variables are for a torch that is not loaded yet.
    """
    threads = max(1, int(share))
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
