"""What listens to a search: the console, the writer of the dashboard's files, the trackers."""

from optuna.trial import FrozenTrial, Trial

from tuner.commands.console import Console
from tuner.commands.tracking import Tracking
from tuner.config.run import Run
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.messages import Epoch, TrialResult
from tuner.search.running_trial import RunningTrial
from tuner.search.time_left import TimeLeft


class CombinedListener:
    """A `SearchListener` that passes events to the console and the trackers, and results to the
    dashboard's files.
    """

    def __init__(
        self,
        console: Console,
        artifacts: ArtifactWriter,
        tracking: Tracking,
        time_left: TimeLeft | None = None,
    ) -> None:
        self.console, self.artifacts, self.tracking = console, artifacts, tracking
        self.time_left = time_left

    def on_trial_start(self, running: RunningTrial) -> None:
        self.console.on_trial_start(running)

    def on_epoch(self, running: RunningTrial, epoch: Epoch) -> None:
        if self.time_left is not None:
            self.time_left.on_epoch(running, epoch)
        self.console.on_epoch(running, epoch)
        self.tracking.on_epoch(running, epoch)

    def on_trial_end(self, trial: FrozenTrial, run: Run, result: TrialResult | None) -> None:
        if self.time_left is not None:
            self.time_left.on_trial_end(trial.number, run, result.seconds if result else 0.0)
        self.console.on_trial_end(trial, run, result)
        self.tracking.on_trial_end(trial, result)

    def save_artifacts(self, trial: Trial, run: Run, result: TrialResult) -> None:
        self.artifacts.save_artifacts(trial, run, result)
