"""One training: `fit` yields the epochs of what `prepare_training` made."""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from tuner.config.objective import is_improvement
from tuner.config.run import Recipe, Run
from tuner.core.adapters import load_trained_state, trained_state
from tuner.core.device_transfers import copies_asynchronously
from tuner.messages import Epoch
from tuner.training import batch_norm
from tuner.training.checkpoints import Checkpoints, RestoredProgress, TrainingState
from tuner.training.data_parallel import Dismissed, TrainingTurns, make_losses
from tuner.training.epoch import (
    MAX_EVAL_BATCH,
    Diverged,
    PredictionPairs,
    TrainingContext,
    group_batches,
    predict_source,
    score_source,
    shuffle_into_batches,
    train_one_epoch,
)
from tuner.training.micro_batches import initial_micro_batch_size
from tuner.training.optimizers import make_optimizer, make_scaler, make_schedule, stage_rates
from tuner.training.own_metric import metric_key, score_own_metric
from tuner.training.weight_average import WeightAverage


@dataclass(frozen=True)
class BestEpoch:
    """The epoch with the best score so far.

    `predictions` are its (prediction, truth) pairs on the validation examples. `weights` is the
    state dict of the suffix after it; it is empty where `epoch` is a mean over folds.
    """

    epoch: Epoch
    predictions: PredictionPairs
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class FitProgress:
    """What `fit` yields after each epoch.

    Every item carries the best epoch so far, because a training may end at any epoch: it is
    pruned, or it diverges. `best` is None while no epoch has scores, as with fit: train+valid.
    """

    epoch: Epoch
    predictions: PredictionPairs
    best: BestEpoch | None


@dataclass(frozen=True)
class EpochOutcome:
    """An epoch that was trained now or replayed from a checkpoint.

    `weights` is None after a trained epoch: the training state still has them. Of the replayed
    epochs only the best one has weights and predictions, since a checkpoint keeps no others.
    """

    epoch: Epoch
    predictions: PredictionPairs
    weights: dict[str, Tensor] | None


def open_checkpoints(
    run: Run, context: TrainingContext, folder: Path | None, *, keep_best_weights: bool = False
) -> Checkpoints | None:
    """The checkpoints in `folder` of this run, dataset and metric; None without a folder."""
    if folder is None:
        return None
    metric = metric_key(context.metric, context.direction)
    key = f"{run.digest()} {context.dataset.digest} {metric}"
    run_key = hashlib.sha256(key.encode()).hexdigest()
    return Checkpoints(
        folder,
        run_key,
        keep_best_weights=keep_best_weights,
        in_background=copies_asynchronously(context.device_context.device),
    )


