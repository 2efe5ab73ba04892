"""One training: `prepare_training` builds what a run names, `fit` yields its epochs.

No Optuna here.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from tuner.config.run import Recipe, Run
from tuner.core.types import Dataset, Source, StagedModel
from tuner.errors import DataError, SpaceError
from tuner.messages import Epoch
from tuner.training import activation_cache
from tuner.training.building import (
    DeviceSource,
    build_task,
    copy_cached_model,
    load_dataset,
    put_on_device,
)
from tuner.training.checkpoints import Checkpoints, RestoredProgress, TrainingState
from tuner.training.devices import DeviceContext
from tuner.training.epoch import (
    PredictionPairs,
    TrainingContext,
    predict_source,
    shuffle_into_batches,
    train_one_epoch,
)
from tuner.training.frozen_prefix import MAX_EXAMPLES_AT_ONCE, FrozenPrefix
from tuner.training.linear_probe import PROBE_RECIPE, load_or_train_probe
from tuner.training.micro_batches import initial_micro_batch_size
from tuner.training.optimizers import lr_factor, make_optimizer


class Diverged(Exception):
    """The loss or a score is NaN or infinite."""


@dataclass(frozen=True)
class BestEpoch:
    """The epoch with the highest score so far.

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

    `weights` is None after a trained epoch: the net still has them. Of the replayed epochs only
    the best one has weights and predictions, since a checkpoint keeps no others.
    """

    epoch: Epoch
    predictions: PredictionPairs
    weights: dict[str, Tensor] | None


@dataclass(frozen=True)
class LoadedRun:
    """What a run names, loaded: its dataset, and its model with a digest for each stage."""

    run: Run
    dataset: Dataset
    staged_model: StagedModel
    stage_digests: tuple[str, ...]
    device_context: DeviceContext
    metric: str

    @property
    def train_source(self) -> Source:
        """The examples that the run is trained on."""
        is_full = self.run.recipe.fit == "train+valid"
        return self.dataset.full if is_full else self.dataset.train

    def make_context(self, depth: int, recipe: Recipe) -> TrainingContext:
        """The context for a training of the stages behind `depth` by `recipe`."""
        prefix, suffix = self.staged_model.split(depth)
        frozen = FrozenPrefix(
            list(prefix.children()),
            self.stage_digests[:depth],
            self.device_context.device,
            self.device_context.autocast,
            max_batch=min(MAX_EXAMPLES_AT_ONCE, 4 * recipe.batch_size),
        )

        def through_prefix(source: Source) -> Source:
            input_spec = self.dataset.input_spec
            if depth == 0:
                return DeviceSource(source, input_spec, self.device_context)
            on_device = put_on_device(source, input_spec, self.device_context)
            return activation_cache.source_behind(
                frozen, on_device, self.device_context.cache_limits
            )

        return TrainingContext(
            task=build_task(replace(self.run, recipe=recipe), self.dataset.classes),
            staged_model=self.staged_model,
            net=suffix,
            dataset=self.dataset,
            train=through_prefix(self.train_source),
            valid=through_prefix(self.dataset.valid),
            test=through_prefix(self.dataset.test),
            device_context=self.device_context,
            metric=self.metric,
        )


def prepare_training(run: Run, device_context: DeviceContext, metric: str) -> TrainingContext:
    """Builds the data and the model of a run and splits the model at the recipe's freeze depth.

    Args:
        run: The run to train.
        device_context: The device and its precision, and the home of the caches.
        metric: The name of the score that decides which epoch is the best.

    Returns:
        What `fit` trains. Its head begins as the linear probe where the recipe says so.

    Raises:
        DataError: The data or the weights cannot be used.
        SpaceError: The run does not fit the model.
        Diverged: The linear probe diverged.
    """
    dataset = load_dataset(run, device_context.home)
    staged_model, digests = copy_cached_model(run, device_context, len(dataset.classes))
    depth = run.recipe.freeze_depth
    if depth > staged_model.max_depth:
        raise SpaceError(
            f"recipe.freeze_depth: {depth}, but {run.model.name} allows 0..{staged_model.max_depth}"
        )
    staged_model.model.to(  # type: ignore[call-overload]
        device_context.device, memory_format=torch.channels_last
    )
    loaded = LoadedRun(run, dataset, staged_model, digests, device_context, metric)
    if starts_from_probe(run, staged_model):
        probe_head(loaded)
    return loaded.make_context(depth, run.recipe)


def starts_from_probe(run: Run, staged_model: StagedModel) -> bool:
    """Whether the head begins as the linear probe: the features must be pretrained."""
    return (
        run.recipe.head == "probe"
        and staged_model.can_probe
        and staged_model.max_depth > 0
        and run.model.options.get("weights") != "none"
    )


def probe_head(loaded: LoadedRun) -> None:
    """Gives the head its probed weights. Raises Diverged."""
    staged_model = loaded.staged_model
    recipe = PROBE_RECIPE.model_copy(update={"fit": loaded.run.recipe.fit})

    def train() -> None:
        context = loaded.make_context(staged_model.max_depth, recipe)
        deque(fit(context, recipe, seed=0), maxlen=0)

    run_key = (
        f"{loaded.stage_digests[-2:]} {loaded.train_source.digest} {loaded.dataset.valid.digest} "
        f"{loaded.dataset.input_spec} {loaded.run.task.to_dict()} {loaded.metric} {recipe}"
    )
    head = list(staged_model.stages.values())[-1]
    load_or_train_probe(head, loaded.device_context.home / "probes", run_key, train)


def open_checkpoints(
    run: Run, context: TrainingContext, folder: Path | None, *, keep_best_weights: bool = False
) -> Checkpoints | None:
    """The checkpoints in `folder` of this run, dataset and metric; None without a folder."""
    if folder is None:
        return None
    key = f"{run.digest()} {context.dataset.digest} {context.metric}"
    run_key = hashlib.sha256(key.encode()).hexdigest()
    return Checkpoints(folder, run_key, keep_best_weights=keep_best_weights)


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
    """
    training = start_training(context, recipe, seed)
    restored = checkpoints.restore_newest(training) if checkpoints is not None else None
    epochs: list[Epoch] = []
    best: BestEpoch | None = None
    for outcome in chain(
        replay_epochs(context, training, restored, recipe.batch_size),
        train_epochs(context, recipe, training, seed, len(restored.epochs) if restored else 0),
    ):
        epochs.append(outcome.epoch)
        if is_better(outcome.epoch, best, context.metric):
            weights = copy_state(context) if outcome.weights is None else outcome.weights
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
    if best is not None:
        context.net.load_state_dict(best.weights)
        if checkpoints is not None:
            checkpoints.save_best_weights(context.staged_model.model, context.net)


