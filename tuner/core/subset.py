"""Some examples of a larger source, so that both are known to have them in common."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tuner.core.input_spec import TensorTree
from tuner.core.types import Batch, ResidentSource, Source, TargetSource


@dataclass(frozen=True)
class Subset:
    """Some examples of another source, as a `Source`.

    What is computed for the whole, such as activations of frozen stages, is of use for all of its
    subsets: for the folds of a cross-validation, and for training and validation examples
    together.

    Args:
        whole: The other source.
        rows: int64 (n,), the index in `whole` of each example.
        digest: As in `Source`.
    """

    whole: Source
    rows: Tensor
    digest: str

    @property
    def views(self) -> int | None:
        return self.whole.views

    @property
    def lengths(self) -> Tensor | None:
        lengths = self.whole.lengths
        return None if lengths is None else lengths[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor, view: int) -> Batch:
        return self.whole.take(self.rows[index], view)

    def take_targets(self, index: Tensor) -> TensorTree:
        rows = self.rows[index]
        if isinstance(self.whole, TargetSource):
            return self.whole.take_targets(rows)
        return self.whole.take(rows, 0).y

    def is_resident(self, view: int) -> bool:
        return isinstance(self.whole, ResidentSource) and self.whole.is_resident(view)


class StoreSource(Source, Protocol):
    """A source whose examples are rows of a store; `rows` is int64 (n,), increasing."""

    @property
    def rows(self) -> Tensor: ...


def subset_of(whole: StoreSource, part: StoreSource) -> Subset:
    """`part` as a subset of `whole`: another source over the same store, with all rows of `part`.

    Every view of `part` must be that of `whole`.
    """
    return Subset(whole, torch.searchsorted(whole.rows, part.rows), part.digest)
