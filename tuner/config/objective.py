"""What a search improves: a metric, and whether higher or lower values of it are better."""

from typing import Literal

Direction = Literal["maximise", "minimise"]


def is_improvement(value: float, best: float, direction: Direction) -> bool:
    """Whether `value` is better than `best`. An equal value is not better."""
    return value < best if direction == "minimise" else value > best


def is_own_metric(metric: str) -> bool:
    """Whether a metric is a function of the user's own, `package.module:function`."""
    return ":" in metric


def metric_label(metric: str) -> str:
    """A metric as people read it: `log_loss` is `log loss`, `package.module:cost` is `cost`."""
    return metric.rpartition(":")[2].replace("_", " ")
