"""Jobs in the coordinator's own process, one after another: for debugging and tests."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tuner.config.run import Engine
from tuner.engines._job_runner import carry_out
from tuner.jobs import Carry, GoOn, Job, NextJob, OnEnd, OnReport


@contextlib.contextmanager
def run(engine: Engine = Engine(), warn: Callable[[str], None] = lambda _: None) -> Iterator[Carry]:
    if engine.stall not in ("auto", "never"):
        warn(
            f"engine.stall: {engine.stall} has no effect with engine.name: inline, "
            "which cannot end a training that hangs"
        )
    yield carry


def carry(jobs: NextJob, report: OnReport, ended: OnEnd, go_on: GoOn, workers: int) -> None:
    """Carries out jobs until there are none, one at a time whatever `workers` says."""
    while go_on() and (job := jobs()) is not None:
        hearing = Hearing(job, report)
        outcome = carry_out(job, hearing, 0)
        if hearing.error is not None:
            raise hearing.error
        ended(job, outcome)


class Hearing:
    """Hands reports on. What fails in the coordinator is kept for it, and not taken for a failure of the job."""

    def __init__(self, job: Job, report: OnReport) -> None:
        self.job, self.report = job, report
        self.error: Exception | None = None

    def __call__(self, value: Any) -> bool:
        try:
            return self.report(self.job, value)
        except Exception as error:
            self.error = error
            return False
