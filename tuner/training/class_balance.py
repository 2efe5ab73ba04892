"""Datasets whose classes differ in size: how many examples each has, and an order with as many of
each.
"""

import torch
from torch import Tensor

from tuner.core.input_spec import TensorTree
from tuner.core.targets import split_weights
from tuner.core.types import Source, TargetSource

ROWS_PER_CHUNK = 64  # examples whose targets are read at once: masks are large

_class_counts: dict[str, Tensor] = {}  # by digest of the source; of masks they take long to count


def read_targets(source: Source, index: Tensor) -> TensorTree:
    """The targets of the examples at `index` (int64, (n,)), on the CPU, without their weights.

    A source that is no TargetSource reads the inputs too.
    """
    if isinstance(source, TargetSource):
        return split_weights(source.take_targets(index))[0]
    return split_weights(source.take(index, 0).y)[0]


def read_labels(source: Source) -> Tensor:
    """The class of each example, int64 (n,), or its numbers, float (n, targets), on the CPU."""
    labels = [read_targets(source, index) for index in _chunks(source)]
    return torch.cat([chunk for chunk in labels if isinstance(chunk, Tensor)]).cpu()


def count_classes(source: Source, class_count: int) -> Tensor:
    """How many examples, pixels or words of each class a source has: int64 (classes,), on the CPU.

    Pixels and tokens that do not count are left out.
    """
    key = f"{source.digest} {class_count}"
    if key not in _class_counts:
        counts = torch.zeros(class_count, dtype=torch.int64)
        for index in _chunks(source):
            targets = read_targets(source, index)
            assert isinstance(targets, Tensor)
            labels = targets.flatten().cpu().long()
            counted = labels[(labels >= 0) & (labels < class_count)]
            counts += torch.bincount(counted, minlength=class_count)
        _class_counts[key] = counts
    return _class_counts[key]


def macro_count(counts: Tensor) -> float:
    """How many examples of equally large classes give a mean over classes its standard error.

    With n_c examples of class c of C, its variance is that of a share of C² / Σ(1 / n_c) examples:
    all of them where classes are equally large, and few where one is rare.

    Args:
        counts: int64 (classes,), how many examples each class has; empty classes do not count.
    """
    present = counts[counts > 0].double()
    return float(len(present) ** 2 / (1 / present).sum()) if len(present) else 0.0


def _chunks(source: Source) -> tuple[Tensor, ...]:
    return torch.split(torch.arange(len(source)), ROWS_PER_CHUNK)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many indices as there are examples, with equally many of each class, in random order.

    Classes differ by one index where their number does not divide that of the examples. Within a
    class all examples occur equally often, up to one: of a class that is too large, a part that
    `generator` draws is left out.

    Args:
        labels: int64 (n,), the class of each example.
        generator: What is drawn follows from it.

    Returns:
        int64 (n,).
    """
    counts = torch.bincount(labels)
    sizes = counts[counts > 0]
    draws = torch.full_like(sizes, len(labels) // len(sizes))
    draws[torch.randperm(len(sizes), generator=generator)[: len(labels) % len(sizes)]] += 1
    order = []
    by_class = torch.split(labels.argsort(stable=True), sizes.tolist())
    for rows, count in zip(by_class, draws.tolist(), strict=True):
        times, rest = divmod(count, len(rows))
        order += [rows.repeat(times), rows[torch.randperm(len(rows), generator=generator)[:rest]]]
    return torch.cat(order)[torch.randperm(len(labels), generator=generator)]
