"""What a worker does with a job, in whichever process it is."""

import importlib
import traceback
from collections.abc import Callable
from typing import Any

from tuner.errors import TunerError
from tuner.jobs import Job, Outcome


def run_job(job: Job, report: Callable[[Any], bool], slot: int) -> Outcome:
    """Call the job's function.

    Every exception becomes an outcome, because a job that fails must not end its worker.
    """
    module, _, function = job.function.partition(":")
    try:
        return Outcome(
            "done", getattr(importlib.import_module(module), function)(job.argument, report, slot)
        )
    except TunerError as error:
        return refused(error)
    except Exception as error:
        return failure(error)


def refused(error: TunerError) -> Outcome:
    return Outcome(
        "refused", reason=type(error).__name__, problems=tuple(error.problems), exit_code=error.code
    )


def failure(error: Exception) -> Outcome:
    """How a job that raised ended; called where the exception is handled."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return Outcome(
        "failed", reason=f"{type(error).__name__}: {first}"[:300], traceback=traceback.format_exc()
    )
