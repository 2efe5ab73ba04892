"""One pass over the training examples and one over the validation examples: the two halves of an
epoch.
"""

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

MAX_EVAL_BATCH = (
    64  # examples; four training batches where that is less, since memory is sized by them
)
BATCHES_PER_BUCKET = 32  # batches whose examples are sorted by length together
PredictionPairs = list[tuple[Any, Any]]
"""(prediction, target) of each batch, in the order of the examples."""


@dataclass(frozen=True)
class TrainingContext:
    """Everything that a training uses and does not change itself, but for the weights of `net`.

    `net` is the trainable suffix of `staged_model`. The sources `train`, `valid` and `test` give
    activations of the frozen prefix, on the device. `metric` decides which epoch is the best.
    """

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
    """Makes one pass over the training examples.

    Returns the mean loss, or one that is not finite as soon as it is.
    """
    seed_everything(seed * 1_000_003 + epoch)
    context.net.train()
    view = (epoch - 1) % context.train.views if context.train.views else epoch - 1
    total = torch.zeros((), device=context.device_context.device)
    batches = shuffle_into_batches(
        len(context.train), recipe.batch_size, seed, epoch, context.train.lengths
    )
    for step, index in enumerate(batches):
        loss = retry_on_oom(
            partial(backward, context, index, view, training), training.micro_batch_size, len(index)
        )
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(context.net.parameters(), recipe.clip_norm)
        training.optimizer.step()
        training.schedule.step()
        total += loss * len(index)
        # reading the total waits for the GPU, so it is not read at every step
        if step % 50 == 49 and not math.isfinite(float(total)):
            break
    return float(total) / len(context.train)


def seed_everything(seed: int) -> None:
    """Sets every random state, so that dropout and a user's own model do not depend on what the
    process did before.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def backward(context: TrainingContext, index: Tensor, view: int, training: TrainingState) -> Tensor:
    """Computes the gradients of a batch's mean loss, which stay in the net, and returns the loss.

    A batch that is larger than the micro-batch size is computed in micro-batches, each weighted by
    its number of examples. The result is the gradient of the whole batch where a loss is a mean
    over examples. It is an approximation where the loss is a mean over something else (the tokens
    of texts, the pixels that are not ignored, the objects), and in BatchNorm, whose statistics are
    then those of a micro-batch.
    """
    training.optimizer.zero_grad(set_to_none=True)
    micro_batches = training.micro_batch_size.split_batch(index)
    total = torch.zeros((), device=context.device_context.device)
    for micro_batch in micro_batches:
        batch = context.train.take(micro_batch, view)
        with context.device_context.autocast():
            loss = context.task.loss(context.net, batch)
        if len(micro_batches) > 1:
            loss = loss * (len(micro_batch) / len(index))
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if len(micro_batches) == 1 else total + loss.detach()
    return total


def shuffle_into_batches(
    length: int, batch_size: int, seed: int, epoch: int, lengths: Tensor | None = None
) -> list[Tensor]:
    """The indices 0..length-1 in an order that follows from (seed, epoch), split into batches
    (int64).

    A last batch of one example joins the batch before it, because BatchNorm needs two. With
    `lengths`, examples of similar length share a batch, so that little is padded: each bucket of
    BATCHES_PER_BUCKET batches is sorted by length and split, and then the batches are shuffled.
    """
    generator = torch.Generator().manual_seed(seed * 7_368_787 + epoch)
    order = torch.randperm(length, generator=generator)
    if lengths is not None:
        order = torch.cat(
            [
                bucket[lengths[bucket].argsort(stable=True)]
                for bucket in torch.split(order, BATCHES_PER_BUCKET * batch_size)
            ]
        )
    batches = list(torch.split(order, batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    if lengths is not None:
        shuffled = torch.randperm(len(batches), generator=generator)
        batches = [batches[i] for i in shuffled.tolist()]
    return batches


@torch.no_grad()
def predict_source(context: TrainingContext, source: Source, batch_size: int) -> PredictionPairs:
    """The net's predictions for all examples of `source`, in order, in eval mode."""
    context.net.eval()
    pairs = []
    for index in torch.split(torch.arange(len(source)), min(MAX_EVAL_BATCH, 4 * batch_size)):
        batch = source.take(index, 0)
        with context.device_context.autocast():
            predicted = context.task.predict(context.net, batch.x)
        pairs.append((predicted, batch.y))
    return pairs
