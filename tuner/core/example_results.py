"""What each example adds to the scores, so that the scores of any choice of examples follow.

A bootstrap draws the examples of a split again, with replacement, and scores each draw.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tuner.core.input_spec import TensorTree, tree_to_dict

ExampleResults = dict[str, Tensor]
"""Tensors by name, on the CPU. Only the task that made them knows what they mean."""
MAX_BYTES = 256_000_000  # of joined predictions and targets; larger ones are not kept
PREDICTION, TARGET = "prediction", "target"  # how the names of joined tensors begin


def join_pairs(pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
    """The predictions and targets of all batches as they are, joined along the first dimension.

    Args:
        pairs: (prediction, target) of each batch; tensor trees, batch-first.

    Returns:
        Each tensor by `prediction.NAME` or `target.NAME`; without NAME for a bare tensor. Empty
        where batches differ in another dimension than the first, or above MAX_BYTES.
    """
    columns: dict[str, list[Tensor]] = {}
    size = 0
    for pair in pairs:
        for prefix, tree in zip((PREDICTION, TARGET), pair, strict=True):
            for name, tensor in tree_to_dict(tree).items():
                columns.setdefault(f"{prefix}.{name}".rstrip("."), []).append(tensor.cpu())
                size += tensor.numel() * tensor.element_size()
    shapes_differ = any(len({part.shape[1:] for part in parts}) > 1 for parts in columns.values())
    if shapes_differ or size > MAX_BYTES:
        return {}
    return {name: torch.cat(parts) for name, parts in columns.items()}


def repeat_pair(results: ExampleResults, counts: Tensor) -> tuple[TensorTree, TensorTree]:
    """One (prediction, target) of a draw, from what `join_pairs` gave.

    Args:
        results: The joined predictions and targets of n examples.
        counts: int64 (n,), how often each example is drawn.
    """
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    prediction, target = (
        {
            name.removeprefix(prefix).removeprefix("."): tensor[rows]
            for name, tensor in results.items()
            if name == prefix or name.startswith(f"{prefix}.")
        }
        for prefix in (PREDICTION, TARGET)
    )
    return _bare(prediction), _bare(target)


def _bare(tree: dict[str, Tensor]) -> TensorTree:
    return tree[""] if set(tree) == {""} else tree
