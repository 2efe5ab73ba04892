"""Weights & Biases: a run a trial, in a group for the study.

Runs are kept offline in the study's `wandb/`, unless WANDB_MODE says otherwise; `wandb sync
studies/NAME/wandb/offline-run-*` sends them. The project is WANDB_PROJECT, or `tuner`.
"""

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

PACKAGE = "wandb"


def start(study: TrackedStudy) -> "WandbTracker":
    return WandbTracker(study)


class WandbTracker:
    """A trial that is continued has the same run id, so W&B continues its run, or joins the parts
    when they are sent.
    """

    def __init__(self, study: TrackedStudy) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing leaves this machine
        import wandb

        self.wandb: Any = wandb
        self.study = study
        own_folder(study, "wandb")  # W&B's own name for what it makes in `dir`
        self.runs: dict[str, Any] = {}  # run's key -> W&B's run

    def log_epoch(self, run: TrackedRun, epoch: Epoch) -> None:
        self._run(run).log(epoch_values(epoch), step=epoch.number)

    def end_run(self, run: TrackedRun, end: RunEnd) -> None:
        tracked = self._run(run)
        images = {name: self.wandb.Image(image) for name, image in open_pictures(end.files).items()}
        if images:
            tracked.log(images, step=end.steps)
        tracked.summary.update({**end.scores, "state": end.state, "reason": end.reason})
        tracked.finish(exit_code=int(end.state == "failed"))
        del self.runs[run.key]

    def close(self) -> None:
        for run in self.runs.values():
            run.finish()

    def _run(self, run: TrackedRun) -> Any:
        if run.key not in self.runs:
            self.runs[run.key] = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tuner"),
                group=self.study.name,
                name=f"{self.study.name} {run.title}",
                id=f"{self.study.identifier}-{run.key}",
                config={"trial": run.number, **run.params, **self.study.settings},
                mode=os.environ.get("WANDB_MODE", "offline"),
                dir=str(self.study.folder),
                resume="allow",
                reinit="create_new",  # several trials run at once
                settings=self.wandb.Settings(
                    console="off", silent=True, x_disable_stats=True, disable_git=True
                ),
            )
        return self.runs[run.key]
