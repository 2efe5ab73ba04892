"""A trial that is being carried out, and what is notified of its progress."""

from dataclasses import dataclass
from typing import Protocol

from optuna.trial import FrozenTrial, Trial

from tuner.config.run import Run
from tuner.messages import Epoch, TrialResult


@dataclass
class RunningTrial:
    """A running trial of this coordinator."""

    trial: Trial
    run: Run
    proposal: int  # from 0; a retry has the proposal of its first attempt, and another number
    attempt: int  # from 1
    params_key: str  # of its parameters
    begun: int  # how many trials this process had begun, with this one
    is_default: bool = False  # the default recipe is never pruned: the others are compared with it
    killed: int = 0  # earlier attempts whose workers a memory limit ended
    refused: bool = False  # an earlier attempt was refused by its worker
    is_pruned: bool = False
    is_out_of_time: bool = False  # search.time has ended it
    trained_seconds: float = 0.0  # of all its epochs so far
    epoch_seconds: float = 0.0  # of its longest epoch
    is_scored: bool = False  # an epoch of it has a score

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def epochs(self) -> int:
        """The largest number of epochs that the trial has."""
        recipe = self.run.recipe
        return min(recipe.epochs, recipe.stop_epoch or recipe.epochs)


class SearchListener(Protocol):
    """What is notified of a search: the console, and the writer of the dashboard's artifacts."""

    def on_trial_start(self, trial: RunningTrial) -> None: ...
    def on_epoch(self, trial: RunningTrial, epoch: Epoch) -> None: ...
    def on_trial_end(self, trial: FrozenTrial, run: Run, result: TrialResult | None) -> None: ...
    def save_artifacts(self, trial: Trial, run: Run, result: TrialResult) -> None: ...