def start_training(context: TrainingContext, recipe: Recipe, seed: int) -> TrainingState:
    """The state of a training before its first epoch."""
    optimizer = make_optimizer(context.net.parameters(), recipe)
    batches = shuffle_into_batches(
        len(context.train), recipe.batch_size, seed, 1, context.train.lengths
    )
    steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(recipe, step, steps)
    )
    micro_batch_size = initial_micro_batch_size(
        context.net, recipe.batch_size, context.device_context.micro_batches
    )
    return TrainingState(context.net, optimizer, schedule, micro_batch_size)


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
        context.net.load_state_dict(restored.best_weights)
        size = min(batch_size, training.micro_batch_size.value)
        predictions = predict_source(context, context.valid, size)
        context.net.load_state_dict(latest_weights)
        yield EpochOutcome(epoch, predictions, restored.best_weights)


def train_epochs(
    context: TrainingContext, recipe: Recipe, training: TrainingState, seed: int, replayed: int
) -> Iterator[EpochOutcome]:
    """Trains the epochs after the `replayed` ones and yields each. Raises Diverged."""
    last = min(recipe.epochs, recipe.stop_epoch or recipe.epochs)
    for number in range(replayed + 1, last + 1):
        yield run_epoch(context, recipe, training, seed, number)


def run_epoch(
    context: TrainingContext, recipe: Recipe, training: TrainingState, seed: int, number: int
) -> EpochOutcome:
    """Trains one epoch and scores it where validation examples are left. Raises Diverged."""
    start = time.monotonic()
    loss = train_one_epoch(context, recipe, training, seed, number)
    predictions: PredictionPairs = []
    scores: dict[str, float] = {}
    if recipe.fit == "train":
        size = min(recipe.batch_size, training.micro_batch_size.value)
        predictions = predict_source(context, context.valid, size)
        scores = context.task.score(predictions)
    if not math.isfinite(loss) or not all(map(math.isfinite, scores.values())):
        raise Diverged(f"loss {loss:g} in epoch {number}")
    return EpochOutcome(Epoch(number, loss, scores, time.monotonic() - start), predictions, None)


def is_better(epoch: Epoch, best: BestEpoch | None, metric: str) -> bool:
    """Whether `epoch` has a higher score than the best epoch so far.

    An equal score is not better.
    """
    if not epoch.scores:
        return False
    return best is None or epoch.scores[metric] > best.epoch.scores[metric]


def is_out_of_patience(recipe: Recipe, epoch: Epoch, best: BestEpoch | None) -> bool:
    """Whether early stopping ends the training after `epoch`."""
    if not recipe.patience or best is None:
        return False
    return epoch.number - best.epoch.number >= recipe.patience


def copy_state(context: TrainingContext) -> dict[str, Tensor]:
    """A copy of the net's state dict."""
    return {name: value.detach().clone() for name, value in context.net.state_dict().items()}


def drain_notes(training: TrainingState, checkpoints: Checkpoints | None) -> tuple[str, ...]:
    """Takes the notes that were made since the last call; the user reads each of them once."""
    drained: list[str] = []
    for notes in (training.micro_batch_size.notes, checkpoints.notes if checkpoints else []):
        drained += notes
        notes.clear()
    return tuple(drained)


def check_batch_size(dataset: Dataset, run: Run) -> list[str]:
    """Warnings about a batch size that the data cannot fill.

    Raises:
        DataError: There are fewer than 2 training examples.
    """
    count = len(dataset.train)
    if count < 2:
        raise DataError(f"data: {count} training examples; at least 2 are needed")
    if run.recipe.batch_size > count:
        return [
            f"recipe.batch_size: {run.recipe.batch_size}, but there are {count} training examples; "
            f"each epoch is one batch of {count}"
        ]
    return []
