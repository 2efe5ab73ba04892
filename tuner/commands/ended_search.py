"""A search whose budget is spent, as a value: what the winner is made of."""

from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial

from tuner.commands.finishing_times import FinishingClock
from tuner.commands.session import Session
from tuner.search import history
from tuner.search.coordinator import Coordinator
from tuner.search.retraining import retraining_seconds


@dataclass(frozen=True)
class EndedSearch:
    """A search whose budget is spent: what the winner is made of.

    `split_sizes` are the numbers of training and validation examples. `workers`: how many carry
    out trials. `new_trials`: whether this command added any. `clock`: measures what follows the
    search.
    """

    session: Session
    coordinator: Coordinator
    folder: Path
    split_sizes: tuple[int, int]
    workers: int
    new_trials: bool
    clock: FinishingClock

    def has_time_for(self, seconds: float) -> bool:
        """Whether a training of so many seconds fits the time that `search.time` leaves."""
        return self.clock.has_time_for(seconds)

    def retraining_seconds(self, trial: FrozenTrial) -> float:
        """About how long a trial takes when it is trained again, on validation examples too."""
        study = self.coordinator.study
        run = history.run_of_trial(self.session.space, study, trial)
        return retraining_seconds(trial, run, history.train_share(study))

    def trained(self, seconds: float) -> None:
        """Notes that a training of about so many seconds was made."""
        self.clock.expected += seconds
