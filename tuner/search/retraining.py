"""How long a trial is trained again: for a repeat, and for the export.

The best of a trial's epochs is partly the best by the luck of the validation examples. A schedule
that falls is made to be trained to its end: before it, the learning rate is still high, and the
weights follow the last batches. So such a schedule is trained again to the last of its epochs that
is not worse than the best one beyond noise (benchmarks/README.md, "Retraining"). A constant rate
has no end to come to, and a training that patience or `search.time` ended has not come to it: these
are trained again to the best epoch.
"""

import math
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from tuner.config import plugins
from tuner.config.run import Recipe, Run
from tuner.messages import Epoch
from tuner.search import history

# between the results of two models, or of two epochs, on the same examples, since both find the
# same ones hard; 0.57 and 0.71 in the paired bootstraps of two searches on photographs of clothes
CORRELATION = 0.6
ROUNDING = 1e-9  # relative
CONFIDENCE = 2.0  # standard errors by which a later epoch is worse: about 95 %


def difference_noise(share: float, count: float) -> float:
    """The standard error of the difference of two models' shares of right examples.

    It is the greatest possible one for any score that is a mean over examples of values between 0
    and 1 (Bhatia and Davis, American Mathematical Monthly, 2000).

    Args:
        share: The share of one of them.
        count: The number of examples, the same ones for both; 0: it is not known.

    Returns:
        The standard error; 0 where the number is not known, or the share is none.
    """
    if count == 0 or not 0 <= share <= 1:
        return 0.0
    return math.sqrt(2 * (1 - CORRELATION) * share * (1 - share) / count)


def count_for_noise(study: optuna.Study, run: Run, metric: str) -> float:
    """Of how many validation examples a score has the noise; 0: it is not known."""
    is_macro = metric in plugins.read_task_names(run.task.name, "MACRO")
    return history.validation_count(study, run.folds, is_macro=is_macro)


def choose_epoch(
    recipe: Recipe, epochs: Sequence[Epoch], best: int, metric: str, sign: int, count: float
) -> int:
    """The number of the epoch to which a completed trial is trained again.

    Args:
        recipe: The trial's recipe.
        epochs: All epochs that it trained, in order.
        best: The number of the best epoch.
        metric: The score that the search improves.
        sign: -1 where lower scores are better, otherwise 1. Such scores have no bound, so their
            noise is not known, and a later epoch must be as good as the best one.
        count: As of `count_for_noise`.
    """
    if recipe.schedule == "constant" or len(epochs) < (recipe.stop_epoch or recipe.epochs):
        return best
    top = epochs[best - 1].scores[metric]
    for epoch in reversed(epochs[best:]):
        if metric not in epoch.scores:
            continue
        score = epoch.scores[metric]
        # of the mean of both scores, because a perfect score alone would seem to have no noise
        noise = CONFIDENCE * difference_noise((top + score) / 2, count) if sign > 0 else 0.0
        if sign * (top - score) <= noise:
            return epoch.number
    return best


def retrained_epochs(trial: FrozenTrial) -> int:
    """The number of the epoch to which a completed trial is trained again."""
    best: int = trial.user_attrs[history.BEST_EPOCH]
    return int(trial.user_attrs.get(history.RETRAINED_EPOCHS, best))


def training_seconds(trial: FrozenTrial, run: Run) -> float:
    """About how long a completed trial takes when it is trained again as it was, on one fold."""
    epochs = max(1, max(trial.intermediate_values, default=1))
    seconds = float(trial.user_attrs.get("seconds", 0.0)) / run.folds
    return seconds * min(1.0, retrained_epochs(trial) / epochs)


def retraining_seconds(trial: FrozenTrial, run: Run, train_share: float) -> float:
    """About how long a completed trial takes when it is trained again on train and validation
    examples, for whole epochs. `run` is the trial's; `train_share` as of `retraining_share`.
    """
    steps = retrained_epochs(trial) * retraining_share(run, train_share)
    return training_seconds(trial, run) * whole_epochs(steps) / steps


def retraining_share(run: Run, train_share: float) -> float:
    """The share of the examples that a trial trains on in those of its retraining.

    A trial with cross-validation trains on all but one fold.

    Args:
        run: The run of the trial.
        train_share: The share of the training examples in those of train and validation together.
    """
    return train_share if run.folds == 1 else (run.folds - 1) / run.folds


def whole_epochs(epochs: float) -> int:
    """The fewest whole epochs that have as many steps."""
    return max(1, math.ceil(epochs - ROUNDING))
