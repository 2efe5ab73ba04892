"""Jobs that every node carries out before it gets another: their values must be equal."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tuner.engines import _ray_cluster
from tuner.engines._job_runner import refused
from tuner.engines._ray_cluster import Node
from tuner.engines._worker_pool import PendingJob, WorkerPool
from tuner.errors import DataError
from tuner.jobs import Job, Outcome

STRIKES = 3  # workers that a node may lose in one check
TAKEN = 30.0  # seconds after which a node whose cores others have is not waited for


@dataclass(eq=False)
class Check:
    """One such job. `concluded`: the coordinator has its value.

    Nodes that join later are still checked.
    """

    work: PendingJob
    passed: dict[str, str] = field(default_factory=dict)  # node id -> name
    running: set[str] = field(default_factory=set)  # node ids
    lost: Counter[str] = field(default_factory=Counter)  # node id -> workers that died of it
    first: Outcome | None = None  # of the first node that passed
    concluded: bool = False


class NodeChecks:
    def __init__(self, ray: Any, pool: WorkerPool, ship: bool) -> None:
        self.ray, self.pool, self.ship = ray, pool, ship
        self.checks: list[Check] = []

    def add(self, work: PendingJob) -> None:
        self.checks.append(Check(replace(work, is_check=True)))

    def unconcluded(self) -> list[Check]:
        return [check for check in self.checks if not check.concluded]

    def due_nodes(self) -> set[str]:
        """The ids of the nodes that somebody waits for."""
        checks = self.unconcluded()
        return {n.id for n in self.pool.usable_nodes() if any(n.id not in c.passed for c in checks)}

    def next_for(self, node: Node) -> Check | None:
        """The first check that a node has not passed; until then it gets no other job."""
        return next((check for check in self.checks if node.id not in check.passed), None)

    def begin(self, check: Check, node: Node) -> PendingJob | None:
        """What a worker on this node is to do for a check; None where another worker does it."""
        if node.id in check.running:
            return None
        check.running.add(node.id)
        return replace(check.work, on_end=partial(self.end, check, node))

    def end(self, check: Check, node: Node, job: Job, outcome: Outcome) -> None:
        """A check ended on a node."""
        check.running.discard(node.id)
        if outcome.kind == "done" and (check.first is None or check.first.value == outcome.value):
            check.first = check.first or outcome
            check.passed[node.id] = node.name
            return
        if outcome.kind == "lost":
            check.lost[node.id] += 1
            there = node.id in _ray_cluster.live_nodes(self.ray)
            if check.lost[node.id] < STRIKES or not there:
                return  # the node is asked again, if it is there
        failure = self.failure(check, node, outcome)
        if check.concluded:
            self.pool.exclude_node(node, "; ".join(failure.problems) or failure.reason)
        else:
            self.checks.remove(check)
            check.work.on_end(job, failure)

    def failure(self, check: Check, node: Node, outcome: Outcome) -> Outcome:
        """Return what is wrong with a node: its value differs, or the job failed there."""
        if outcome.kind == "done":
            first = next(iter(check.passed.values()))
            difference = f"nodes {first} and {node.name} find different data at the same paths"
            return refused(DataError(f"{difference}; copy one over the other"))
        if len(self.pool.usable_nodes()) == 1:
            return outcome
        unshipped = check.work.job.folders_needed and not self.ship
        hint = "; engine.ship: true sends what a node lacks" if unshipped else ""
        problems = tuple(f"{problem} (on node {node.name}{hint})" for problem in outcome.problems)
        reason = outcome.reason if problems else f"on node {node.name}: {outcome.reason}"
        return replace(outcome, problems=problems, reason=reason)

    def conclude(self) -> None:
        """Tell the coordinator the value of each check that all nodes have passed.

        Nodes whose cores are used by others are not waited for.
        """
        for check in self.unconcluded():
            if check.first is None:
                continue
            missing = {n.id for n in self.pool.usable_nodes() if n.id not in check.passed}
            blocked = {
                w.node.id
                for w in self.pool.workers
                if w.greeting is not None and time.monotonic() - w.started_at > TAKEN
            }
            if missing <= blocked:
                check.concluded = True
                check.work.on_end(check.work.job, check.first)

    def abandon(self) -> list[PendingJob]:
        """Forgets the checks that are not concluded, and returns their jobs."""
        works = [check.work for check in self.unconcluded()]
        self.checks = [check for check in self.checks if check.concluded]
        for check in self.checks:
            check.running.clear()
        return works
