"""What listens to a search: the console and the writer of the dashboard's files."""

from optuna.trial import FrozenTrial, Trial

from tuner.commands.console import Console
from tuner.config.run import Run
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.messages import Epoch, TrialResult
from tuner.search.running_trial import RunningTrial


class CombinedListener:
    """A `SearchListener` that passes events to the console and results to the dashboard's files."""

    def __init__(self, console: Console, artifacts: ArtifactWriter) -> None:
        self.console, self.artifacts = console, artifacts

    def on_epoch(self, running: RunningTrial, epoch: Epoch) -> None:
        self.console.on_epoch(running.trial.number, running.run.recipe.epochs, epoch)

    def on_trial_end(self, trial: FrozenTrial, run: Run, result: TrialResult | None) -> None:
        self.console.on_trial_end(trial, run, result)

    def save_artifacts(self, trial: Trial, run: Run, result: TrialResult) -> None:
        self.artifacts.save_artifacts(trial, run, result)
