"""Jobs in the coordinator's own process, one after another: for debugging and tests."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tuner.config.run import EngineSettings
from tuner.engines._job_runner import run_job
from tuner.jobs import Job, NextJob, OnEnd, OnReport, RunJobs, ShouldContinue


@contextlib.contextmanager
def run(
    engine: EngineSettings = EngineSettings(), warn: Callable[[str], None] = lambda _: None
) -> Iterator[RunJobs]:
    if engine.stall not in ("auto", "never"):
        warn(
            f"engine.stall: {engine.stall} has no effect with engine.name: inline, "
            "which cannot end a training that hangs"
        )
    yield run_jobs


def run_jobs(
    next_job: NextJob,
    on_report: OnReport,
    on_end: OnEnd,
    should_continue: ShouldContinue,
    workers: int,
) -> None:
    """Carries out jobs until there are none, one at a time whatever `workers` says."""
    while should_continue() and (job := next_job()) is not None:
        hearing = ReportHandler(job, on_report)
        outcome = run_job(job, hearing, 0)
        if hearing.error is not None:
            raise hearing.error
        on_end(job, outcome)


class ReportHandler:
    """Passes reports on. It keeps an error of the coordinator, which is no failure of the job."""

    def __init__(self, job: Job, on_report: OnReport) -> None:
        self.job, self.report = job, on_report
        self.error: Exception | None = None

    def __call__(self, value: Any) -> bool:
        try:
            return self.report(self.job, value)
        except Exception as error:
            self.error = error
            return False
