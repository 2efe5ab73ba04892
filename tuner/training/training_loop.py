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
from tuner.core.types import Data, Source
from tuner.errors import DataError, SpaceError
from tuner.files.atomic import atomic_folder, disk_errors
from tuner.files.cache_entries import opened, seal, tidy
from tuner.messages import Epoch
from tuner.training import activation_cache
from tuner.training.building import Ready, built, load, task_of
from tuner.training.checkpoints import Checkpoints, Training
from tuner.training.devices import Place
from tuner.training.epoch import Bench, Pairs, batches, learn, predictions
from tuner.training.micro_batches import room
from tuner.training.optimizers import factor, optimizer

PROBED = "head.safetensors"
PROBE = Recipe(
    optimizer="adamw", lr=1e-3, epochs=20, batch_size=64, schedule="cosine", head="fresh"
)


class Diverged(Exception):
    """The loss or a score is NaN or infinite."""


@dataclass
class Best:
    """The best epoch so far: its weights (a state dict of the suffix) and its (prediction, truth) pairs."""

    epoch: Epoch | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=list)
    latest: Pairs = field(default_factory=list)  # of the epoch that ended last


def prepare(run: Run, place: Place, metric: str) -> Bench:
    """Builds data and model and cuts the model where the recipe says. Raises DataError, SpaceError, and Diverged."""
    data = load(run, place.home)
    staged, names = built(run, place, len(data.classes))
    depth = run.recipe.freeze_depth
    if depth > staged.max_depth:
        raise SpaceError(
            f"recipe.freeze_depth: {depth}, but {run.model.name} allows 0..{staged.max_depth}"
        )
    staged.model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learn = data.full if run.recipe.fit == "train+valid" else data.train

    def bench(depth: int, recipe: Recipe) -> Bench:
        prefix, net = staged.split(depth)
        frozen = activation_cache.Prefix(
            list(prefix.children()), names[:depth], place.device, place.autocast
        )

        def feed(source: Source) -> Source:
            return activation_cache.through(frozen, Ready(source, data.wanted, place), place.limits)

        task = task_of(replace(run, recipe=recipe), data.classes)
        return Bench(
            task, staged, net, data, feed(learn), feed(data.valid), feed(data.test), place, metric
        )

    if (
        run.recipe.head == "probe"
        and staged.probe
        and staged.max_depth > 0
        and run.model.options.get("weights") != "none"
    ):
        recipe = PROBE.model_copy(update={"fit": run.recipe.fit})
        key = f"{names[-2:]} {learn.digest} {data.valid.digest} {data.wanted} {run.task.tree()} {metric} {recipe}"
        head = list(staged.stages.values())[-1]
        probe(
            head,
            place.home / "probes",
            key,
            lambda: fit(bench(staged.max_depth, recipe), recipe, 0),
        )
    return bench(depth, run.recipe)


def probe(head: nn.Module, folder: Path, key: str, training: Callable[[], Iterator[Epoch]]) -> None:
    """Gives `head` what `training` makes of it over the outputs of all other stages, or what it made of it before.

    Linear probing before fine-tuning: the gradients of a random head would distort what the other stages have learnt
    (Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022).
    """
    place = folder / hashlib.sha256(f"3 {key}".encode()).hexdigest()[:32]

    def make() -> None:
        for linear in [module for module in head.modules() if isinstance(module, nn.Linear)][-1:]:
            nn.init.zeros_(
                linear.weight
            )  # a head drawn at random is a guess that the probe would have to unlearn
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        deque(training(), maxlen=0)
        tidy(folder, 0.0)
        with atomic_folder(place, what="probe") as temporary:
            save_file(
                {name: value.contiguous() for name, value in head.state_dict().items()},
                temporary / PROBED,
            )
            seal(temporary)

    with disk_errors(place):
        folder.mkdir(parents=True, exist_ok=True)
        held = opened(place, make)
    head.load_state_dict(load_file(held.folder / PROBED))


def checkpoints_of(
    run: Run, bench: Bench, folder: Path | None, *, keep: bool = False
) -> Checkpoints | None:
    """The checkpoints in `folder` of this run on this data, searched for this metric."""
    key = f"{run.digest()} {bench.data.digest} {bench.metric}"
    return (
        Checkpoints(folder, hashlib.sha256(key.encode()).hexdigest(), keep=keep)
        if folder is not None
        else None
    )


