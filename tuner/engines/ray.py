"""Jobs on the nodes of a Ray cluster.

The coordinator stays here. A worker is an actor that keeps torch, data and caches between jobs.

A node that joins is used once it has passed the checks: jobs that run on every node. When a node
is lost or a worker dies, its job loses an attempt. Ray restarts nothing: the coordinator decides
what is tried again.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tuner.config.run import EngineSettings
from tuner.engines import _ray_cluster
from tuner.engines._file_sync import FileSync
from tuner.engines._job_runner import refused
from tuner.engines._node_checks import NodeChecks
from tuner.engines._watch import HEARTBEATS, POLL, SILENCE, Clock, Watch
from tuner.engines._worker_pool import PendingJob, PoolWorker, WorkerPool, node_lost_outcome
from tuner.errors import TunerError
from tuner.jobs import NextJob, OnEnd, OnReport, Outcome, RunJobs, ShouldContinue


@contextlib.contextmanager
def run(
    engine: EngineSettings = EngineSettings(name="ray"),
    warn: Callable[[str], None] = lambda _: None,
    *,
    silence: float = SILENCE,
) -> Iterator[RunJobs]:
    """Carry out jobs on a Ray cluster. Raises StorageError.

    Workers live as long as the `with` block, and so does a cluster that was started for it. A
    worker without a sign of life for `silence` seconds is given up.
    """
    with _ray_cluster.connect_ray(engine, warn) as ray:
        cluster = RayEngine(ray, engine, warn, silence)
        try:
            yield cluster.run_jobs
        finally:
            cluster.pool.stop_workers(list(cluster.pool.workers))
            cluster.sync.close()


@dataclass(frozen=True)
class Client:
    """Who has jobs carried out: the arguments of one `run_jobs`."""

    next_job: NextJob
    report: OnReport
    ended: OnEnd
    workers: int


class RayEngine:
    """Takes each job through its states.

    1. It waits for an idle worker. At most one job waits, so that no trial is proposed too early.
    2. Its files are synced to the worker's node.
    3. Its messages are streamed.
    4. It has ended, or its worker is lost.

    A job for every node becomes a check. A node that has not passed all checks gets checks only.
    """

    def __init__(
        self, ray: Any, engine: EngineSettings, warn: Callable[[str], None], silence: float
    ) -> None:
        self.ray, self.silence = ray, silence
        self.pool, self.sync = WorkerPool(ray, engine, warn), FileSync(ray, engine.ship)
        self.checks = NodeChecks(ray, self.pool, engine.ship)
        self.waiting: PendingJob | None = None

    def run_jobs(
        self,
        next_job: NextJob,
        on_report: OnReport,
        on_end: OnEnd,
        should_continue: ShouldContinue,
        workers: int,
    ) -> None:
        """Carry out jobs until there are none, `workers` at a time.

        Raises StorageError when the cluster is gone.
        """
        client, clock = Client(next_job, on_report, on_end, workers), Clock()
        try:
            while should_continue():
                self.lose_workers_of_lost_nodes()
                self.request_job(client)
                if self.finished():
                    return
                self.adjust_pool(workers)
                self.assign_jobs(client)
                self.listen()
                self.give_up_unresponsive(clock.passed())
                self.checks.conclude()
        finally:  # whether there are no jobs left, time is up, or the coordinator failed
            unfinished = self.abandon()
        for work in unfinished:
            work.on_end(work.job, Outcome("lost", reason="interrupted", loss_cause="interrupted"))

    def finished(self) -> bool:
        idle = not any(worker.job for worker in self.pool.workers)
        return self.waiting is None and idle and not self.checks.unconcluded()

    def abandon(self) -> list[PendingJob]:
        """Ends what is running at once, and returns what the coordinator still waits for."""
        busy = [w for w in self.pool.workers if w.job]
        unfinished = [w.job for w in busy if w.job and not w.job.is_check]
        unfinished += self.checks.abandon()
        if self.waiting is not None:
            unfinished.append(self.waiting)
        self.waiting = None
        self.pool.stop_workers(busy)
        return unfinished

    # -- jobs and workers

    def request_job(self, client: Client) -> None:
        """Asks for a job if none waits for a worker and fewer than `workers` are carried out."""
        running = sum(w.job is not None and not w.job.is_check for w in self.pool.workers)
        if self.waiting is not None or running >= client.workers:
            return
        job = client.next_job()
        if job is None:
            return
        work = PendingJob(job, client.report, client.ended)
        if job.on_every_node:
            self.checks.add(work)
        else:
            self.waiting = work

    def adjust_pool(self, workers: int) -> None:
        """Start workers for the waiting job and for checks. Stop surplus idle workers."""
        self.pool.start_workers(workers if self.waiting else 0, self.checks.due_nodes())
        if not self.checks.unconcluded():
            self.pool.stop_idle(workers)

    def assign_jobs(self, client: Client) -> None:
        """Gives each idle worker a check if its node has one before it, else the job that waits."""
        for worker in [w for w in self.pool.workers if w.is_idle]:
            work = self.next_work(worker, client)
            if work is not None:
                self.start(worker, work)

    def next_work(self, worker: PoolWorker, client: Client) -> PendingJob | None:
        check = self.checks.next_for(worker.node)
        if check is not None:
            return self.checks.begin(check, worker.node)
        self.request_job(client)
        work, self.waiting = self.waiting, None
        return work

    def start(self, worker: PoolWorker, work: PendingJob) -> None:
        worker.job, worker.token = work, uuid.uuid4().hex
        worker.preparation = self.sync.prepare(worker.actor, worker.node, work.job)
        if worker.preparation is None:
            self.stream(worker, [])

    def stream(self, worker: PoolWorker, keeping: list[str]) -> None:
        """Begins a job, whose files are there by now."""
        assert worker.job is not None
        job, worker.preparation = worker.job.job, None
        name = f"the worker on node {worker.node.name}"
        worker.watch = Watch(name, self.silence, job.stall, starting=True)
        worker.stream = worker.actor.run_job.options(num_returns="streaming").remote(
            job, worker.token, keeping, self.silence / HEARTBEATS
        )

    def finish(self, worker: PoolWorker, outcome: Outcome) -> None:
        work = worker.job
        worker.job, worker.stream, worker.preparation, worker.token = None, None, None, ""
        if work is not None:
            work.on_end(work.job, outcome)

    def lose(self, worker: PoolWorker, outcome: Outcome) -> None:
        if worker in self.pool.workers:
            self.pool.workers.remove(worker)
        self.ray.kill(worker.actor)  # if it lives after all, it must not go on
        self.finish(worker, outcome)

    def lose_workers_of_lost_nodes(self) -> None:
        for worker in self.pool.refresh_nodes():
            self.lose(worker, node_lost_outcome(worker.node))

    def give_up_unresponsive(self, passed: float) -> None:
        """Give up silent workers and hung jobs. `passed`: seconds since the last call."""
        for worker in [w for w in self.pool.workers if w.stream is not None]:
            outcome = worker.watch.passed(passed)
            if outcome is not None:
                self.lose(worker, outcome)

    # -- messages

    def listen(self) -> None:
        """Waits a moment for messages, greetings and synced files, and takes what is there."""
        waiting = {w.greeting if w.greeting is not None else w.stream: w for w in self.pool.workers}
        waiting.pop(None, None)
        if waiting:
            self.ray.wait(list(waiting), num_returns=1, timeout=POLL, fetch_local=False)
            ready, _ = self.ray.wait(
                list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False
            )
            for reference in ready:
                self.receive(waiting[reference])
        else:
            time.sleep(POLL)
        for worker in [
            w for w in self.pool.workers if w.preparation is not None and w.preparation.done()
        ]:
            self.end_sync(worker)

    def end_sync(self, worker: PoolWorker) -> None:
        """The files of a job are on its node, or could not be brought there."""
        try:
            self.stream(worker, worker.preparation.result())
        except TunerError as error:
            self.finish(worker, refused(error))
        except self.ray.exceptions.RayError as error:
            self.lose(worker, self.pool.loss_outcome(worker, error))

    def receive(self, worker: PoolWorker) -> None:
        """Takes a worker's greeting, or one message of its job."""
        if worker not in self.pool.workers:  # lost a moment ago
            return
        errors, greeted = self.ray.exceptions, worker.greeting is None
        try:
            message = self.ray.get(next(worker.stream) if greeted else worker.greeting)
        except StopIteration:
            worker.stream = None
        except errors.RayTaskError as error:  # what a job returned cannot travel
            reason = str(error).strip().splitlines()[-1][:300]
            self.finish(worker, Outcome("failed", reason=reason, traceback=str(error)))
        except errors.RayError as error:
            if not greeted:
                self.pool.start_failed(worker, error)
            self.lose(worker, self.pool.loss_outcome(worker, error))
        else:
            if greeted:
                self.handle(worker, *message)
            else:
                self.pool.accept_worker(worker, message)

    def handle(self, worker: PoolWorker, kind: str, token: str, value: Any) -> None:
        """One message of a job; one with another token is of a job that was given up."""
        work = worker.job
        if work is None or token != worker.token:
            return
        worker.watch.alive()
        if kind == "report":
            worker.watch.reported(value)
            worker.actor.receive_answer.remote(token, work.on_report(work.job, value))
        elif kind == "ended":
            self.finish(worker, value)
        elif kind != "alive":
            self.sync.receive_changes(work.job, kind, *value)
