"""Trackio: a project with the study's name, in it a run a trial.

Everything stays in the study's `trackio/`, or where TRACKIO_DIR says; TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL send it elsewhere. `TRACKIO_DIR=studies/NAME/trackio trackio show` shows it.
"""

import contextvars
import importlib
import os
from typing import Any

from tuner.messages import Epoch
from tuner.trackers._tracked import (
    RunEnd,
    TrackedRun,
    TrackedStudy,
    epoch_values,
    open_pictures,
    own_folder,
)

PACKAGE = "trackio"
PRINTING_MODULES = ("trackio", "trackio.run", "trackio.utils")


def start(study: TrackedStudy) -> "TrackioTracker":
    return TrackioTracker(study)


class TrackioTracker:
    """A trial that is continued begins its run anew: all its epochs are told again."""

    def __init__(self, study: TrackedStudy) -> None:
        if "TRACKIO_DIR" not in os.environ:
            os.environ["TRACKIO_DIR"] = str(own_folder(study, "trackio").absolute())
        self.study = study
        self.trackio: Any = importlib.import_module("trackio")
        if str(self.trackio.TRACKIO_DIR) != os.environ["TRACKIO_DIR"]:
            raise RuntimeError(f"this process keeps its runs in {self.trackio.TRACKIO_DIR}")
        for name in PRINTING_MODULES:  # what it prints would tear the console's table and JSON
            vars(importlib.import_module(name))["print"] = lambda *words, **options: None
        self.runs: dict[str, Any] = {}  # run's key -> Trackio's run

    def log_epoch(self, run: TrackedRun, epoch: Epoch) -> None:
        self._run(run).log(epoch_values(epoch), step=epoch.number)

    def end_run(self, run: TrackedRun, end: RunEnd) -> None:
        tracked = self._run(run)
        images = {
            name: self.trackio.Image(image) for name, image in open_pictures(end.files).items()
        }
        values = {**end.scores, "state": end.state, "reason": end.reason, **images}
        tracked.log({name: value for name, value in values.items() if value != ""}, step=end.steps)
        tracked.finish()
        del self.runs[run.key]

    def close(self) -> None:
        for run in self.runs.values():
            run.finish()

    def _run(self, run: TrackedRun) -> Any:
        if run.key not in self.runs:
            self._remove_earlier(run.key)
            # in a context of its own, because `init` ends the run that its context has
            self.runs[run.key] = contextvars.Context().run(
                self.trackio.init,
                project=self.study.name,
                name=run.key,
                config={"trial": run.number, **run.params, **self.study.settings},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return self.runs[run.key]

    def _remove_earlier(self, name: str) -> None:
        """Remove the run of an earlier attempt from the files on this machine."""
        try:
            runs = list(self.trackio.Api().runs(self.study.name))
        except ValueError:  # the project does not exist yet
            return
        for run in runs:
            if run.name == name:
                run.delete()
