"""A trial that is being carried out, and who hears what becomes of it."""

from dataclasses import dataclass
from typing import Protocol

from optuna.trial import FrozenTrial, Trial

from tuner.config.run import Run
from tuner.messages import Epoch, TrialResult


@dataclass
class RunningTrial:
    """A running trial of this coordinator.

    `proposal` counts the search's first attempts: a retry has the proposal of its first attempt, and another number.
    `begun` counts the trials that this process began.
    """

    trial: Trial
    run: Run
    proposal: int
    attempt: int
    params_key: str  # of its parameters
    begun: int
    is_default: bool = False  # the default recipe is never pruned: the others are compared with it
    killed: int = 0  # earlier attempts whose workers a memory limit ended
    refused: bool = False  # an earlier attempt was refused by its worker
    is_pruned: bool = False

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def epochs(self) -> int:
        """How many epochs the trial has at most."""
        recipe = self.run.recipe
        return min(recipe.epochs, recipe.stop_epoch or recipe.epochs)


class SearchListener(Protocol):
    """Who is told what happens: the console, the dashboard's artifacts."""

    def on_epoch(self, trial: RunningTrial, epoch: Epoch) -> None: ...
    def on_trial_end(self, trial: FrozenTrial, run: Run, result: TrialResult | None) -> None: ...
    def save_artifacts(self, trial: Trial, run: Run, result: TrialResult) -> None: ...