def fit(
    context: TrainingContext,
    recipe: Recipe,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> Iterator[FitProgress]:
    """Trains `context.net`. When the training is complete, the net has the best epoch's weights.

    With `checkpoints` the training goes on where an earlier attempt was killed. The epochs of that
    attempt are yielded first, because pruning and early stopping must hear all of them. Without
    validation (fit: train+valid) the last epoch's weights stay. Equal seeds give equal epochs on
    one machine.

    With several ranks every one of them calls it. Only rank 0 has scores, writes checkpoints and
    returns.

    Args:
        context: What `prepare_training` made.
        recipe: How to train.
        seed: From it and the epoch's number follow all random states.
        checkpoints: Where the training is saved and continued from; None: nowhere.

    Yields:
        Each epoch when it has ended, with the best epoch so far.

    Raises:
        Diverged: The loss or a score is not finite.
        StorageError: A checkpoint cannot be written.
        Dismissed: The training has ended, on a rank other than 0.
    """
    ranks = context.device_context.ranks
    turns = ranks.begin_training()
    train = fit_with_checkpoints if ranks.is_first else follow_training
    try:
        yield from train(context, recipe, seed, checkpoints, turns)
        if checkpoints is not None:
            checkpoints.finish()
    finally:
        turns.end()
        if checkpoints is not None:  # nobody writes after the training, however it ends
            checkpoints.abandon()


def fit_with_checkpoints(
    context: TrainingContext,
    recipe: Recipe,
    seed: int,
    checkpoints: Checkpoints | None,
    turns: TrainingTurns,
) -> Iterator[FitProgress]:
    """The epochs of `fit`. At the end the last checkpoint may still be being written."""
    training, restored = begin_or_continue(context, recipe, seed, checkpoints)
    replayed = len(restored.epochs) if restored else 0
    epochs: list[Epoch] = []
    best: BestEpoch | None = None
    for outcome in chain(
        replay_epochs(context, training, restored, recipe.batch_size),
        train_epochs(context, recipe, training, seed, replayed, turns),
    ):
        epochs.append(outcome.epoch)
        if is_better(outcome.epoch, best, context):
            weights = outcome.weights
            if weights is None:
                weights = training.copy_validated_weights()
            best = BestEpoch(outcome.epoch, outcome.predictions, weights)
        if checkpoints is not None and outcome.weights is None:
            checkpoints.save_if_due(
                training,
                epochs,
                best.epoch.number if best else 0,
                best.weights if best else {},
            )
        notes = drain_notes(training, checkpoints)
        yield FitProgress(replace(outcome.epoch, notes=notes), outcome.predictions, best)
        if is_out_of_patience(recipe, outcome.epoch, best):
            break
    if best is None and training.average is not None:
        training.average.swap()
    if best is not None:
        load_trained_state(context.net, best.weights)
        if checkpoints is not None:
            checkpoints.save_best_weights(context.staged_model.model, context.net)


def follow_training(
    context: TrainingContext,
    recipe: Recipe,
    seed: int,
    checkpoints: Checkpoints | None,
    turns: TrainingTurns,
) -> Iterator[FitProgress]:
    """The epochs on a rank other than 0, without scores; then Dismissed."""
    training, restored = begin_or_continue(context, recipe, seed, checkpoints)
    earlier = restored.epochs if restored else []
    for epoch in earlier:  # so that folds stay in step
        yield FitProgress(replace(epoch, scores={}), [], None)
    for outcome in train_epochs(context, recipe, training, seed, len(earlier), turns):
        yield FitProgress(outcome.epoch, [], None)
    raise Dismissed


def begin_or_continue(
    context: TrainingContext, recipe: Recipe, seed: int, checkpoints: Checkpoints | None
) -> tuple[TrainingState, RestoredProgress | None]:
    """The state of a training before its next epoch, and what a checkpoint has of earlier ones."""
    training = start_training(context, recipe, seed)
    restored = checkpoints.restore_newest(training) if checkpoints is not None else None
    if restored is None:
        adopt_training_statistics(context, recipe, training)
    context.device_context.ranks.synchronize(context.net)
    return training, restored


def start_training(context: TrainingContext, recipe: Recipe, seed: int) -> TrainingState:
    """The state of a training before its first epoch."""
    rates = stage_rates(context.staged_model, recipe)
    optimizer = make_optimizer(context.net, recipe, rates)
    batches = shuffle_into_batches(
        len(context.train), recipe.batch_size, seed, 1, context.train.lengths
    )
    steps = recipe.epochs * len(group_batches(batches, recipe.accumulate))
    schedule = make_schedule(optimizer, recipe, steps)
    device_context = context.device_context
    share = math.ceil(recipe.batch_size / device_context.ranks.count)
    micro_batch_size = initial_micro_batch_size(context.net, share, device_context.micro_batches)
    average = WeightAverage(context.net, recipe.ema) if recipe.ema else None
    scaler = make_scaler(optimizer, device_context.device, device_context.precision)
    losses = make_losses(context.net, context.task.loss_parts, device_context.ranks)
    return TrainingState(
        context.net, optimizer, schedule, micro_batch_size, average, scaler, losses
    )


def adopt_training_statistics(
    context: TrainingContext, recipe: Recipe, training: TrainingState
) -> None:
    """Gives pretrained BatchNorm the statistics of training examples, where the recipe adapts them;
    see `batch_norm`.

    The average of the weights begins after that.
    """
    if not context.pretrained_norms or not batch_norm.statistics_adapt(recipe):
        return
    batch_norm.adopt_statistics(
        context.net,
        context.pretrained_norms,
        lambda: run_training_examples(context, recipe.batch_size),
    )
    if training.average is not None:
        training.average.restart()


def run_training_examples(context: TrainingContext, batch_size: int) -> None:
    """Sends a sample of the training examples through the net, from which the statistics of
    BatchNorm are computed.

    It is the first view, the examples as they are: the statistics normalise what is validated,
    tested and predicted.
    """
    count = min(len(context.train), batch_norm.CALIBRATION_EXAMPLES)
    order = torch.randperm(len(context.train), generator=torch.Generator().manual_seed(0))[:count]
    batches = list(torch.split(order, min(MAX_EVAL_BATCH, 4 * batch_size)))
    if len(batches) > 1 and len(batches[-1]) == 1:  # a batch of one may have no variance
        batches[-2:] = [torch.cat(batches[-2:])]
    for index in batches:
        with context.device_context.autocast():
            context.task.predict(context.net, context.train.take(index, 0).x)


def replay_epochs(
    context: TrainingContext,
    training: TrainingState,
    restored: RestoredProgress | None,
    batch_size: int,
) -> Iterator[EpochOutcome]:
    """Yields the epochs of an earlier attempt; `training` already has the state after the last one.

    A checkpoint does not hold predictions, so those of the best epoch are computed again.
    """
    if restored is None:
        return
    for epoch in restored.epochs:
        if epoch.number != restored.best_epoch:
            yield EpochOutcome(epoch, [], {})
            continue
        latest_weights = copy_state(context)
        load_trained_state(context.net, restored.best_weights)
        size = min(batch_size, training.micro_batch_size.value)
        predictions = predict_source(context, context.valid, size)
        load_trained_state(context.net, latest_weights)
        yield EpochOutcome(epoch, predictions, restored.best_weights)


def train_epochs(
    context: TrainingContext,
    recipe: Recipe,
    training: TrainingState,
    seed: int,
    replayed: int,
    turns: TrainingTurns,
) -> Iterator[EpochOutcome]:
    """Trains the epochs after the `replayed` ones, as long as they are to be trained, and yields
    each. Raises Diverged.
    """
    for number in range(replayed + 1, last_epoch(recipe) + 1):
        if not turns.goes_on(number):
            return
        yield run_epoch(context, recipe, training, seed, number)


def run_epoch(
    context: TrainingContext, recipe: Recipe, training: TrainingState, seed: int, number: int
) -> EpochOutcome:
    """Trains one epoch and scores it where it is validated. Raises Diverged."""
    start = time.monotonic()
    loss = train_one_epoch(context, recipe, training, seed, number)
    predictions: PredictionPairs = []
    scores: dict[str, float] = {}
    if is_validated(recipe, number) and context.device_context.ranks.is_first:
        size = min(recipe.batch_size, training.micro_batch_size.value)
        with training.validated_weights():
            scores, predictions = score_source(context, context.valid, size)
    bad_scores = [
        f", {name} {value:g}" for name, value in scores.items() if not math.isfinite(value)
    ]
    if bad_scores or not math.isfinite(loss):
        raise Diverged(f"loss {loss:g}{''.join(bad_scores)} in epoch {number}")
    temperature, thresholds = None, None
    if predictions:
        scores |= score_own_metric(context.metric, predictions)
        # of each epoch: a fold does not know which epoch has the best mean over the folds
        temperature = context.task.fit_temperature(predictions)
        thresholds = context.task.fit_thresholds(predictions)
    seconds = time.monotonic() - start
    epoch = Epoch(number, loss, scores, seconds, temperature, thresholds or ())
    return EpochOutcome(epoch, predictions, None)


def is_validated(recipe: Recipe, number: int) -> bool:
    """Whether epoch `number` is scored: each `validate_every`-th, and the last."""
    is_due = number % recipe.validate_every == 0 or number == last_epoch(recipe)
    return is_due and recipe.fit == "train"


def last_epoch(recipe: Recipe) -> int:
    """The number of the last epoch, unless patience ends the training earlier."""
    return min(recipe.epochs, recipe.stop_epoch or recipe.epochs)


def is_better(epoch: Epoch, best: BestEpoch | None, context: TrainingContext) -> bool:
    """Whether `epoch` has a better score than the best epoch so far.

    An equal score is not better.
    """
    if not epoch.scores:
        return False
    metric = context.metric
    return best is None or is_improvement(
        epoch.scores[metric], best.epoch.scores[metric], context.direction
    )


def is_out_of_patience(recipe: Recipe, epoch: Epoch, best: BestEpoch | None) -> bool:
    """Whether early stopping ends the training after `epoch`, which must have scores."""
    if not recipe.patience or best is None or not epoch.scores:
        return False
    return epoch.number - best.epoch.number >= recipe.patience


def copy_state(context: TrainingContext) -> dict[str, Tensor]:
    """A copy of the state of the net that is trained."""
    return {name: value.detach().clone() for name, value in trained_state(context.net).items()}


def drain_notes(training: TrainingState, checkpoints: Checkpoints | None) -> tuple[str, ...]:
    """Takes the notes that were made since the last call; the user reads each of them once."""
    drained: list[str] = []
    for notes in (training.micro_batch_size.notes, checkpoints.notes if checkpoints else []):
        drained += notes
        notes.clear()
    return tuple(drained)
