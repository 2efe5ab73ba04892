"""A pruner that compares like with like: how far trials such as this one still rise, not where all of them stand by now."""

import math
import statistics
from collections.abc import Mapping

import optuna
from optuna.trial import FrozenTrial, TrialState

STARTUP_TRIALS, WARMUP_EPOCHS, PEER_COUNT = 5, 2, 5


class ProjectionPruner(optuna.pruners.BasePruner):
    """Ends a trial that stays below the median of the completed ones even if it rises as much as any of its five nearest peers
    did from the same share of their epochs on.

    Near are trials of like freeze depth and length: a head alone is soon where it ends, a model trained whole begins low and
    rises, a schedule of ten epochs is not through when one of two has ended. The median of all at equal epochs judges the
    one by the other. Higher is better. Trials are judged after their second epoch, and once five have completed.
    """

    def __init__(self, epochs: int) -> None:
        """`epochs`: of a trial whose length is not searched."""
        self.epochs = epochs

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        done = trial.last_step
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if done is None or done <= WARMUP_EPOCHS or len(completed) < STARTUP_TRIALS:
            return False
        share = done / self._length(trial)
        near = sorted(completed, key=lambda other: (self._distance(trial, other), -other.number))[
            :PEER_COUNT
        ]
        rise = max(
            _best_value(other.intermediate_values) - _best_value(self._epochs_until(other, share))
            for other in near
        )
        return _best_value(trial.intermediate_values) + rise < statistics.median(
            float(other.value or 0.0) for other in completed
        )

    def _length(self, trial: FrozenTrial) -> int:
        return int(trial.params.get("epochs", self.epochs))

    def _epochs_until(self, trial: FrozenTrial, share: float) -> dict[int, float]:
        """The epochs of a trial up to a share of its length; the first in any case."""
        last = max(1, math.floor(share * self._length(trial)))
        return {
            step: value for step, value in trial.intermediate_values.items() if step <= last
        } or trial.intermediate_values

    def _distance(self, a: FrozenTrial, b: FrozenTrial) -> float:
        """In stages and in doublings of the length."""
        depth = abs(int(a.params.get("freeze_depth", 0)) - int(b.params.get("freeze_depth", 0)))
        return depth + abs(math.log2(self._length(a) / self._length(b)))


def _best_value(values: Mapping[int, float]) -> float:
    return max(values.values())
