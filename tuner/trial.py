"""One training: `prepare` builds what a run names, `fit` is a generator of epochs. No Optuna here."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner import cache
from tuner.building import Ready, built, load, task_of
from tuner.core import Data, Source, Staged, Task
from tuner.devices import Place
from tuner.entries import opened, seal, tidy
from tuner.errors import DataError, SpaceError
from tuner.files import atomic_folder, disk_errors
from tuner.optim import factor, optimizer
from tuner.orders import Epoch
from tuner.run import Recipe, Run

EVAL_BATCH = 64  # at most; and no more than four training batches, which memory is sized for
BUCKET = 32  # batches whose examples are sorted by length together
PROBED = "head.safetensors"
PROBE = Recipe(optimizer="adamw", lr=1e-3, epochs=20, batch_size=64, schedule="cosine", head="fresh")


class Diverged(Exception):
    """The loss or a score is NaN or infinite."""


@dataclass
class Best:
    """The best epoch so far: its weights (a state dict of the suffix) and its (prediction, truth) pairs."""

    epoch: Epoch | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    latest: list[tuple[Any, Any]] = field(default_factory=list)  # of the epoch that ended last


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


def prepare(run: Run, place: Place, metric: str) -> Bench:
    """Builds data and model and cuts the model where the recipe says. Raises DataError, SpaceError, and Diverged."""
    data = load(run, place.home)
    staged, names = built(run, place, len(data.classes))
    depth = run.recipe.freeze_depth
    if depth > staged.max_depth:
        raise SpaceError(f"recipe.freeze_depth: {depth}, but {run.model.name} allows 0..{staged.max_depth}")
    staged.model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learn = data.full if run.recipe.fit == "train+valid" else data.train

    def bench(depth: int, recipe: Recipe) -> Bench:
        prefix, net = staged.split(depth)
        frozen = cache.Prefix(list(prefix.children()), names[:depth], place.device, place.autocast)

        def feed(source: Source) -> Source:
            return cache.through(frozen, Ready(source, data.wanted, place), place.limits)

        task = task_of(replace(run, recipe=recipe), data.classes)
        return Bench(task, staged, net, data, feed(learn), feed(data.valid), feed(data.test), place, metric)

    if run.recipe.head == "probe" and staged.probe and staged.max_depth > 0 and run.model.options.get("weights") != "none":
        recipe = PROBE.model_copy(update={"fit": run.recipe.fit})
        key = f"{names[-2:]} {learn.digest} {data.valid.digest} {data.wanted} {run.task.tree()} {metric} {recipe}"
        head = list(staged.stages.values())[-1]
        probe(head, place.home / "probes", key, lambda: fit(bench(staged.max_depth, recipe), recipe, 0))
    return bench(depth, run.recipe)


def probe(head: nn.Module, folder: Path, key: str, training: Callable[[], Iterator[Epoch]]) -> None:
    """Gives `head` what `training` makes of it over the outputs of all other stages, or what it made of it before.

    Linear probing before fine-tuning: the gradients of a random head would distort what the other stages have learnt
    (Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022).
    """
    place = folder / hashlib.sha256(f"3 {key}".encode()).hexdigest()[:32]

    def make() -> None:
        for linear in [module for module in head.modules() if isinstance(module, nn.Linear)][-1:]:
            nn.init.zeros_(linear.weight)  # a head drawn at random is a guess that the probe would have to unlearn
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        deque(training(), maxlen=0)
        tidy(folder, 0.0)
        with atomic_folder(place, what="probe") as temporary:
            save_file({name: value.contiguous() for name, value in head.state_dict().items()}, temporary / PROBED)
            seal(temporary)

    with disk_errors(place):
        folder.mkdir(parents=True, exist_ok=True)
        held = opened(place, make)
    head.load_state_dict(load_file(held.folder / PROBED))


def fit(bench: Bench, recipe: Recipe, seed: int, best: Best | None = None) -> Iterator[Epoch]:
    """Trains `bench.net`, yielding each epoch as it ends, and leaves the best epoch's weights in place.

    Without validation (fit: train+valid) the last epoch is the best. Equal seeds give equal epochs on one machine.
    Raises Diverged when the loss or a score is not finite.
    """
    best = best if best is not None else Best()
    validated = recipe.fit == "train"
    opt = optimizer(bench.net.parameters(), recipe)
    steps = recipe.epochs * len(batches(len(bench.train), recipe.batch_size, seed, 1, bench.train.lengths))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: factor(recipe, step, steps))
    for number in range(1, min(recipe.epochs, recipe.stop_epoch or recipe.epochs) + 1):
        start = time.monotonic()
        loss = learn(bench, recipe, opt, schedule, seed, number)
        pairs = best.latest = predictions(bench, bench.valid, recipe.batch_size) if validated else []
        scores = bench.task.score(pairs) if validated else {}
        if not math.isfinite(loss) or not all(map(math.isfinite, scores.values())):
            raise Diverged(f"loss {loss:g} in epoch {number}")
        epoch = Epoch(number, loss, scores, time.monotonic() - start)
        if validated and (best.epoch is None or scores[bench.metric] > best.epoch.scores[bench.metric]):
            best.epoch, best.pairs = epoch, pairs
            best.weights = {k: v.detach().clone() for k, v in bench.net.state_dict().items()}
        yield epoch
        if recipe.patience and best.epoch and number - best.epoch.number >= recipe.patience:
            break
    if best.epoch:
        bench.net.load_state_dict(best.weights)


def learn(
    bench: Bench,
    recipe: Recipe,
    opt: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    epoch: int,
) -> float:
    """One pass over the training examples; the mean loss, or the first that is not finite."""
    torch.manual_seed(seed * 1_000_003 + epoch)  # dropout follows (seed, epoch), not what ran before
    bench.net.train()
    view = (epoch - 1) % bench.train.views if bench.train.views else epoch - 1
    total = torch.zeros((), device=bench.place.device)
    chunks = batches(len(bench.train), recipe.batch_size, seed, epoch, bench.train.lengths)
    for step, index in enumerate(chunks):
        batch = bench.train.take(index, view)
        with bench.place.autocast():
            loss = bench.task.loss(bench.net, batch)
        opt.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(bench.net.parameters(), recipe.clip_norm)
        opt.step()
        schedule.step()
        total += loss.detach() * len(index)
        if step % 50 == 49 and not math.isfinite(float(total)):  # reading it waits for the GPU, so not at every step
            break
    return float(total) / len(bench.train)


def batches(length: int, size: int, seed: int, epoch: int, lengths: Tensor | None = None) -> list[Tensor]:
    """A permutation by (seed, epoch), in batches. A last batch of one joins the one before: BatchNorm needs two.

    With `lengths`, examples of like length share a batch, so that little is padded: each run of `BUCKET` batches of the permutation
    is sorted, cut, and the batches are shuffled.
    """
    generator = torch.Generator().manual_seed(seed * 7_368_787 + epoch)
    order = torch.randperm(length, generator=generator)
    if lengths is not None:
        order = torch.cat([run[lengths[run].argsort(stable=True)] for run in torch.split(order, BUCKET * size)])
    chunks = list(torch.split(order, size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    if lengths is not None:
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
    return chunks


@torch.no_grad()
def predictions(bench: Bench, source: Source, size: int) -> list[tuple[Any, Any]]:
    """(prediction, truth) of each batch of `source`, in order, in eval mode."""
    bench.net.eval()
    pairs = []
    for index in torch.split(torch.arange(len(source)), min(EVAL_BATCH, 4 * size)):
        batch = source.take(index, 0)
        with bench.place.autocast():
            predicted = bench.task.predict(bench.net, batch.x)
        pairs.append((predicted, batch.y))
    return pairs


def check_batches(data: Data, run: Run) -> list[str]:
    """Warnings about a batch size that the data cannot fill. Raises DataError when there is nothing to train on."""
    count = len(data.train)
    if count < 2:
        raise DataError(f"data: {count} training examples; at least 2 are needed")
    if run.recipe.batch_size > count:
        return [f"recipe.batch_size: {run.recipe.batch_size}, but there are {count} training examples; each epoch is one batch of {count}"]
    return []
