"""`search.time`: when a search must end so that the whole command ends in time.

After the last trial the best ones may be confirmed, the winner and the default recipe are trained
again, and the winner is tested and exported. How long these trainings take is known from the
trials; how long the finishing takes (tests, export, report) is remembered from earlier commands.
The sum is the reserve: no trial begins, and none goes on, that would touch it.

A trial that the time ends is complete with its best epoch so far, as one that early stopping has
ended. So the time that it took is not lost.

The default recipe may use up the reserve: one training that ended is worth more than two halves of
one. Its weights are then exported as its trial left them.
"""

import statistics
import time
from collections.abc import Callable
from math import ceil

import optuna
from optuna.trial import FrozenTrial

from tuner.config.space import Space
from tuner.search import history
from tuner.search.confirmation import settings_for
from tuner.search.retraining import retraining_seconds, training_seconds
from tuner.search.running_trial import RunningTrial
from tuner.search.winner_choice import choose_unconfirmed

SLACK = 0.02  # of the time: equal trainings do not take equally long
# From so many trials on, the one with the longest epochs does not count: the machine may have held
# it up, and by its epochs the search would end early.
ENOUGH_TRIALS = 4


class TimeLimit:
    """Says whether there is time for one more trial, or for one more epoch of a running one.

    Args:
        seconds: What `search.time` states.
        began: When the command began, by the clock.
        finishing: Seconds that tests, export and report take.
        workers: How many trials are carried out at once.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        seconds: float,
        began: float,
        finishing: float,
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self.began, self.finishing = seconds, began, finishing
        self.workers, self.clock = workers, clock
        self.trials: list[FrozenTrial] = []  # completed and trained, the best first
        self.trainings = 0.0  # seconds of the trainings after the search
        self.default_seconds = 0.0  # of the default recipe's training among them
        self.epoch_seconds = 0.0  # of all trials but one at most, with their preparation
        self.can_skip_retraining = False  # an export may have the weights of a trial

    def seconds_left(self) -> float:
        """Until the command must have ended; below 0 when it should have."""
        return self.began + self.seconds - self.clock()

    def fits(self, seconds: float) -> bool:
        """Whether so many seconds of work fit before the finishing."""
        return self.seconds_left() > seconds + self.finishing + SLACK * self.seconds

    def read_trials(self, study: optuna.Study, space: Space) -> None:
        """Learn from the trials that have ended how long trainings take."""
        search = space.settings.search
        self.can_skip_retraining = search.needs_no_weights and search.keep > 0
        ranked = [
            (rank, trial)
            for trial in history.completed_trials(study)
            if (rank := history.trial_rank(trial, study.direction))
            and "seconds" in trial.user_attrs
        ]
        self.trials = [trial for _, trial in sorted(ranked, key=lambda pair: pair[0])]
        if not self.trials:
            return
        ordered = sorted(_seconds_of_epoch(t) for t in self.trials)
        self.epoch_seconds = ordered[-2 if len(ordered) >= ENOUGH_TRIALS else -1]
        self.trainings = self._seconds_of_trainings(study, space)

    def has_time_for_trial(self) -> bool:
        """Whether another trial may begin: its first epoch fits, if it is no longer than usual.

        A longer one is ended, see `must_end_now`. The command needs one result, however late.
        """
        return not self.trials or self.fits(self.epoch_seconds + self.trainings)

    def has_time_for_epoch(self, running: RunningTrial, epochs_left: int) -> bool:
        """Whether a running trial may train one more epoch of those that are left.

        If it wins it is trained again, and that takes as long; the default recipe may do without,
        if it comes to its end in time. The command needs one result, however late.
        """
        if not self.trials and not running.is_scored:
            return True
        skips = running.is_default and self.can_skip_retraining
        if skips and self.fits(epochs_left * running.epoch_seconds):
            return True
        again = running.trained_seconds + running.epoch_seconds + self.default_seconds
        return self.fits(running.epoch_seconds + max(self.trainings, again))

    def must_end_now(self) -> bool:
        """Whether the finishing would be late, so that running epochs are not waited for."""
        return bool(self.trials) and self.seconds_left() < self.trainings + self.finishing

    def _seconds_of_trainings(self, study: optuna.Study, space: Space) -> float:
        """What follows the search, if it ends after one trial more."""
        search = space.settings.search
        confirm = settings_for(search, len(history.ended_proposals(study)) + 1)
        repeats, confirming = [], 0.0
        if confirm is not None:
            repeats = [
                training_seconds(trial, history.run_of_trial(space, study, trial))
                for trial in self.trials[: confirm.top]
            ]
            rounds = ceil(len(repeats) * confirm.repeats / max(1, self.workers))
            confirming = rounds * statistics.fmean(repeats)
        if not search.retrain:
            return confirming
        winner = choose_unconfirmed(study, space).winner
        default = history.default_trial(study)
        compares = search.compare == "default" and default is not None
        has_won = confirm is None and default is not None and default.number == winner.number

        def retraining(trial: FrozenTrial) -> float:
            run = history.run_of_trial(space, study, trial)
            return retraining_seconds(trial, run, history.train_share(study))

        self.default_seconds = retraining(default) if compares and default else 0.0
        beside = 0.0 if has_won else self.default_seconds
        return confirming + max([retraining(winner), *repeats]) + beside


def _seconds_of_epoch(trial: FrozenTrial) -> float:
    """An epoch of a trial with its share of what comes before the first one."""
    epochs = max(1, max(trial.intermediate_values, default=1))
    return float(trial.user_attrs["seconds"]) / epochs
