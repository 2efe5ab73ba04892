"""An engine: every job runs in a new process, one at a time. Nothing of a job stays in memory.

In a space file: `engine: {name: 'fresh_process:run'}`. It is slower than tuner's own `local`, whose
workers keep torch, data and models loaded. It needs Linux or macOS.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from tuner.api import (
    EngineSettings,
    Job,
    NextJob,
    OnEnd,
    OnReport,
    Outcome,
    RunJobs,
    ShouldContinue,
    run_job,
)

POLL_SECONDS = 0.2  # how often the engine asks whether it should continue
CHILD = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[2])  # so that the job's modules and those of plug-ins are found
import {__name__} as engine
engine.work(int(sys.argv[1]))
"""


@contextlib.contextmanager
def run(engine: EngineSettings, warn: Callable[[str], None]) -> Iterator[RunJobs]:
    """tuner enters this once for each command. Here an engine starts and ends what it needs."""
    if engine.stall not in ("auto", "never"):
        warn(f"engine.stall: {engine.stall} has no effect with this engine")
    yield run_jobs


def run_jobs(
    next_job: NextJob,
    on_report: OnReport,
    on_end: OnEnd,
    should_continue: ShouldContinue,
    workers: int,
) -> None:
    """Carries out jobs until there are none. At most `workers` may run at once; one always may."""
    # All four functions belong to the coordinator, and only this thread may call them.
    while should_continue() and (job := next_job()) is not None:
        on_end(job, run_in_new_process(job, on_report, should_continue))


def run_in_new_process(job: Job, on_report: OnReport, should_continue: ShouldContinue) -> Outcome:
    """Every job must end in exactly one outcome, however its process ends."""
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(theirs.fileno()), json.dumps(sys.path)],
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is for the coordinator, which then asks to stop
    )
    theirs.close()
    try:
        ours.send(job)
        while should_continue():
            if ours.poll(POLL_SECONDS):
                kind, value = ours.recv()
                if kind == "ended":
                    outcome: Outcome = value
                    return outcome
                # A report is an epoch, for example. The answer False asks the job to end.
                ours.send(on_report(job, value))
    except (EOFError, ConnectionError):
        return lost_outcome(process.wait())
    finally:  # also where on_report raises: that is the coordinator's error, and must reach it
        process.kill()
        process.wait()
        ours.close()
    return Outcome("lost", reason="interrupted", loss_cause="interrupted")


def lost_outcome(return_code: int) -> Outcome:
    """A job whose process died. tuner tries it again, at most `search.retries` times."""
    if return_code == -signal.SIGKILL:  # nobody here sent it: most likely a memory limit
        return Outcome("lost", reason="killed, perhaps by a memory limit", loss_cause="memory")
    return Outcome("lost", reason=f"ended with code {return_code}", loss_cause="died")


def work(descriptor: int) -> None:
    """What the new process does: one job."""
    coordinator = Connection(descriptor)

    def report(value: Any) -> bool:
        coordinator.send(("report", value))
        answer: bool = coordinator.recv()
        return answer

    # run_job turns what the job raises into an outcome. Its last argument is the worker's number.
    with contextlib.suppress(ConnectionError):  # the coordinator is gone
        coordinator.send(("ended", run_job(coordinator.recv(), report, 0)))
    os._exit(0)  # nothing here needs cleaning up, and torch takes a while to unload
