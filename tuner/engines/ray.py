"""Jobs on the nodes of a Ray cluster. The coordinator stays here; a slot is an actor, and keeps torch, data and caches between jobs.

Nodes that join are used once they have passed the checks (jobs that are carried out everywhere); a node that goes, or a worker
that dies, costs its job an attempt. Nothing is restarted by Ray: the coordinator decides what is tried again.
"""

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tuner.config.run import Engine
from tuner.engines import _ray_cluster
from tuner.engines._file_sync import Errands
from tuner.engines._ray_cluster import Node
from tuner.engines._worker_pool import STRIKES, Crew, Work, Worker, gone
from tuner.errors import TunerError
from tuner.jobs import Carry, GoOn, Job, NextJob, OnEnd, OnReport, Outcome

POLL = 0.2  # seconds between looks at `go_on`
TAKEN = 30.0  # seconds after which a node whose cores others have is not waited for


@dataclass(eq=False)
class Check:
    """A job that every node carries out before it gets another. The values must be equal."""

    work: Work
    passed: dict[str, str] = field(default_factory=dict)  # node id -> name
    running: set[str] = field(default_factory=set)
    lost: Counter[str] = field(default_factory=Counter)  # node id -> workers that died of it
    found: Outcome | None = None  # of the first that passed
    over: bool = False  # the coordinator has been told


@contextlib.contextmanager
def run(
    engine: Engine = Engine(name="ray"), warn: Callable[[str], None] = lambda _: None
) -> Iterator[Carry]:
    """Slots live as long as the `with` block, and so does a cluster that was started for it. Raises StorageError."""
    with _ray_cluster.connected(engine) as ray:
        fleet = Fleet(ray, engine, warn)
        try:
            yield fleet.carry
        finally:
            fleet.crew.dismiss(list(fleet.crew.workers))
            fleet.errands.close()


