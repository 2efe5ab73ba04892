"""Jobs in the coordinator's own process, one after another: for debugging and tests."""

import contextlib
from collections.abc import Iterator

from tuner.engines._worker import carry_out
from tuner.jobs import Carry, GoOn, NextJob, OnEnd, OnReport


@contextlib.contextmanager
def run() -> Iterator[Carry]:
    yield carry


def carry(jobs: NextJob, report: OnReport, ended: OnEnd, go_on: GoOn, workers: int) -> None:
    """Carries out jobs until there are none, one at a time whatever `workers` says."""
    while go_on() and (job := jobs()) is not None:
        ended(job, carry_out(job, lambda value, job=job: report(job, value), 0))  # type: ignore[misc]
