"""One pass over the training examples and one over the validation examples: the two halves of an
epoch.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuner.config.objective import Direction
from tuner.config.run import Recipe
from tuner.core.types import Dataset, Source, StagedModel, Task
from tuner.training.batch_mixing import BatchMixing, draw_mixing
from tuner.training.batch_norm import set_train_mode
from tuner.training.checkpoints import TrainingState
from tuner.training.class_balance import balanced_order
from tuner.training.devices import DeviceContext
from tuner.training.micro_batches import retry_on_oom

MAX_EVAL_BATCH = (
    64  # examples; four training batches where that is less, since memory is sized by them
)
BATCHES_PER_BUCKET = 32  # batches whose examples are sorted by length together
STEPS_BETWEEN_CHECKS = 50  # after so many steps the loss is read and must be finite
LossParts = dict[str, Tensor]
"""Scalar tensors by name; their sum is what training minimises."""
PredictionPairs = list[tuple[Any, Any]]
"""(prediction, target) of each batch, in the order of the examples."""


@dataclass(frozen=True)
class TrainingContext:
    """Everything that a training uses and does not change itself, but for the weights of `net`.

    `net` is the trainable suffix of `staged_model`; `pretrained_norms` are those of its BatchNorm
    modules that have statistics of the pretraining. The sources `train`, `valid` and `test` give
    activations of the frozen prefix, on the device. `metric` and its `direction` decide which
    epoch is the best. `labels`, int64 (n,), are the classes of the examples of `train` where an
    epoch has as many of each class (`sampling: balanced`).
    """

    task: Task
    staged_model: StagedModel
    net: nn.Module
    pretrained_norms: tuple[_BatchNorm, ...]
    dataset: Dataset
    train: Source
    valid: Source
    test: Source
    device_context: DeviceContext
    metric: str
    direction: Direction = "maximise"
    labels: Tensor | None = None


class Diverged(Exception):
    """The loss or a score is NaN or infinite."""


def train_one_epoch(
    context: TrainingContext, recipe: Recipe, training: TrainingState, seed: int, epoch: int
) -> float:
    """Makes one pass over the training examples and returns the mean loss.

    Raises Diverged, with the step and the part of the loss, when the loss is not finite.
    """
    seed_everything(seed * 1_000_003 + epoch)
    view = (epoch - 1) % context.train.views if context.train.views else epoch - 1
    total = torch.zeros((), device=context.device_context.device)
    unchecked: list[LossParts] = []
    batches = shuffle_into_batches(
        len(context.train),
        recipe.batch_size,
        seed,
        epoch,
        context.train.lengths,
        context.labels,
    )
    set_train_mode(context.net, context.pretrained_norms, recipe, len(batches))
    freeze_waiting_stages(context.net, recipe.unfreeze_every, epoch)
    groups = group_batches(batches, recipe.accumulate)
    for step, group in enumerate(groups, start=1):
        parts = retry_on_oom(
            partial(
                backward, context, group, view, training, draw_mixing(recipe, seed, epoch, step)
            ),
            training.micro_batch_size,
            max(map(len, group)),
        )
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(context.net.parameters(), recipe.clip_norm)
        training.optimizer.step()
        training.schedule.step()
        if training.average is not None:
            training.average.update(training.schedule.last_epoch)
        total += sum_parts(parts) * sum(map(len, group))
        unchecked.append(parts)
        # reading the total waits for the GPU, so it is not read at every step
        if step % STEPS_BETWEEN_CHECKS == 0 or step == len(groups):
            if not math.isfinite(float(total)):
                first_step = step - len(unchecked) + 1
                raise Diverged(f"{describe_divergence(unchecked, first_step)} in epoch {epoch}")
            unchecked.clear()
    return float(total) / len(context.train)


def freeze_waiting_stages(net: nn.Module, unfreeze_every: int, epoch: int) -> None:
    """Freezes the stages of `net` that are not trained yet in `epoch`, and unfreezes the others.

    The head is trained from the first epoch, and one more stage after each `unfreeze_every` epochs
    (gradual unfreezing: Howard and Ruder, ULMFiT, ACL 2018). A stage that waits has no gradients
    and is in eval mode, so its BatchNorm does not change. The optimizer leaves parameters without a
    gradient alone, their weight decay included.
    """
    if not unfreeze_every:
        return
    stages = list(net.children())
    waiting = max(0, len(stages) - 1 - (epoch - 1) // unfreeze_every)
    for number, stage in enumerate(stages):
        stage.requires_grad_(number >= waiting)
        if number < waiting:
            stage.eval()


def describe_divergence(losses: Sequence[LossParts], first_step: int) -> str:
    """The value of the first loss that is not finite, its step, and its parts where it has many.

    Args:
        losses: The parts of the loss of some steps in a row.
        first_step: The number of the first of these steps.
    """
    for step, parts in enumerate(losses, start=first_step):
        values = {name: float(value) for name, value in parts.items()}
        if math.isfinite(sum(values.values())):
            continue
        bad_parts = [
            f"{name} {value:g}" for name, value in values.items() if not math.isfinite(value)
        ]
        named = f" ({', '.join(bad_parts)})" if len(values) > 1 and bad_parts else ""
        return f"loss {sum(values.values()):g}{named} at step {step}"
    return "the sum of the losses is not finite"


def seed_everything(seed: int) -> None:
    """Sets every random state, so that dropout and a user's own model do not depend on what the
    process did before.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def backward(
    context: TrainingContext,
    batches: Sequence[Tensor],
    view: int,
    training: TrainingState,
    mixing: BatchMixing | None = None,
) -> LossParts:
    """Computes the gradients of the mean loss of some batches, which stay in the net.

    The batches of an optimizer step are computed one after another, and one that is larger than the
    micro-batch size in micro-batches, each weighted by its number of examples. The result is the
    gradient of all of them as one batch where a loss is a mean over examples. It is an
    approximation where the loss is a mean over something else (the tokens of texts, the pixels that
    are not ignored, the objects), and in BatchNorm, whose statistics are those of a micro-batch.
    Examples are mixed with others of their micro-batch.

    Returns the parts of the loss, detached.
    """
    training.optimizer.zero_grad(set_to_none=True)
    totals: LossParts = {}
    count = sum(map(len, batches))
    for micro_batch in chain(*map(training.micro_batch_size.split_batch, batches)):
        batch = context.train.take(micro_batch, view)
        with context.device_context.autocast():
            loss_parts = context.task.loss_parts
            parts = (
                loss_parts(context.net, batch)
                if mixing is None
                else mixing.loss_parts(loss_parts, context.net, batch)
            )
        weight = len(micro_batch) / count
        weighted = {name: part * weight if weight < 1 else part for name, part in parts.items()}
        sum_parts(weighted).backward()  # type: ignore[no-untyped-call]
        for name, part in weighted.items():
            totals[name] = totals[name] + part.detach() if name in totals else part.detach()
    return totals


