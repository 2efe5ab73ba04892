"""One pass over the training examples and one over the validation examples: the two halves of an epoch."""

import math
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuner.config.run import Recipe
from tuner.core.types import Data, Source, Staged, Task
from tuner.training.checkpoints import Training
from tuner.training.devices import Place
from tuner.training.micro_batches import fitting

EVAL_BATCH = 64  # at most; and no more than four training batches, which memory is sized for
BUCKET = 32  # batches whose examples are sorted by length together
Pairs = list[tuple[Any, Any]]  # (prediction, truth) of each batch


@dataclass(frozen=True)
class Bench:
    """Everything a training works with: the model and its trainable suffix `net`, and what feeds it."""

    task: Task
    staged: Staged
    net: nn.Module
    data: Data
    train: Source
    valid: Source
    test: Source
    place: Place
    metric: str


def learn(bench: Bench, recipe: Recipe, training: Training, seed: int, epoch: int) -> float:
    """One pass over the training examples; the mean loss, or the first that is not finite."""
    seeded(seed * 1_000_003 + epoch)
    bench.net.train()
    view = (epoch - 1) % bench.train.views if bench.train.views else epoch - 1
    total = torch.zeros((), device=bench.place.device)
    chunks = batches(len(bench.train), recipe.batch_size, seed, epoch, bench.train.lengths)
    for step, index in enumerate(chunks):
        loss = fitting(partial(gradients, bench, index, view, training), training.room, len(index))
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(bench.net.parameters(), recipe.clip_norm)
        training.optimizer.step()
        training.schedule.step()
        total += loss * len(index)
        if step % 50 == 49 and not math.isfinite(
            float(total)
        ):  # reading it waits for the GPU, so not at every step
            break
    return float(total) / len(bench.train)


def seeded(seed: int) -> None:
    """Every random state follows (seed, epoch), not what ran before: dropout, and what a model of the user's draws by other means."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def gradients(bench: Bench, index: Tensor, view: int, training: Training) -> Tensor:
    """Leaves the gradients of a batch's mean loss in the net and returns the loss.

    A batch beyond the room is computed in parts, each weighted by its examples. That is the whole batch's gradient where a loss is a
    mean over examples. It is not quite where it is a mean over something else (the tokens of texts, the pixels that are not left
    out, the objects found), and not in BatchNorm, whose statistics are then of a part.
    """
    training.optimizer.zero_grad(set_to_none=True)
    parts = training.room.parts(index)
    total = torch.zeros((), device=bench.place.device)
    for part in parts:
        batch = bench.train.take(part, view)
        with bench.place.autocast():
            loss = bench.task.loss(bench.net, batch)
        if len(parts) > 1:
            loss = loss * (len(part) / len(index))
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if len(parts) == 1 else total + loss.detach()
    return total


def batches(
    length: int, size: int, seed: int, epoch: int, lengths: Tensor | None = None
) -> list[Tensor]:
    """A permutation by (seed, epoch), in batches. A last batch of one joins the one before: BatchNorm needs two.

    With `lengths`, examples of like length share a batch, so that little is padded: each run of `BUCKET` batches of the permutation
    is sorted, cut, and the batches are shuffled.
    """
    generator = torch.Generator().manual_seed(seed * 7_368_787 + epoch)
    order = torch.randperm(length, generator=generator)
    if lengths is not None:
        order = torch.cat(
            [run[lengths[run].argsort(stable=True)] for run in torch.split(order, BUCKET * size)]
        )
    chunks = list(torch.split(order, size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    if lengths is not None:
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
    return chunks


@torch.no_grad()
def predictions(bench: Bench, source: Source, size: int) -> Pairs:
    """What the net says of `source`, in order, in eval mode."""
    bench.net.eval()
    pairs = []
    for index in torch.split(torch.arange(len(source)), min(EVAL_BATCH, 4 * size)):
        batch = source.take(index, 0)
        with bench.place.autocast():
            predicted = bench.task.predict(bench.net, batch.x)
        pairs.append((predicted, batch.y))
    return pairs
