"""The probabilities from which on a test example has each of several labels."""

from tuner.config.run import Run
from tuner.core.types import Task
from tuner.messages import scale_probability
from tuner.training.epoch import TrainingContext


def decide_thresholds(
    context: TrainingContext, run: Run, fitted: tuple[float, ...], temperature: float | None
) -> tuple[float, ...] | None:
    """The probabilities from which on a test example has each label; None: the task has no labels.

    They are those that the run states, or those that fit the validation examples. A training
    without validation, whose run states none, decides at 0.5: the test examples must not choose.
    """
    if type(context.task).at_thresholds is Task.at_thresholds:
        return None
    count = len(context.dataset.classes)
    stated = run.task.options.get("thresholds")
    if stated is not None:
        return tuple(stated) if isinstance(stated, tuple) else (float(stated),) * count
    return tuple(scale_probability(value, temperature) for value in fitted) or (0.5,) * count