def group_batches(batches: Sequence[Tensor], accumulate: int) -> list[Sequence[Tensor]]:
    """The batches of each optimizer step: `accumulate` in a row, and what is left at the end."""
    return [batches[first : first + accumulate] for first in range(0, len(batches), accumulate)]


def sum_parts(parts: LossParts) -> Tensor:
    """The sum of the parts of a loss: a scalar tensor."""
    return functools.reduce(torch.add, parts.values())


def shuffle_into_batches(
    length: int,
    batch_size: int,
    seed: int,
    epoch: int,
    lengths: Tensor | None = None,
    labels: Tensor | None = None,
) -> list[Tensor]:
    """The indices 0..length-1 in an order that follows from (seed, epoch), split into batches
    (int64).

    A last batch of one example joins the batch before it, because BatchNorm needs two. With
    `lengths`, examples of similar length share a batch, so that little is padded: each bucket of
    BATCHES_PER_BUCKET batches is sorted by length and split, and then the batches are shuffled.
    With `labels`, the indices are those of `balanced_order`: as many, but some of them repeat.
    """
    generator = torch.Generator().manual_seed(seed * 7_368_787 + epoch)
    if labels is None:
        order = torch.randperm(length, generator=generator)
    else:
        order = balanced_order(labels, generator)
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
