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
from tuner.core.types import Dataset, Source, StagedModel, Task
from tuner.training.checkpoints import TrainingState
from tuner.training.devices import DeviceContext
from tuner.training.micro_batches import retry_on_oom

MAX_EVAL_BATCH = 64  # at most; and no more than four training batches, which memory is sized for
BATCHES_PER_BUCKET = 32  # batches whose examples are sorted by length together
PredictionPairs = list[tuple[Any, Any]]  # (prediction, truth) of each batch


@dataclass(frozen=True)
class TrainingContext:
    """Everything a training works with: the model and its trainable suffix `net`, and what feeds it."""

    task: Task
    staged_model: StagedModel
    net: nn.Module
    dataset: Dataset
    train: Source
    valid: Source
    test: Source
    device_context: DeviceContext
    metric: str


def train_one_epoch(
    context: TrainingContext, recipe: Recipe, training: TrainingState, seed: int, epoch: int
) -> float:
    """One pass over the training examples; the mean loss, or the first that is not finite."""
    seed_everything(seed * 1_000_003 + epoch)
    context.net.train()
    view = (epoch - 1) % context.train.views if context.train.views else epoch - 1
    total = torch.zeros((), device=context.device_context.device)
    chunks = shuffle_into_batches(
        len(context.train), recipe.batch_size, seed, epoch, context.train.lengths
    )
    for step, index in enumerate(chunks):
        loss = retry_on_oom(
            partial(backward, context, index, view, training), training.micro_batch_size, len(index)
        )
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(context.net.parameters(), recipe.clip_norm)
        training.optimizer.step()
        training.schedule.step()
        total += loss * len(index)
        if step % 50 == 49 and not math.isfinite(
            float(total)
        ):  # reading it waits for the GPU, so not at every step
            break
    return float(total) / len(context.train)


def seed_everything(seed: int) -> None:
    """Every random state follows (seed, epoch), not what ran before: dropout, and what a model of the user's draws by other means."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def backward(context: TrainingContext, index: Tensor, view: int, training: TrainingState) -> Tensor:
    """Leaves the gradients of a batch's mean loss in the net and returns the loss.

    A batch beyond the room is computed in parts, each weighted by its examples. That is the whole batch's gradient where a loss is a
    mean over examples. It is not quite where it is a mean over something else (the tokens of texts, the pixels that are not left
    out, the objects found), and not in BatchNorm, whose statistics are then of a part.
    """
    training.optimizer.zero_grad(set_to_none=True)
    parts = training.micro_batch_size.split_batch(index)
    total = torch.zeros((), device=context.device_context.device)
    for part in parts:
        batch = context.train.take(part, view)
        with context.device_context.autocast():
            loss = context.task.loss(context.net, batch)
        if len(parts) > 1:
            loss = loss * (len(part) / len(index))
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if len(parts) == 1 else total + loss.detach()
    return total


def shuffle_into_batches(
    length: int, batch_size: int, seed: int, epoch: int, lengths: Tensor | None = None
) -> list[Tensor]:
    """A permutation by (seed, epoch), in batches. A last batch of one joins the one before: BatchNorm needs two.

    With `lengths`, examples of like length share a batch, so that little is padded: each run of `BUCKET` batches of the permutation
    is sorted, cut, and the batches are shuffled.
    """
    generator = torch.Generator().manual_seed(seed * 7_368_787 + epoch)
    order = torch.randperm(length, generator=generator)
    if lengths is not None:
        order = torch.cat(
            [
                run[lengths[run].argsort(stable=True)]
                for run in torch.split(order, BATCHES_PER_BUCKET * batch_size)
            ]
        )
    chunks = list(torch.split(order, batch_size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    if lengths is not None:
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
    return chunks


@torch.no_grad()
def predict_source(context: TrainingContext, source: Source, batch_size: int) -> PredictionPairs:
    """What the net says of `source`, in order, in eval mode."""
    context.net.eval()
    pairs = []
    for index in torch.split(torch.arange(len(source)), min(MAX_EVAL_BATCH, 4 * batch_size)):
        batch = source.take(index, 0)
        with context.device_context.autocast():
            predicted = context.task.predict(context.net, batch.x)
        pairs.append((predicted, batch.y))
    return pairs
