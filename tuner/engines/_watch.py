"""When a worker is given up: it shows no sign of life, or its job makes no progress."""

import time
from dataclasses import dataclass
from typing import Any

from tuner.jobs import Outcome, Stall

POLL = 0.2  # seconds between looks at whether to go on
SILENCE = 120.0  # seconds without a sign of life after which a worker is given up
HEARTBEATS = 20  # signs of life in that time
# A worker that has shown no sign of life yet gets so many times as long: it may be reading torch
# from a slow disk.
STARTING = 10
AUTO_FACTOR = 10  # auto: times its longest wait for a report that a job may take for the next one
AUTO_MINIMUM = 3600.0  # auto: seconds that every job may take


class Clock:
    """The seconds between looks.

    Time in which the coordinator itself is stopped or busy does not count as a worker's silence.
    """

    def __init__(self) -> None:
        self.last = time.monotonic()

    def passed(self) -> float:
        before, self.last = self.last, time.monotonic()
        return min(self.last - before, 2 * POLL)


@dataclass
class Watch:
    """Counts how long a worker is silent, and how long its job reports nothing.

    With `stall: auto` a job is given up only between two of its reports. How long its first report
    may take is not known (downloads, a cache that is filled, a long epoch). A report may say by
    `seconds` how long its work took. A report that repeats an earlier attempt comes at once, and
    its `seconds` say how long the next report may take.
    """

    worker_name: str  # the worker, in the reason
    silence: float
    stall: Stall
    starting: bool = False
    silent: float = 0.0
    waiting: float = 0.0  # for the next report
    longest: float | None = None  # that a report took; None: there was none

    def alive(self) -> None:
        self.silent, self.starting = 0.0, False

    def reported(self, value: Any) -> None:
        self.alive()
        took = max(self.waiting, float(getattr(value, "seconds", 0.0)))
        self.longest, self.waiting = max(self.longest or 0.0, took), 0.0

    def passed(self, seconds: float) -> Outcome | None:
        """Counts seconds; the job's end where they are too many."""
        self.silent += seconds
        self.waiting += 0.0 if self.starting else seconds
        silence = self.silence * (STARTING if self.starting else 1)
        if self.silent > silence:
            return Outcome(
                "lost", reason=f"{self.worker_name} silent for {silence:g} s", loss_cause="silent"
            )
        timeout = self.report_timeout()
        if timeout is not None and self.waiting > timeout:
            reason = f"no progress for {round(timeout, 1):g} s (engine.stall)"
            return Outcome("lost", reason=reason, loss_cause="stalled")
        return None

    def report_timeout(self) -> float | None:
        """Seconds that the next report may take; None: any number."""
        if self.stall == "auto":
            return None if self.longest is None else max(AUTO_MINIMUM, AUTO_FACTOR * self.longest)
        return self.stall
