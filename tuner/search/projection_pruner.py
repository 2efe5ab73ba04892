"""A pruner that compares a trial with similar trials.

It compares how much similar trials still improved, and not where all other trials stand now.
"""

import math
import statistics
from collections.abc import Mapping

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.config.space import key_of_parameter
from tuner.search.history import sign_of

STARTUP_TRIALS, WARMUP_EPOCHS, PEER_COUNT = 5, 1, 5
STAGES_OF_A_SHARE = 8  # that a model has, for the distance of trials that freeze a share of them


class ProjectionPruner(optuna.pruners.BasePruner):
    """Ends a trial that would stay worse than the median of the completed trials.

    The projection of a trial is its best score so far plus a rise. The rise is the largest that
    any of its five nearest peers made after the same share of their epochs. The trial ends when
    its projection is below the median.

    The nearest peers are the trials with a similar freeze depth and a similar length. A head that
    is trained alone is soon where it ends. A model that is trained whole begins low and rises. A
    schedule of ten epochs is not finished where a schedule of two epochs has ended. The median of
    all trials at equal epochs would judge each kind by the others.

    Where a study minimises, the same holds of the negative values. Trials are judged from their
    second epoch on, and only when five trials have completed.
    """

    def __init__(self, epochs: int) -> None:
        """Make the pruner.

        Args:
            epochs: The number of epochs of a trial whose length is not searched.
        """
        self.epochs = epochs

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        epochs_done = trial.last_step
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if epochs_done is None or epochs_done <= WARMUP_EPOCHS or len(completed) < STARTUP_TRIALS:
            return False
        length, sign = self._length(trial), sign_of(study.direction)
        by_distance = sorted(
            completed, key=lambda peer: (self._distance(trial, peer), -peer.number)
        )
        rise = max(
            _best_value(peer.intermediate_values, sign)
            - _best_value(self._values_until(peer, epochs_done, length), sign)
            for peer in by_distance[:PEER_COUNT]
        )
        projection = _best_value(trial.intermediate_values, sign) + rise
        return projection < statistics.median(sign * float(peer.value or 0.0) for peer in completed)

    def _length(self, trial: FrozenTrial) -> int:
        return int(_value_of_key(trial, "epochs", self.epochs))

    def _values_until(self, trial: FrozenTrial, epochs_done: int, length: int) -> dict[int, float]:
        """Return the values of a trial up to the share `epochs_done / length` of its own length.

        They are those of at least one epoch.
        """
        last = max(1, epochs_done * self._length(trial) // length)
        values = trial.intermediate_values
        return {step: value for step, value in values.items() if step <= last} or values

    def _distance(self, a: FrozenTrial, b: FrozenTrial) -> float:
        """Return the difference in stages plus the difference in doublings of the length."""
        depth = abs(_value_of_key(a, "freeze_depth", 0) - _value_of_key(b, "freeze_depth", 0))
        share = abs(_value_of_key(a, "freeze", 0) - _value_of_key(b, "freeze", 0))
        return depth + STAGES_OF_A_SHARE * share + abs(math.log2(self._length(a) / self._length(b)))


def _value_of_key(trial: FrozenTrial, key: str, default: float) -> float:
    """Return what a trial has for a key, which may have several ranges."""
    values = (value for name, value in trial.params.items() if key_of_parameter(name) == key)
    return float(next(values, default))


def _best_value(values: Mapping[int, float], sign: int) -> float:
    """Return the best of a trial's values, times `sign`."""
    return max(sign * value for value in values.values())