def fit(
    bench: Bench,
    recipe: Recipe,
    seed: int,
    best: Best | None = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Epoch]:
    """Trains `bench.net`, yielding each epoch as it ends, and leaves the best epoch's weights in place.

    With `checkpoints` it goes on where an earlier attempt was killed, and first yields again the epochs that this one got through: what
    decides on pruning and early stopping hears all of them. Without validation (fit: train+valid) the last epoch is the best. Equal
    seeds give equal epochs on one machine. Raises Diverged when the loss or a score is not finite, StorageError.
    """
    best = best if best is not None else Best()
    opt = optimizer(bench.net.parameters(), recipe)
    steps = recipe.epochs * len(
        batches(len(bench.train), recipe.batch_size, seed, 1, bench.train.lengths)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: factor(recipe, step, steps))
    fits = room(bench.net, recipe.batch_size, bench.place.parts)
    training = Training(bench.net, opt, schedule, fits)
    past = remembered(bench, training, recipe.batch_size, checkpoints)
    epochs: list[Epoch] = []
    for number in range(1, min(recipe.epochs, recipe.stop_epoch or recipe.epochs) + 1):
        again = number <= len(past)
        epoch, best.latest, weights = (
            past[number - 1] if again else trained(bench, recipe, training, seed, number)
        )
        epochs.append(epoch)
        if epoch.scores and (
            best.epoch is None or epoch.scores[bench.metric] > best.epoch.scores[bench.metric]
        ):
            best.epoch, best.pairs = epoch, best.latest
            best.weights = (
                weights
                if again
                else {k: v.detach().clone() for k, v in bench.net.state_dict().items()}
            )
        if checkpoints is not None and not again:
            checkpoints.save(training, epochs, best.epoch.number if best.epoch else 0, best.weights)
        yield replace(
            epoch,
            notes=taken(training.room.notes, checkpoints.notes if checkpoints is not None else []),
        )
        if recipe.patience and best.epoch and number - best.epoch.number >= recipe.patience:
            break
    if best.epoch:
        bench.net.load_state_dict(best.weights)
        if checkpoints is not None:
            checkpoints.finish(bench.staged.model, bench.net)


Ended = tuple[Epoch, Pairs, dict[str, Tensor]]
"""An epoch, its predictions, and the weights after it. Of those remembered only the best one has them, the others none."""


def remembered(
    bench: Bench, training: Training, size: int, checkpoints: Checkpoints | None
) -> list[Ended]:
    """The epochs of an earlier attempt, after whose last one `training` then is."""
    found = checkpoints.load(training) if checkpoints is not None else None
    if found is None:
        return []
    best: tuple[Pairs, dict[str, Tensor]] = [], found.weights
    if found.best:  # what it predicted is not kept, but predicted again
        latest = {k: v.clone() for k, v in bench.net.state_dict().items()}
        bench.net.load_state_dict(found.weights)
        best = predictions(bench, bench.valid, min(size, training.room.size)), found.weights
        bench.net.load_state_dict(latest)
    return [(epoch, *(best if epoch.number == found.best else ([], {}))) for epoch in found.epochs]


def trained(bench: Bench, recipe: Recipe, training: Training, seed: int, number: int) -> Ended:
    """One epoch more. Raises Diverged."""
    start = time.monotonic()
    loss = learn(bench, recipe, training, seed, number)
    validated, size = recipe.fit == "train", min(recipe.batch_size, training.room.size)
    pairs = predictions(bench, bench.valid, size) if validated else []
    scores = bench.task.score(pairs) if validated else {}
    if not math.isfinite(loss) or not all(map(math.isfinite, scores.values())):
        raise Diverged(f"loss {loss:g} in epoch {number}")
    return Epoch(number, loss, scores, time.monotonic() - start), pairs, {}


def taken(*places: list[str]) -> tuple[str, ...]:
    """What there is to say, once."""
    found = tuple(note for notes in places for note in notes)
    for notes in places:
        notes.clear()
    return found


def check_batches(data: Data, run: Run) -> list[str]:
    """Warnings about a batch size that the data cannot fill. Raises DataError when there is nothing to train on."""
    count = len(data.train)
    if count < 2:
        raise DataError(f"data: {count} training examples; at least 2 are needed")
    if run.recipe.batch_size > count:
        return [
            f"recipe.batch_size: {run.recipe.batch_size}, but there are {count} training examples; each epoch is one batch of {count}"
        ]
    return []