class Fleet:
    def __init__(self, ray: Any, engine: Engine, warn: Callable[[str], None]) -> None:
        self.ray, self.engine = ray, engine
        self.crew, self.errands = Crew(ray, engine, warn), Errands(ray, engine.ship)
        self.checks: list[Check] = []
        self.held: Work | None = None  # asked for, and waiting for a slot

    def carry(
        self, jobs: NextJob, report: OnReport, ended: OnEnd, go_on: GoOn, workers: int
    ) -> None:
        """Carries out jobs until there are none, `workers` at a time. Raises StorageError when the cluster is gone."""

        def another() -> bool:
            if self.held is None and self.busy() < workers and (job := jobs()) is not None:
                self.held = Work(job, report, ended)
            return self.held is not None

        try:
            while go_on():
                for worker in self.crew.look():
                    self.lose(worker, gone(worker.node))
                if another() and self.held is not None and self.held.job.everywhere:
                    self.checks.append(Check(replace(self.held, check=True)))
                    self.held = None
                open_checks = [c for c in self.checks if not c.over]
                if (
                    self.held is None
                    and not open_checks
                    and not any(w.work for w in self.crew.workers)
                ):
                    return
                due = {
                    n.id
                    for n in self.crew.usable()
                    if any(n.id not in c.passed for c in open_checks)
                }
                self.crew.hire(workers if self.held else 0, due)
                if not open_checks:
                    self.crew.release(workers)
                self.hand_out(another)
                self.listen()
                self.settle()
        except BaseException:
            self.abandon()
            raise
        for work in self.abandon():
            work.ended(work.job, Outcome("lost", reason="interrupted", cause="interrupted"))

    def busy(self) -> int:
        return sum(w.work is not None and not w.work.check for w in self.crew.workers)

    def abandon(self) -> list[Work]:
        """Ends what is running at once, and returns what the coordinator still waits for."""
        busy = [w for w in self.crew.workers if w.work]
        works = [w.work for w in busy if w.work and not w.work.check] + [
            c.work for c in self.checks if not c.over
        ]
        works += [self.held] if self.held else []
        self.held, self.checks = None, [c for c in self.checks if c.over]
        for check in self.checks:
            check.running.clear()
        self.crew.dismiss(busy)
        return works

    # -- work

    def hand_out(self, another: Callable[[], bool]) -> None:
        """A check for each node that has one before it, then a job for each idle slot."""
        for worker in [w for w in self.crew.workers if w.idle]:
            check = next((c for c in self.checks if worker.node.id not in c.passed), None)
            if check is None:
                if not another() or self.held is None or self.held.job.everywhere:
                    continue
                work, self.held = self.held, None
                self.start(worker, work)
            elif worker.node.id not in check.running:
                check.running.add(worker.node.id)
                self.start(worker, replace(check.work, ended=self.checked(check, worker.node)))

    def start(self, worker: Worker, work: Work) -> None:
        worker.work, worker.token = work, uuid.uuid4().hex
        worker.errand = self.errands.before(worker.actor, worker.node, work.job)
        if worker.errand is None:
            self.begin(worker, [])

    def begin(self, worker: Worker, keeping: list[str]) -> None:
        assert worker.work is not None
        worker.errand = None
        worker.stream = worker.actor.carry.options(num_returns="streaming").remote(
            worker.work.job, worker.token, keeping
        )

    def listen(self) -> None:
        """Waits a moment for messages, greetings and errands, and takes what is there."""
        waiting = {w.greeting if w.greeting is not None else w.stream: w for w in self.crew.workers}
        waiting.pop(None, None)
        if waiting:
            self.ray.wait(list(waiting), num_returns=1, timeout=POLL, fetch_local=False)
            ready, _ = self.ray.wait(
                list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False
            )
            for reference in ready:
                self.hear(waiting[reference])
        else:
            time.sleep(POLL)
        for worker in [w for w in self.crew.workers if w.errand is not None and w.errand.done()]:
            try:
                self.begin(worker, worker.errand.result())
            except TunerError as error:
                self.finish(
                    worker,
                    Outcome(
                        "refused",
                        reason=type(error).__name__,
                        problems=tuple(error.problems),
                        code=error.code,
                    ),
                )
            except self.ray.exceptions.RayError as error:
                self.lose(worker, self.crew.death(worker, error))

    def hear(self, worker: Worker) -> None:
        if worker not in self.crew.workers:  # given up a moment ago
            return
        errors, greeted = self.ray.exceptions, worker.greeting is None
        try:
            message = self.ray.get(next(worker.stream) if greeted else worker.greeting)
        except StopIteration:
            worker.stream = None
        except errors.RayTaskError as error:  # what a job returned cannot travel
            self.finish(
                worker,
                Outcome(
                    "failed", reason=str(error).strip().splitlines()[-1][:300], trace=str(error)
                ),
            )
        except errors.RayError as error:
            if not greeted:
                self.crew.unborn(worker, error)
            self.lose(worker, self.crew.death(worker, error))
        else:
            if greeted:
                self.take(worker, *message)
            else:
                self.crew.welcome(worker, message)

    def take(self, worker: Worker, kind: str, token: str, value: Any) -> None:
        """One message of a job; one with another token is of a job that was given up."""
        work = worker.work
        if work is None or token != worker.token:
            return
        if kind == "report":
            worker.actor.answer.remote(token, work.report(work.job, value))
        elif kind == "ended":
            self.finish(worker, value)
        else:
            self.errands.arrived(work.job, kind, *value)

    def finish(self, worker: Worker, outcome: Outcome) -> None:
        work, worker.work, worker.stream, worker.errand, worker.token = (
            worker.work,
            None,
            None,
            None,
            "",
        )
        if work is not None:
            work.ended(work.job, outcome)

    def lose(self, worker: Worker, outcome: Outcome) -> None:
        if worker in self.crew.workers:
            self.crew.workers.remove(worker)
        self.ray.kill(worker.actor)  # if it lives after all, it must not go on
        self.finish(worker, outcome)

    # -- checks

    def checked(self, check: Check, node: Node) -> OnEnd:
        """Who hears how a check ended on a node."""

        def ended(job: Job, outcome: Outcome) -> None:
            check.running.discard(node.id)
            check.lost[node.id] += outcome.kind == "lost"
            if outcome.kind == "lost" and (
                check.lost[node.id] < STRIKES or node.id not in _ray_cluster.nodes(self.ray)
            ):
                return  # it is asked again, if it is still there
            if outcome.kind == "done" and (
                check.found is None or check.found.value == outcome.value
            ):
                check.found = check.found or outcome
                check.passed[node.id] = node.name
                return
            bad = self.worded(check, node, outcome)
            if check.over:
                self.crew.leave_out(node, "; ".join(bad.problems) or bad.reason)
            else:
                self.checks.remove(check)
                check.work.ended(job, bad)

        return ended

    def worded(self, check: Check, node: Node, outcome: Outcome) -> Outcome:
        """What a node found, or that it disagrees with the others, with the node's name where there are several."""
        if outcome.kind == "done":
            others = f"nodes {next(iter(check.passed.values()))} and {node.name} find different data at the same paths"
            return Outcome(
                "refused",
                reason="DataError",
                problems=(f"{others}; copy one over the other",),
                code=3,
            )
        if len(self.crew.usable()) == 1:
            return outcome
        hint = (
            "; engine.ship: true sends what a node lacks"
            if check.work.job.folders and not self.engine.ship
            else ""
        )
        problems = tuple(f"{problem} (on node {node.name}{hint})" for problem in outcome.problems)
        return replace(
            outcome,
            problems=problems,
            reason=outcome.reason if problems else f"on node {node.name}: {outcome.reason}",
        )

    def settle(self) -> None:
        """Ends a check once every node has passed it but those whose cores others have."""
        for check in [c for c in self.checks if not c.over and c.found is not None]:
            left = [n.id for n in self.crew.usable() if n.id not in check.passed]
            pending = {
                w.node.id
                for w in self.crew.workers
                if w.greeting is not None and time.monotonic() - w.since > TAKEN
            }
            if set(left) <= pending and check.found is not None:
                check.over = True
                check.work.ended(check.work.job, check.found)
