"""Trackers as users write them: one keeps what it is told, the others fail or hang."""

import threading
from typing import Any

from tuner.api import Epoch, RunEnd, TrackedRun, TrackedStudy

TOLD: list[tuple[Any, ...]] = []  # what `Recording` trackers were told, in order
RELEASED = threading.Event()  # what `hang` waits for


class Recording:
    def __init__(self, study: TrackedStudy) -> None:
        TOLD.append(("study", study))

    def log_epoch(self, run: TrackedRun, epoch: Epoch) -> None:
        TOLD.append(("epoch", run, epoch.number, epoch.scores["accuracy"]))

    def end_run(self, run: TrackedRun, end: RunEnd) -> None:
        TOLD.append(("end", run, end))

    def close(self) -> None:
        TOLD.append(("close",))


class Failing(Recording):
    def log_epoch(self, run: TrackedRun, epoch: Epoch) -> None:
        raise OSError("the server is on fire\nand more")


def hang(study: TrackedStudy) -> Recording:
    RELEASED.wait(20)
    return Recording(study)
