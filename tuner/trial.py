"""One training: `prepare` builds what a run names, `fit` is a generator of epochs. No Optuna here."""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner import cache, plugins
from tuner.core import IMAGENET, Batch, Data, Preprocess, Source, Staged, Task, Tree, cut
from tuner.devices import Place
from tuner.errors import DataError, SpaceError
from tuner.optim import factor, optimizer
from tuner.orders import Epoch
from tuner.run import Part, Recipe, Run

EVAL_BATCH = 256


class Diverged(Exception):
    """The loss or a score is NaN or infinite."""


@dataclass
class Best:
    """The best epoch so far: its weights (a state dict of the suffix) and its (prediction, truth) pairs."""

    epoch: Epoch | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


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
    """Builds data and model and cuts the model where the recipe says. Raises DataError, SpaceError."""
    data = load(run, place.home)
    task = task_of(run, len(data.classes))
    staged = build(run, place.home, len(data.classes))
    depth = run.recipe.freeze_depth
    if depth > staged.max_depth:
        raise SpaceError(f"recipe.freeze_depth: {depth}, but {run.model.name} allows 0..{staged.max_depth}")
    staged.model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    prefix, net = staged.split(depth)

    def feed(source: Source) -> Source:
        ready = Ready(source, data.preprocess, place)
        return cache.through(Cast(prefix, place) if depth else prefix, ready, place.device, place.precision, place.limits)

    learn = data.full if run.recipe.fit == "train+valid" else data.train
    return Bench(task, staged, net, data, feed(learn), feed(data.valid), feed(data.test), place, metric)


def task_of(run: Run, outputs: int) -> Task:
    task: Task = plugins.attribute("task", run.task.name)(outputs, run.recipe, **run.task.options)
    return task


_loaded: dict[str, Data] = {}


def load(run: Run, home: Path) -> Data:
    """The run's data; kept for the next run of this process that names the same."""
    wanted = wants(run.model)
    name = f"{run.data.tree()} {wanted} {home}"
    if name not in _loaded:
        _loaded.clear()  # one data set per process is what a study needs
        arguments = plugins.keys("data", run.data.name).arguments(run.data.options)
        _loaded[name] = plugins.attribute("data", run.data.name)(home, wanted, **arguments)
    return _loaded[name]


def wants(model: Part) -> Preprocess:
    """How the model's weights want their images; ImageNet's way for a model of the user's own."""
    if ":" in model.name:
        return IMAGENET
    module = plugins.module("model", model.name)
    options = {k: v for k, v in model.options.items() if k == "weights"}
    found: Preprocess = module.wants(model.name, **options)
    return found


def build(run: Run, home: Path, outputs: int) -> Staged:
    """The run's model, its fresh parameters drawn from the run's seed."""
    torch.manual_seed(run.seed)
    name, options = run.model.name, dict(run.model.options)
    make = plugins.attribute("model", name)
    if ":" not in name:
        staged: Staged = make(home, name, outputs, **options)
        return staged
    try:
        made = make(outputs, **options)
    except Exception as error:  # whatever the user's factory raises is theirs to read
        raise SpaceError(f"model.name: {name}: calling it with the number of classes failed ({type(error).__name__}: {error})") from error
    if isinstance(made, Staged):
        return made
    if not isinstance(made, nn.Module):
        raise SpaceError(f"model.name: {name} returned {type(made).__name__}; expected an nn.Module or a tuner.core.Staged")
    return cut(made)


class Ready:
    """A source on the device: uint8 pixels as normalised float32, channels-last; anything else as it is."""

    def __init__(self, source: Source, preprocess: Preprocess, place: Place) -> None:
        self.source, self.device = source, place.device
        self.views = source.views
        self.digest = hashlib.sha256(f"{source.digest} {preprocess.mean} {preprocess.std}".encode()).hexdigest()
        self.mean = torch.tensor(preprocess.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(preprocess.std, device=self.device).view(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.source.take(index, view)
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            x = x.to(self.device).contiguous(memory_format=torch.channels_last).float().div_(255).sub_(self.mean).div_(self.std)
        return Batch(x, y.to(self.device))


class Cast(nn.Module):
    """A module under the place's autocast."""

    def __init__(self, module: nn.Module, place: Place) -> None:
        super().__init__()
        self.module, self.place = module, place

    def forward(self, x: Tree) -> Tree:
        with self.place.autocast():
            return self.module(x)  # type: ignore[no-any-return]


def fit(bench: Bench, recipe: Recipe, seed: int, best: Best | None = None) -> Iterator[Epoch]:
    """Trains `bench.net`, yielding each epoch as it ends, and leaves the best epoch's weights in place.

    Without validation (fit: train+valid) the last epoch is the best. Equal seeds give equal epochs on one machine.
    Raises Diverged when the loss or a score is not finite.
    """
    best = best if best is not None else Best()
    validated = recipe.fit == "train"
    opt = optimizer(bench.net.parameters(), recipe)
    steps = recipe.epochs * len(batches(len(bench.train), recipe.batch_size, seed, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: factor(recipe, step, steps))
    for number in range(1, min(recipe.epochs, recipe.stop_epoch or recipe.epochs) + 1):
        start = time.monotonic()
        loss = learn(bench, recipe, opt, schedule, seed, number)
        pairs = predictions(bench, bench.valid) if validated else []
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
    chunks = batches(len(bench.train), recipe.batch_size, seed, epoch)
    for step, index in enumerate(chunks):
        batch = bench.train.take(index, view)
        with bench.place.autocast():
            loss = bench.task.loss(bench.net, batch)
        opt.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        schedule.step()
        total += loss.detach() * len(index)
        if step % 50 == 49 and not math.isfinite(float(total)):  # reading it waits for the GPU, so not at every step
            break
    return float(total) / len(bench.train)


def batches(length: int, size: int, seed: int, epoch: int) -> list[Tensor]:
    """A permutation by (seed, epoch), in batches. A last batch of one joins the one before: BatchNorm needs two."""
    generator = torch.Generator().manual_seed(seed * 7_368_787 + epoch)
    chunks = list(torch.split(torch.randperm(length, generator=generator), size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks


@torch.no_grad()
def predictions(bench: Bench, source: Source) -> list[tuple[Any, Any]]:
    """(prediction, truth) of each batch of `source`, in order, in eval mode."""
    bench.net.eval()
    pairs = []
    for index in torch.split(torch.arange(len(source)), EVAL_BATCH):
        batch = source.take(index, 0)
        with bench.place.autocast():
            predicted = bench.task.predict(bench.net, batch.x)
        pairs.append((predicted, batch.y))
    return pairs


def check_batches(data: Data, run: Run) -> list[str]:
    """Warnings about a batch size that the data cannot fill. Raises DataError when there is nothing to train on."""
    count = len(data.train)
    if count < 2:
        raise DataError(f"data: {count} training images; at least 2 are needed")
    if run.recipe.batch_size > count:
        return [f"recipe.batch_size: {run.recipe.batch_size}, but there are {count} training images; each epoch is one batch of {count}"]
    return []
