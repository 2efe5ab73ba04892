"""Frozen stages: what they compute for an example, and digests that name it."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.core.module_digests import module_digest
from tuner.core.types import Batch, Source
from tuner.preprocessing.tokenization import trim_padding
from tuner.training.code_digest import code_digest

MAX_EXAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class FrozenPrefix:
    """Frozen stages as one device computes them.

    `stage_digests` has a digest for each stage: equal digests, equal outputs for equal inputs.
    `max_batch` is the most examples that are computed at once where no training asks for them.
    """

    stages: Sequence[nn.Module]
    stage_digests: Sequence[str]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext  # e.g. of bfloat16
    max_batch: int = MAX_EXAMPLES_AT_ONCE

    def compute(self, x: TensorTree, begin: int = 0, end: int | None = None) -> TensorTree:
        """Sends `x`, an output of stage `begin`, through the stages after it up to `end` or the
        last.

        Stages count from 1; the output of stage 0 is the input of the model.
        """
        with torch.no_grad(), self.autocast():
            for stage in self.stages[begin:end]:
                x = stage(x)
        return x


def stage_digests(stages: Sequence[nn.Module], start: str) -> tuple[str, ...]:
    """A digest for each stage's output: of `start`, and of weights and code up to the stage.

    A frozen stage is in eval mode, so its rates of dropout do not matter, and trials with other
    rates share what it computes. The last stage is never frozen.
    """
    digests = [start]
    for number, stage in enumerate(stages, start=1):
        own_digest = module_digest(stage, ignore_dropout=number < len(stages))
        content = f"{digests[-1]} {own_digest} {code_digest(stage)}"
        digests.append(hashlib.sha256(content.encode()).hexdigest()[:32])
    return tuple(digests[1:])


class UncachedSource:
    """The outputs of a prefix for a source, computed at each take: the plain version of
    CachedSource.

    Texts lose the columns in which all of the batch are padded before anything is computed.
    """

    def __init__(self, prefix: FrozenPrefix, source: Source) -> None:
        self.prefix, self.source = prefix, source
        self.views, self.digest, self.lengths = source.views, source.digest, source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def take_input(self, index: Tensor, view: int) -> Batch:
        """What goes into the first stage."""
        x, y = self.source.take(index, view)
        return Batch(trim_padding(x), y)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.take_input(index, view)
        return Batch(self.prefix.compute(x), y)
