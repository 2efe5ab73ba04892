"""One training: `prepare` builds what a run names, `fit` is a generator of epochs. No Optuna here."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.config.run import Recipe, Run
from tuner.core.types import Dataset, Source
from tuner.errors import DataError, SpaceError
from tuner.files.atomic import atomic_folder, disk_errors
from tuner.files.cache_entries import make_space, open_or_create, write_checksums
from tuner.messages import Epoch
from tuner.training import activation_cache
from tuner.training.building import DeviceSource, build_task, copy_cached_model, load_dataset
from tuner.training.checkpoints import Checkpoints, TrainingState
from tuner.training.devices import DeviceContext
from tuner.training.epoch import (
    PredictionPairs,
    TrainingContext,
    predict_source,
    shuffle_into_batches,
    train_one_epoch,
)
from tuner.training.micro_batches import initial_micro_batch_size
from tuner.training.optimizers import lr_factor, make_optimizer

PROBED_HEAD_FILE = "head.safetensors"
PROBE_RECIPE = Recipe(
    optimizer="adamw", lr=1e-3, epochs=20, batch_size=64, schedule="cosine", head="fresh"
)


class Diverged(Exception):
    """The loss or a score is NaN or infinite."""


@dataclass
class BestEpoch:
    """The best epoch so far: its weights (a state dict of the suffix) and its (prediction, truth) pairs."""

    epoch: Epoch | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    predictions: PredictionPairs = field(default_factory=list)
    latest_predictions: PredictionPairs = field(
        default_factory=list
    )  # of the epoch that ended last


def prepare_training(run: Run, device_context: DeviceContext, metric: str) -> TrainingContext:
    """Builds data and model and cuts the model where the recipe says. Raises DataError, SpaceError, and Diverged."""
    data = load_dataset(run, device_context.home)
    staged, names = copy_cached_model(run, device_context, len(data.classes))
    depth = run.recipe.freeze_depth
    if depth > staged.max_depth:
        raise SpaceError(
            f"recipe.freeze_depth: {depth}, but {run.model.name} allows 0..{staged.max_depth}"
        )
    staged.model.to(device_context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learn = data.full if run.recipe.fit == "train+valid" else data.train

    def bench(depth: int, recipe: Recipe) -> TrainingContext:
        prefix, net = staged.split(depth)
        frozen = activation_cache.FrozenPrefix(
            list(prefix.children()), names[:depth], device_context.device, device_context.autocast
        )

        def feed(source: Source) -> Source:
            return activation_cache.source_behind(
                frozen,
                DeviceSource(source, data.input_spec, device_context),
                device_context.cache_limits,
            )

        task = build_task(replace(run, recipe=recipe), data.classes)
        return TrainingContext(
            task,
            staged,
            net,
            data,
            feed(learn),
            feed(data.valid),
            feed(data.test),
            device_context,
            metric,
        )

    if (
        run.recipe.head == "probe"
        and staged.can_probe
        and staged.max_depth > 0
        and run.model.options.get("weights") != "none"
    ):
        recipe = PROBE_RECIPE.model_copy(update={"fit": run.recipe.fit})
        key = f"{names[-2:]} {learn.digest} {data.valid.digest} {data.input_spec} {run.task.to_dict()} {metric} {recipe}"
        head = list(staged.stages.values())[-1]
        load_or_train_probe(
            head,
            device_context.home / "probes",
            key,
            lambda: fit(bench(staged.max_depth, recipe), recipe, 0),
        )
    return bench(depth, run.recipe)


def load_or_train_probe(
    head: nn.Module, folder: Path, run_key: str, training: Callable[[], Iterator[Epoch]]
) -> None:
    """Gives `head` what `training` makes of it over the outputs of all other stages, or what it made of it before.

    Linear probing before fine-tuning: the gradients of a random head would distort what the other stages have learnt
    (Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022).
    """
    place = folder / hashlib.sha256(f"3 {run_key}".encode()).hexdigest()[:32]

    def make() -> None:
        for linear in [module for module in head.modules() if isinstance(module, nn.Linear)][-1:]:
            nn.init.zeros_(
                linear.weight
            )  # a head drawn at random is a guess that the probe would have to unlearn
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        deque(training(), maxlen=0)
        make_space(folder, 0.0)
        with atomic_folder(place, crash_prefix="probe") as temporary:
            save_file(
                {name: value.contiguous() for name, value in head.state_dict().items()},
                temporary / PROBED_HEAD_FILE,
            )
            write_checksums(temporary)

    with disk_errors(place):
        folder.mkdir(parents=True, exist_ok=True)
        held = open_or_create(place, make)
    head.load_state_dict(load_file(held.folder / PROBED_HEAD_FILE))


def open_checkpoints(
    run: Run, context: TrainingContext, folder: Path | None, *, keep_best_weights: bool = False
) -> Checkpoints | None:
    """The checkpoints in `folder` of this run on this data, searched for this metric."""
    key = f"{run.digest()} {context.dataset.digest} {context.metric}"
    return (
        Checkpoints(
            folder, hashlib.sha256(key.encode()).hexdigest(), keep_best_weights=keep_best_weights
        )
        if folder is not None
        else None
    )


def fit(
    context: TrainingContext,
    recipe: Recipe,
    seed: int,
    best: BestEpoch | None = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Epoch]:
    """Trains `bench.net`, yielding each epoch as it ends, and leaves the best epoch's weights in place.

    With `checkpoints` it goes on where an earlier attempt was killed, and first yields again the epochs that this one got through: what
    decides on pruning and early stopping hears all of them. Without validation (fit: train+valid) the last epoch is the best. Equal
    seeds give equal epochs on one machine. Raises Diverged when the loss or a score is not finite, StorageError.
    """
    best = best if best is not None else BestEpoch()
    opt = make_optimizer(context.net.parameters(), recipe)
    steps = recipe.epochs * len(
        shuffle_into_batches(len(context.train), recipe.batch_size, seed, 1, context.train.lengths)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: lr_factor(recipe, step, steps))
    fits = initial_micro_batch_size(
        context.net, recipe.batch_size, context.device_context.micro_batches
    )
    training = TrainingState(context.net, opt, schedule, fits)
    past = replay_epochs(context, training, recipe.batch_size, checkpoints)
    epochs: list[Epoch] = []
    for number in range(1, min(recipe.epochs, recipe.stop_epoch or recipe.epochs) + 1):
        again = number <= len(past)
        epoch, best.latest_predictions, weights = (
            past[number - 1] if again else run_epoch(context, recipe, training, seed, number)
        )
        epochs.append(epoch)
        if epoch.scores and (
            best.epoch is None or epoch.scores[context.metric] > best.epoch.scores[context.metric]
        ):
            best.epoch, best.predictions = epoch, best.latest_predictions
            best.weights = (
                weights
                if again
                else {k: v.detach().clone() for k, v in context.net.state_dict().items()}
            )
        if checkpoints is not None and not again:
            checkpoints.save_if_due(
                training, epochs, best.epoch.number if best.epoch else 0, best.weights
            )
        yield replace(
            epoch,
            notes=drain_notes(
                training.micro_batch_size.notes,
                checkpoints.notes if checkpoints is not None else [],
            ),
        )
        if recipe.patience and best.epoch and number - best.epoch.number >= recipe.patience:
            break
    if best.epoch:
        context.net.load_state_dict(best.weights)
        if checkpoints is not None:
            checkpoints.save_best_weights(context.staged_model.model, context.net)


EpochOutcome = tuple[Epoch, PredictionPairs, dict[str, Tensor]]
"""An epoch, its predictions, and the weights after it. Of those remembered only the best one has them, the others none."""


def replay_epochs(
    context: TrainingContext, training: TrainingState, size: int, checkpoints: Checkpoints | None
) -> list[EpochOutcome]:
    """The epochs of an earlier attempt, after whose last one `training` then is."""
    found = checkpoints.restore_newest(training) if checkpoints is not None else None
    if found is None:
        return []
    best: tuple[PredictionPairs, dict[str, Tensor]] = [], found.best_weights
    if found.best_epoch:  # what it predicted is not kept, but predicted again
        latest = {k: v.clone() for k, v in context.net.state_dict().items()}
        context.net.load_state_dict(found.best_weights)
        best = (
            predict_source(context, context.valid, min(size, training.micro_batch_size.value)),
            found.best_weights,
        )
        context.net.load_state_dict(latest)
    return [
        (epoch, *(best if epoch.number == found.best_epoch else ([], {}))) for epoch in found.epochs
    ]


def run_epoch(
    context: TrainingContext, recipe: Recipe, training: TrainingState, seed: int, number: int
) -> EpochOutcome:
    """One epoch more. Raises Diverged."""
    start = time.monotonic()
    loss = train_one_epoch(context, recipe, training, seed, number)
    validated, size = recipe.fit == "train", min(recipe.batch_size, training.micro_batch_size.value)
    pairs = predict_source(context, context.valid, size) if validated else []
    scores = context.task.score(pairs) if validated else {}
    if not math.isfinite(loss) or not all(map(math.isfinite, scores.values())):
        raise Diverged(f"loss {loss:g} in epoch {number}")
    return Epoch(number, loss, scores, time.monotonic() - start), pairs, {}


def drain_notes(*note_lists: list[str]) -> tuple[str, ...]:
    """What there is to say, once."""
    found = tuple(note for notes in note_lists for note in notes)
    for notes in note_lists:
        notes.clear()
    return found


def check_batch_size(data: Dataset, run: Run) -> list[str]:
    """Warnings about a batch size that the data cannot fill. Raises DataError when there is nothing to train on."""
    count = len(data.train)
    if count < 2:
        raise DataError(f"data: {count} training examples; at least 2 are needed")
    if run.recipe.batch_size > count:
        return [
            f"recipe.batch_size: {run.recipe.batch_size}, but there are {count} training examples; each epoch is one batch of {count}"
        ]
    return []
