"""The slots on a cluster's nodes: hired where there is room, greeted, given up when they or their node die."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tuner
from tuner.config.run import Engine
from tuner.engines import _ray_cluster
from tuner.engines._ray_cluster import Node
from tuner.engines._ray_worker import FAREWELL, Slot
from tuner.engines._watch import SILENCE, Watch
from tuner.errors import StorageError
from tuner.jobs import Job, OnEnd, OnReport, Outcome

LOOK = 1.0  # seconds between looks at the cluster
GRACE = 15.0  # seconds in which a node may fail to start slots: one that has just gone is still listed for a while, one that comes too soon


@dataclass
class Work:
    """A job, and who hears of it. `check`: it is carried out on every node."""

    job: Job
    report: OnReport
    ended: OnEnd
    check: bool = False


@dataclass(eq=False)
class Worker:
    """A slot as the coordinator sees it: hired, greeted, idle or busy. Only messages with its token are of its work."""

    actor: Any
    node: Node
    greeting: Any  # a reference, until it has been answered
    since: float
    work: Work | None = None
    token: str = ""
    stream: Any = None
    errand: Any = None  # a future: what is done before the job starts
    watch: Watch = field(default_factory=lambda: Watch("worker", SILENCE, None))

    @property
    def idle(self) -> bool:
        return self.greeting is None and self.work is None


def gone(node: Node) -> Outcome:
    return Outcome("lost", reason=f"node {node.name} is gone", cause="node")


class Crew:
    def __init__(self, ray: Any, engine: Engine, warn: Callable[[str], None]) -> None:
        self.ray, self.warn = ray, warn
        self.nodes = _ray_cluster.nodes(ray)
        there = list(self.nodes.values())
        _ray_cluster.fits(engine, there)
        self.cpus, self.gpus = engine.cpus_per_trial, _ray_cluster.gpus_wanted(engine, there)
        actor = ray.remote(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,
        )
        self.slot = actor(Slot)
        self.workers: list[Worker] = []
        self.left_out: set[str] = set()  # ids of nodes that failed a check
        self.failing: dict[
            str, tuple[float, float]
        ] = {}  # by node: since when slots do not start there, and the latest
        self.looked, self.waited = time.monotonic(), False
        self.proved = False  # a slot has been greeted: from now on a bad node is left out, and not the command's end

    def look(self) -> list[Worker]:
        """Learns which nodes are there; returns the workers whose node is gone."""
        if time.monotonic() - self.looked >= LOOK:
            self.looked, self.nodes = time.monotonic(), _ray_cluster.nodes(self.ray)
        return [w for w in self.workers if w.node.id not in self.nodes]

    def usable(self) -> list[Node]:
        return [
            n
            for n in self.nodes.values()
            if n.id not in self.left_out and n.room(self.cpus, self.gpus)
        ]

    def hire(self, wanted: int, due: set[str]) -> None:
        """One slot on each node of `due`, and more as long as there are fewer than `wanted` and a node has room."""
        usable = self.usable()
        if not usable and not self.waited:
            self.warn(
                "no node of the Ray cluster has room for a trial; waiting for one to join (Ctrl-C twice ends this)"
            )
        self.waited = not usable
        lately = (
            time.monotonic() - LOOK
        )  # a node that failed a moment ago is not asked again at once
        usable = [n for n in usable if n.id not in self.failing or self.failing[n.id][1] <= lately]
        taken = Counter(w.node.id for w in self.workers)
        for node in usable:
            if not taken[node.id] and node.id in due:
                self.add(node)
                taken[node.id] += 1
        while len(self.workers) < wanted:
            roomy = max(
                usable, key=lambda n: n.room(self.cpus, self.gpus) - taken[n.id], default=None
            )
            if roomy is None or taken[roomy.id] >= roomy.room(self.cpus, self.gpus):
                return
            self.add(roomy)
            taken[roomy.id] += 1

    def add(self, node: Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        actor = self.slot.options(scheduling_strategy=On(node.id, soft=False)).remote(
            os.getcwd(), sys.path, self.cpus, self.gpus
        )
        self.workers.append(Worker(actor, node, actor.greet.remote(), time.monotonic()))

    def welcome(self, worker: Worker, version: str) -> None:
        worker.greeting = None
        if version != tuner.__version__:
            self.leave_out(
                worker.node,
                f"it has tuner {version}, this machine {tuner.__version__}; install the same version on both",
            )
        else:
            self.proved = True
            self.failing.pop(worker.node.id, None)

    def unborn(self, worker: Worker, error: Exception) -> None:
        """A slot that did not start: tuner is not there, or the node fails in another way."""
        now = time.monotonic()
        since, _ = self.failing.get(worker.node.id, (now, now))
        self.failing[worker.node.id] = since, now
        last = str(error).strip().splitlines()[-1].strip()
        if "No module named 'tuner" in str(error):
            self.leave_out(
                worker.node,
                f"tuner is not installed there; install tuner {tuner.__version__} on every node",
            )
        elif now - since > GRACE and worker.node.id in self.nodes:
            self.leave_out(worker.node, f"slots do not start there: {last[:300]}")

    def leave_out(self, node: Node, reason: str) -> None:
        """Raises StorageError where nothing has worked yet."""
        if not self.proved:
            raise StorageError(f"engine: node {node.name}: {reason}")
        if node.id not in self.left_out:
            self.left_out.add(node.id)
            self.warn(f"node {node.name} is left out: {reason}")
        self.dismiss([w for w in self.workers if w.node.id == node.id and w.work is None])

    def death(self, worker: Worker, error: Exception) -> Outcome:
        """How a job ended whose worker is gone."""
        name, said = worker.node.name, str(error)
        if "node has died" in said or worker.node.id not in _ray_cluster.nodes(self.ray):
            return gone(worker.node)
        if isinstance(error, self.ray.exceptions.GetTimeoutError):
            return Outcome(
                "lost", reason=f"the worker on node {name} does not take files", cause="silent"
            )
        if isinstance(error, self.ray.exceptions.ActorUnavailableError):
            return Outcome(
                "lost", reason=f"the worker on node {name} cannot be reached", cause="died"
            )
        if isinstance(error, self.ray.exceptions.OutOfMemoryError) or "low on memory" in said:
            return Outcome(
                "lost",
                reason=f"the worker on node {name} was ended by Ray: the node ran out of memory",
                cause="memory",
            )
        return Outcome(
            "lost",
            reason=f"the worker on node {name} ended unexpectedly (out of memory?)",
            cause="died",
        )

    def release(self, wanted: int) -> None:
        """Gives back what is idle beyond `wanted`."""
        idle = [w for w in self.workers if w.work is None]
        self.dismiss(idle[: max(0, len(self.workers) - wanted)])

    def dismiss(self, workers: list[Worker]) -> None:
        """Ends slots: a busy one after a moment in which its job can remove its temporary files."""
        self.workers = [w for w in self.workers if w not in workers]
        farewells = [w.actor.end.remote() for w in workers if w.stream is not None]
        if farewells:
            self.ray.wait(farewells, num_returns=len(farewells), timeout=FAREWELL + 1)
        for worker in workers:
            worker.work, worker.token, worker.stream, worker.errand = None, "", None, None
            self.ray.kill(worker.actor)
