"""Random numbers that are a function of an image's row and a view, and of nothing else."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


def hash_32_bits(values: Tensor) -> Tensor:
    """A hash of the lowest 32 bits of each value; int64 in 0..2^32-1.

    It is `lowbias32` of Wellons, Prospecting for Hash Functions, 2018.
    """
    values = values & 0xFFFFFFFF
    values = (values ^ values >> 16) * 0x7FEB352D & 0xFFFFFFFF
    values = (values ^ values >> 15) * 0x846CA68B & 0xFFFFFFFF
    return values ^ values >> 16


@dataclass(frozen=True)
class RandomDraws:
    """Random numbers for some images in one view.

    There is no state: equal rows, view and name, equal numbers. So a batch looks alike in whatever
    order, on whatever device and after whatever interruption it is made.

    Args:
        rows: int64 (n,), the row of each image in its store, on the CPU.
        view: the number of the view.
    """

    rows: Tensor
    view: int

    def bits(self, name: str, count: int = 1) -> Tensor:
        """Uniform integers from 0 to 2^32 - 1 under a name: int64 (n, count)."""
        seeds = hash_32_bits(hash_32_bits(self.rows) + self.view)
        named = hash_32_bits(seeds + zlib.crc32(name.encode()))
        return hash_32_bits(named[:, None] + 0x9E3779B9 * torch.arange(count))

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, count: int = 1) -> Tensor:
        """Uniform numbers from `low` to below `high`: float32 (n, count), on the CPU."""
        fractions = (self.bits(name, count) >> 8).float() / 2**24
        return low + (high - low) * fractions

    def chosen(self, name: str, share: float) -> Tensor:
        """Which images are chosen, each with the probability `share`: bool (n,)."""
        return self.uniform(name)[:, 0] < share

    def integers(self, name: str, limit: int, count: int = 1) -> Tensor:
        """Uniform integers from 0 to `limit` - 1: int64 (n, count)."""
        return self.bits(name, count) * limit >> 32
