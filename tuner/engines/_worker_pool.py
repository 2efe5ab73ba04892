"""The workers on a cluster's nodes.

They are started where a node has room, and given up when they or their node die.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tuner
from tuner.config.run import EngineSettings
from tuner.engines import _ray_cluster
from tuner.engines._ray_cluster import Node
from tuner.engines._ray_worker import STOP_SECONDS, RayWorker
from tuner.engines._watch import SILENCE, Watch
from tuner.errors import StorageError
from tuner.jobs import Job, OnEnd, OnReport, Outcome

REFRESH_SECONDS = 1.0  # seconds between looks at the cluster
# Seconds in which a node may fail to start workers. A node that has just left is still listed for a
# while, and a node that joins is listed too soon.
START_GRACE_SECONDS = 15.0


@dataclass
class PendingJob:
    """A job and its callbacks. `is_check`: it is carried out on every node."""

    job: Job
    on_report: OnReport
    on_end: OnEnd
    is_check: bool = False


@dataclass(eq=False)
class PoolWorker:
    """A worker as the coordinator sees it: starting, idle or busy.

    Only messages with its token are of its job.
    """

    actor: Any
    node: Node
    greeting: Any  # a reference, until it has been answered
    started_at: float
    job: PendingJob | None = None
    token: str = ""
    stream: Any = None
    preparation: Any = None  # a future: what is done before the job starts
    watch: Watch = field(default_factory=lambda: Watch("worker", SILENCE, None))

    @property
    def is_idle(self) -> bool:
        return self.greeting is None and self.job is None


def node_lost_outcome(node: Node) -> Outcome:
    return Outcome("lost", reason=f"node {node.name} is gone", loss_cause="node")


class WorkerPool:
    def __init__(self, ray: Any, engine: EngineSettings, warn: Callable[[str], None]) -> None:
        self.ray, self.warn = ray, warn
        self.nodes = _ray_cluster.live_nodes(ray)
        there = list(self.nodes.values())
        _ray_cluster.check_capacity(engine, there)
        self.cpus, self.gpus = engine.cpus_per_trial, _ray_cluster.gpus_per_trial(engine, there)
        actor = ray.remote(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,
        )
        self.worker_class = actor(RayWorker)
        self.workers: list[PoolWorker] = []
        self.excluded_nodes: set[str] = set()  # ids of nodes that failed a check
        self.failing_nodes: dict[
            str, tuple[float, float]
        ] = {}  # by node: since when workers do not start there, and the latest
        self.last_refresh, self.warned_no_room = time.monotonic(), False
        # Once a worker has started, a node that fails is left out and does not end the command.
        self.any_started = False

    def refresh_nodes(self) -> list[PoolWorker]:
        """Learns which nodes are there; returns the workers whose node is gone."""
        if time.monotonic() - self.last_refresh >= REFRESH_SECONDS:
            self.last_refresh, self.nodes = time.monotonic(), _ray_cluster.live_nodes(self.ray)
        return [w for w in self.workers if w.node.id not in self.nodes]

    def usable_nodes(self) -> list[Node]:
        return [
            n
            for n in self.nodes.values()
            if n.id not in self.excluded_nodes and n.capacity(self.cpus, self.gpus)
        ]

    def start_workers(self, wanted: int, nodes_due: set[str]) -> None:
        """Start a worker on each node of `nodes_due`, and up to `wanted` in all as room allows."""
        usable = self.usable_nodes()
        if not usable and not self.warned_no_room:
            self.warn(
                "no node of the Ray cluster has room for a trial; waiting for one to join "
                "(Ctrl-C twice ends this)"
            )
        self.warned_no_room = not usable
        lately = (
            time.monotonic() - REFRESH_SECONDS
        )  # a node that failed a moment ago is not asked again at once
        usable = [
            n
            for n in usable
            if n.id not in self.failing_nodes or self.failing_nodes[n.id][1] <= lately
        ]
        taken = Counter(w.node.id for w in self.workers)
        for node in usable:
            if not taken[node.id] and node.id in nodes_due:
                self.start_worker(node)
                taken[node.id] += 1
        while len(self.workers) < wanted:
            roomy = max(
                usable, key=lambda n: n.capacity(self.cpus, self.gpus) - taken[n.id], default=None
            )
            if roomy is None or taken[roomy.id] >= roomy.capacity(self.cpus, self.gpus):
                return
            self.start_worker(roomy)
            taken[roomy.id] += 1

    def start_worker(self, node: Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        actor = self.worker_class.options(scheduling_strategy=On(node.id, soft=False)).remote(
            os.getcwd(), sys.path, self.cpus, self.gpus
        )
        self.workers.append(
            PoolWorker(actor, node, actor.report_version.remote(), time.monotonic())
        )

    def accept_worker(self, worker: PoolWorker, version: str) -> None:
        worker.greeting = None
        if version != tuner.__version__:
            self.exclude_node(
                worker.node,
                f"it has tuner {version}, this machine {tuner.__version__}; "
                "install the same version on both",
            )
        else:
            self.any_started = True
            self.failing_nodes.pop(worker.node.id, None)

    def start_failed(self, worker: PoolWorker, error: Exception) -> None:
        """Handle a worker that did not start: tuner is missing, or the node fails otherwise."""
        now = time.monotonic()
        since, _ = self.failing_nodes.get(worker.node.id, (now, now))
        self.failing_nodes[worker.node.id] = since, now
        last = str(error).strip().splitlines()[-1].strip()
        if "No module named 'tuner" in str(error):
            self.exclude_node(
                worker.node,
                f"tuner is not installed there; install tuner {tuner.__version__} on every node",
            )
        elif now - since > START_GRACE_SECONDS and worker.node.id in self.nodes:
            self.exclude_node(worker.node, f"workers do not start there: {last[:300]}")

    def exclude_node(self, node: Node, reason: str) -> None:
        """Raises StorageError where nothing has worked yet."""
        if not self.any_started:
            raise StorageError(f"engine: node {node.name}: {reason}")
        if node.id not in self.excluded_nodes:
            self.excluded_nodes.add(node.id)
            self.warn(f"node {node.name} is left out: {reason}")
        self.stop_workers([w for w in self.workers if w.node.id == node.id and w.job is None])

    def loss_outcome(self, worker: PoolWorker, error: Exception) -> Outcome:
        """How a job ended whose worker is gone."""
        name, said = worker.node.name, str(error)
        if "node has died" in said or worker.node.id not in _ray_cluster.live_nodes(self.ray):
            return node_lost_outcome(worker.node)
        if isinstance(error, self.ray.exceptions.GetTimeoutError):
            return Outcome(
                "lost", reason=f"the worker on node {name} does not take files", loss_cause="silent"
            )
        if isinstance(error, self.ray.exceptions.ActorUnavailableError):
            return Outcome(
                "lost", reason=f"the worker on node {name} cannot be reached", loss_cause="died"
            )
        if isinstance(error, self.ray.exceptions.OutOfMemoryError) or "low on memory" in said:
            return Outcome(
                "lost",
                reason=f"the worker on node {name} was ended by Ray: the node ran out of memory",
                loss_cause="memory",
            )
        return Outcome(
            "lost",
            reason=f"the worker on node {name} ended unexpectedly (out of memory?)",
            loss_cause="died",
        )

    def stop_idle(self, wanted: int) -> None:
        """Gives back what is idle beyond `wanted`."""
        idle = [w for w in self.workers if w.job is None]
        self.stop_workers(idle[: max(0, len(self.workers) - wanted)])

    def stop_workers(self, workers: list[PoolWorker]) -> None:
        """End workers; a busy one gets a moment in which its job removes its temporary files."""
        self.workers = [w for w in self.workers if w not in workers]
        farewells = [w.actor.stop.remote() for w in workers if w.stream is not None]
        if farewells:
            self.ray.wait(farewells, num_returns=len(farewells), timeout=STOP_SECONDS + 1)
        for worker in workers:
            worker.job, worker.token, worker.stream, worker.preparation = None, "", None, None
            self.ray.kill(worker.actor)
