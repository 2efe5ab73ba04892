"""One pass over the training examples and one over the validation examples: the two halves of an
epoch.
"""

import functools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuner.config.objective import Direction
from tuner.config.run import Recipe
from tuner.core.adapters import trained_parameters
from tuner.core.device_transfers import HostCopy
from tuner.core.input_spec import TensorTree, begin_copy_to_cpu
from tuner.core.targets import split_weights
from tuner.core.types import Dataset, Source, StagedModel, Task
from tuner.training.batch_feed import BatchFeed, side_stream_for
from tuner.training.batch_mixing import BatchMixing, draw_mixing
from tuner.training.batch_norm import set_train_mode
from tuner.training.checkpoints import TrainingState
from tuner.training.class_balance import balanced_order
from tuner.training.data_parallel import (
    ALONE,
    SEED_STRIDE,
    LossParts,
    Ranks,
    StepLosses,
    without_exchange,
)
from tuner.training.devices import DeviceContext
from tuner.training.micro_batches import retry_on_oom

MAX_EVAL_BATCH = (
    64  # examples; four training batches where that is less, since memory is sized by them
)
BATCHES_PER_BUCKET = 32  # batches whose examples are sorted by length together
STEPS_BETWEEN_CHECKS = 50  # after so many steps the loss is read and must be finite
Pair = tuple[TensorTree, TensorTree]  # prediction and target of a batch
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

    With several ranks this one takes its share of each batch, and the loss is that of all.

    Raises Diverged, with the step and the part of the loss, when the loss is not finite.
    """
    ranks = context.device_context.ranks
    seed_everything(seed * 1_000_003 + epoch + SEED_STRIDE * ranks.rank)
    view = (epoch - 1) % context.train.views if context.train.views else epoch - 1
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
    check = LossCheck(epoch, context.device_context.device, ranks)
    shares = [ranks.shares(group) for group in groups]
    steps = [own for own, _ in shares]
    feed = feed_batches(context, context.train, steps, training.micro_batch_size.split_batch, view)
    with feed:
        for step, group in enumerate(groups):
            mixing = draw_mixing(recipe, seed, epoch, step + 1)
            compute = partial(
                backward, context, feed, step, training, mixing, weight=shares[step][1]
            )
            if ranks.count == 1:
                parts = retry_on_oom(compute, training.micro_batch_size, max(map(len, group)))
            else:  # the other ranks would wait for gradients; `rank_launcher` begins again
                parts = compute()
            training.step(recipe.clip_norm)
            check.add(parts, sum(map(len, group)))
    return check.finish() / len(context.train)


class LossCheck:
    """Adds up the losses of an epoch and looks now and then whether they are finite.

    Reading a number of a GPU waits until the GPU has computed it. So every STEPS_BETWEEN_CHECKS
    steps the total begins its way to the CPU, and it is read when it has arrived. Several ranks
    look at the end of the epoch, because all of them must end it at the same step.
    """

    def __init__(self, epoch: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.epoch, self.ranks = epoch, ranks
        self.total = torch.zeros((), device=device)
        self.steps = 0
        self.unchecked: list[LossParts] = []  # those of the last steps
        self.copy: HostCopy | None = None  # of the total after `copied_steps`
        self.copied_steps = 0

    def add(self, parts: LossParts, example_count: int) -> None:
        """Takes in the mean loss of a step. Raises Diverged."""
        self.total += sum_parts(parts) * example_count
        self.unchecked.append(parts)
        self.steps += 1
        if self.ranks.count > 1:
            del self.unchecked[:-STEPS_BETWEEN_CHECKS]
            return
        if self.copy is None and self.steps % STEPS_BETWEEN_CHECKS == 0:
            self.copy, self.copied_steps = HostCopy({"total": self.total}), self.steps
        if self.copy is not None and self.copy.is_ready():
            self._read(self.copy)
            self.copy = None

    def finish(self) -> float:
        """The sum of the losses of all examples. Waits for the device. Raises Diverged."""
        self.copied_steps = self.steps
        return self._read(HostCopy({"total": self.ranks.mean(self.total)}))

    def _read(self, copy: HostCopy) -> float:
        total = float(copy.wait()["total"])
        first_step = self.steps - len(self.unchecked) + 1
        if not math.isfinite(total):
            reason = describe_divergence(self.unchecked, first_step)
            raise Diverged(f"{reason} in epoch {self.epoch}")
        del self.unchecked[: self.copied_steps - first_step + 1]
        return total


def feed_batches(
    context: TrainingContext,
    source: Source,
    steps: Sequence[Sequence[Tensor]],
    split: Callable[[Tensor], Sequence[Tensor]],
    view: int = 0,
) -> BatchFeed:
    """The batches of one pass over a source, made ahead where that pays."""
    stream = side_stream_for(source, view, context.device_context.device)
    return BatchFeed(source, view, steps, split, stream)


def freeze_waiting_stages(net: nn.Module, unfreeze_every: int, epoch: int) -> None:
    """Freezes the stages of `net` that are not trained yet in `epoch`, and unfreezes the others.

    The head is trained from the first epoch, and one more stage after each `unfreeze_every` epochs
    (gradual unfreezing: Howard and Ruder, ULMFiT, ACL 2018). A stage that waits has no gradients
    and is in eval mode, so its BatchNorm does not change. The optimizer leaves parameters without a
    gradient alone, their weight decay included.
    """
    if not unfreeze_every:
        return
    stages = dict(net.named_children())
    waiting = list(stages)[: max(0, len(stages) - 1 - (epoch - 1) // unfreeze_every)]
    for name, parameter in trained_parameters(net).items():
        parameter.requires_grad_(name.partition(".")[0] not in waiting)
    for name in waiting:
        stages[name].eval()


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
    feed: BatchFeed,
    step: int,
    training: TrainingState,
    mixing: BatchMixing | None = None,
    weight: float = 1.0,
) -> LossParts:
    """Computes the gradients of the mean loss of the batches of a step, which stay in the net.

    The batches of an optimizer step are computed one after another, and one that is larger than the
    micro-batch size in micro-batches, each weighted by its number of examples. The result is the
    gradient of all of them as one batch where a loss is a mean over examples. It is an
    approximation where the loss is a mean over something else (the tokens of texts, the pixels that
    are not ignored, the objects), and in BatchNorm, whose statistics are those of a micro-batch.
    Examples are mixed with others of their micro-batch.

    The mean loss is multiplied by `weight`. Of several ranks each has its share of the batches, and
    the gradients that stay are the mean over the ranks.

    Returns the parts of the loss, detached.
    """
    training.optimizer.zero_grad(set_to_none=True)
    totals: LossParts = {}
    losses = training.losses or StepLosses(context.net, context.task.loss_parts)
    count = left = sum(map(len, feed.steps[step]))
    for micro_batch, batch in feed.parts(step):
        left -= len(micro_batch)
        factor = weight * len(micro_batch) / count
        with without_exchange(losses) if left else nullcontext():
            with context.device_context.autocast():
                parts = losses(batch, mixing)
            weighted = {
                name: part if factor == 1 else part * factor for name, part in parts.items()
            }
            training.backward(sum_parts(weighted))
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


def score_source(
    context: TrainingContext, source: Source, batch_size: int
) -> tuple[dict[str, float], PredictionPairs]:
    """The scores of the net on all examples of `source`, and its predictions.

    The task scores batches where they were computed, while they are on their way to the CPU, or on
    the CPU, each while the device computes the next one. On the CPU they stay, so that a GPU has
    those of two batches at most.
    """
    copies: list[Callable[[], Pair]] = []

    def pairs() -> Iterator[Pair]:
        for pair in predict_batches(context, source, batch_size):
            copies.append(begin_pair_copy(pair))
            if not context.task.scores_on_cpu:
                yield pair
            elif len(copies) > 1:
                yield copies[-2]()
        if context.task.scores_on_cpu:
            yield copies[-1]()

    batches = pairs()
    scores = context.task.score(batches)
    deque(batches, maxlen=0)  # a score may need no predictions
    return scores, [wait() for wait in copies]


def predict_source(context: TrainingContext, source: Source, batch_size: int) -> PredictionPairs:
    """The net's predictions for all examples of `source`, in order, in eval mode, on the CPU."""
    batches = predict_batches(context, source, batch_size)
    return [wait() for wait in [begin_pair_copy(pair) for pair in batches]]


def begin_pair_copy(pair: Pair) -> Callable[[], Pair]:
    """Begins to copy a prediction and its target to the CPU. The function that is returned waits
    for them and gives them; called again, it gives the same.
    """
    waits = [begin_copy_to_cpu(tree) for tree in pair]
    return functools.cache(lambda: (waits[0](), waits[1]()))


@torch.no_grad()
def predict_batches(context: TrainingContext, source: Source, batch_size: int) -> Iterator[Pair]:
    """Yields prediction and target of each batch of `source`, as the device computes them."""
    context.net.eval()
    batches = torch.split(torch.arange(len(source)), min(MAX_EVAL_BATCH, 4 * batch_size))
    steps = [[index] for index in batches]
    with feed_batches(context, source, steps, lambda index: [index]) as feed:
        for step in range(len(steps)):
            for _, batch in feed.parts(step):
                with context.device_context.autocast():
                    predicted = context.task.predict(context.net, batch.x)
                yield predicted, split_weights(batch.y)[0]  # weights count in the loss alone
