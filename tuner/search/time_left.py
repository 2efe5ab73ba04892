"""How long a search goes on, by the model of costs with which `tuner plan` foretells it.

What an epoch costs at a freeze depth is learned from the trials. Depths that no trial had yet cost
what `tuner plan` has measured on this machine, if it has, or else what the nearest depth costs.
"""

import bisect
import functools
import statistics
from collections.abc import Mapping

from tuner.config.run import Run
from tuner.config.space import Space
from tuner.messages import Epoch, TrainingProfile
from tuner.search.running_trial import RunningTrial
from tuner.search.study_cost import draw_runs, expect_study

DRAWN_RUNS = 50  # for the cost of an average trial
LEAST_SHARE = 0.1  # of the time that trials would take if the pruner ended none


class TimeLeft:
    """Learns what trainings cost, and estimates how long the rest of the command takes.

    Args:
        space: The space.
        max_depths: How deep each model can be frozen, by the model's name.
        workers: How many trials are carried out at once.
        profiles: What `tuner plan` has measured, by the model's name.
    """

    def __init__(
        self,
        space: Space,
        max_depths: Mapping[str, int],
        workers: int,
        profiles: Mapping[str, TrainingProfile],
    ) -> None:
        self.space, self.max_depths, self.workers = space, max_depths, max(1, workers)
        # seconds of an epoch, by the model's name and the freeze depth: planned, or the median of
        # those that were measured, which are kept in order, as a search may have many thousands
        self.epoch_seconds: dict[tuple[str, int], float] = {}
        self.measured: dict[tuple[str, int], list[float]] = {}
        self.setups = [profile.setup_seconds for profile in profiles.values()]
        self.setup = statistics.median(self.setups) if self.setups else 0.0
        self.trained: dict[int, float] = {}  # seconds of the epochs of each running trial
        self.expected = self.taken = 0.0  # seconds of the trials that have ended
        for name, profile in profiles.items():
            for cost in profile.depths:
                seconds = profile.seconds_of_training(cost.depth, 1) - profile.setup_seconds
                self.epoch_seconds[name, cost.depth] = seconds

    def on_epoch(self, running: RunningTrial, epoch: Epoch) -> None:
        key = self._key(running.run)
        ordered = self.measured.setdefault(key, [])
        bisect.insort(ordered, epoch.seconds)
        half = len(ordered) // 2
        self.epoch_seconds[key] = (ordered[half] + ordered[~half]) / 2
        self.trained[running.number] = self.trained.get(running.number, 0.0) + epoch.seconds

    def on_trial_end(self, number: int, run: Run, seconds: float) -> None:
        """Learn from a trial that took so many seconds."""
        trained = self.trained.pop(number, 0.0)
        if trained:  # one that repeats another trial was not trained
            self.setups.append(max(0.0, seconds - trained))
            self.setup = statistics.median(self.setups)
            self.expected += self.seconds_of(run) or 0.0
            self.taken += max(seconds, trained)

    def estimate(self, trials_left: int, trial_count: int) -> float | None:
        """Return the seconds until the command ends, without tests and export.

        Args:
            trials_left: How many trials have not ended, those that run included.
            trial_count: How many trials the search has in all.

        Returns:
            None while nothing is known of any training.
        """
        costs = [seconds for run in self._runs if (seconds := self.seconds_of(run)) is not None]
        if not costs:
            return None
        share = max(LEAST_SHARE, self.taken / self.expected) if self.expected else 1.0
        left = expect_study(self.space, costs, costs[-1], trial_count, trials_left * share)
        return max(0.0, left.after + (left.trials - sum(self.trained.values())) / self.workers)

    def seconds_of(self, run: Run) -> float | None:
        """Return the seconds of a run's training; None while nothing is known of any."""
        name, depth = self._key(run)
        known = self.epoch_seconds
        alike = {key: seconds for key, seconds in known.items() if key[0] == name} or known
        if not alike:
            return None
        nearest = min(alike, key=lambda key: abs(key[1] - depth))
        last = min(run.recipe.epochs, run.recipe.stop_epoch or run.recipe.epochs)
        return self.setup + last * alike[nearest]

    @functools.cached_property
    def _runs(self) -> list[Run]:
        """Runs drawn from the space; the last is the default recipe."""
        default = self.space.make_run(self.space.default_choices())
        return [*draw_runs(self.space, DRAWN_RUNS), default]

    def _key(self, run: Run) -> tuple[str, int]:
        return run.model.name, run.recipe.depth_of(self.max_depths[run.model.name])
