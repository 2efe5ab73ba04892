"""Deals examples to parts so that each part has its share of every kind."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def deal_units(
    counts: NDArray[np.float64],
    sizes: NDArray[np.float64],
    shares: NDArray[np.float64],
    seed: Sequence[int],
) -> NDArray[np.int64]:
    """Deals units, such as groups of examples, to parts, so that each stratum is divided by the
    shares as well as it can be.

    This is iterative stratification (Sechidis et al., On the Stratification of Multi-label Data,
    ECML PKDD 2011), for units of several examples: the rarest stratum is dealt first, its largest
    units before smaller ones, each to the part that lacks most of it. No part stays empty.

    Args:
        counts: float64 (units, strata), how many examples of each stratum a unit has.
        sizes: float64 (units,), how many examples it has, at least 1.
        shares: float64 (parts,), with the sum 1; not more parts than units.
        seed: of the order of equal units.

    Returns:
        int64 (units,), the part of each unit.
    """
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-sizes[order], kind="stable")]
    lacking = shares[:, None] * counts.sum(0)
    lacking_sizes = shares * sizes.sum()
    part_of = np.full(len(counts), -1)
    empty = set(range(len(shares)))
    left = len(counts)

    def deal(unit: int, lack: NDArray[np.float64]) -> None:
        nonlocal left
        allowed = empty if left <= len(empty) else range(len(shares))
        part = max(allowed, key=lambda p: (round(float(lack[p]), 9), lacking_sizes[p]))
        part_of[unit] = part
        lacking[part] -= counts[unit]
        lacking_sizes[part] -= sizes[unit]
        empty.discard(part)
        left -= 1

    while left:
        waiting = order[part_of[order] == -1]
        remaining = counts[waiting].sum(0)
        if not remaining.any():
            for unit in waiting:
                deal(int(unit), lacking_sizes)
            break
        stratum = int(np.where(remaining > 0, remaining, np.inf).argmin())
        for unit in waiting[counts[waiting, stratum] > 0]:
            deal(int(unit), lacking[:, stratum])
    return part_of
