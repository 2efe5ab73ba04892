"""A metric of the user's own: `search.metric: 'package.module:function'`.

The function is called as `function(predictions, targets)` with all examples of a split, and gives a
number. An attribute `minimised = True` on it says that lower numbers are better.
"""

import hashlib
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.config import plugins
from tuner.config.objective import Direction, is_own_metric
from tuner.errors import SpaceError


def score_own_metric(metric: str, pairs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """The value of the user's own metric, by its name; empty for a metric of the task.

    Args:
        metric: The name of the metric.
        pairs: (prediction, target) of each batch, as `Task.score` takes them.

    Raises:
        SpaceError: The function cannot be imported, raises, or gives no finite number.
    """
    if not is_own_metric(metric):
        return {}
    function = plugins.load_plugin("metric", metric)
    predictions, targets = (join_batches([pair[side] for pair in pairs]) for side in (0, 1))
    try:
        value = float(function(predictions, targets))
    except Exception as error:  # the user's function may raise anything, and the user must read it
        raise SpaceError(
            f"search.metric: {metric}: calling it with the predictions and targets of "
            f"{_describe(predictions)} and {_describe(targets)} failed "
            f"({type(error).__name__}: {error})"
        ) from error
    if not math.isfinite(value):
        raise SpaceError(
            f"search.metric: {metric} returned {value:g}; expected a finite number for any "
            "predictions, so that trials can be compared"
        )
    return {metric: value}


def join_batches(batches: Sequence[Any]) -> Any:
    """The predictions, or the targets, of all batches together, on the CPU.

    Args:
        batches: A tensor tree for each batch, batch-first.

    Returns:
        A tensor, or a dict of tensors, of all examples, such as logits, float32 (n, classes), and
        classes, int64 (n,). Where batches are padded to different sizes, such as objects, it is a
        list with an item for each batch.
    """
    if all(isinstance(batch, Tensor) for batch in batches):
        if len({batch.shape[1:] for batch in batches}) == 1:
            return torch.cat(list(batches)).cpu()
        return [batch.cpu() for batch in batches]
    joined = {name: join_batches([batch[name] for batch in batches]) for name in batches[0]}
    if any(isinstance(value, list) for value in joined.values()):
        return [{name: value.cpu() for name, value in batch.items()} for batch in batches]
    return joined


def metric_key(metric: str, direction: Direction) -> str:
    """What a metric is called in the keys of things that are kept, such as checkpoints.

    Scores are of use only while the function is the same. So the user's own metric also stands for
    the SHA-256 of the file that defines it, and for its direction, which its file may leave open.
    """
    if not is_own_metric(metric):
        return metric
    function: Any = plugins.load_plugin("metric", metric)
    try:
        content = Path(str(inspect.getsourcefile(inspect.unwrap(function)))).read_bytes()
    except (OSError, TypeError):  # an object that is called, or a function without a file
        content = b""
    return f"{metric} {direction} {hashlib.sha256(content).hexdigest()}"


def _describe(tree: Any) -> str:
    """`float32 (24, 3)`, or the type of what is not one tensor."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    return type(tree).__name__
