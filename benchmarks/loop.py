"""What tuner's loop costs beside the training itself: its epochs against a bare loop over tensors that lie ready in memory.

    python benchmarks/loop.py FOLDER --weights lite0.safetensors [--depths 0 5 7 8 9] [--repeats 5]

Per freeze depth, in one process and in turn: an epoch of `trial.fit` on images decoded before, its activations remembered before
(at depth 0 there is nothing to remember), and the bare twin: the same suffix, loss, optimizer, schedule and memory format over
float32 tensors in memory, prepared before the clock starts, then the same look at the validation images. After one epoch of each
that is not counted; medians of the repeats, least to most.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import arms
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.config import parsing
from tuner.core.types import Source
from tuner.engines import _process_settings
from tuner.training import epoch as learning
from tuner.training import preparation, training_loop
from tuner.training.devices import select_device
from tuner.training.optimizers import make_optimizer

_process_settings.keep_freed_memory()  # for both: it is the worker's setting, and the comparison is of loops


def ours(bench: training_loop.TrainingContext, recipe: Any) -> Iterator[float]:
    """Seconds of each epoch by tuner."""
    for progress in training_loop.fit(bench, recipe, 0):
        yield progress.epoch.seconds


def bare(
    net: nn.Module, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], recipe: Any
) -> Iterator[float]:
    """Seconds of each epoch by hand."""
    opt = make_optimizer(net, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    (x, y), (vx, vy) = train, valid
    for _ in range(recipe.epochs):
        start = time.monotonic()
        net.train()
        total = torch.zeros(())
        for index in torch.randperm(len(y)).split(recipe.batch_size):
            loss = F.cross_entropy(net(taken(x, index)), y[index])
            opt.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            opt.step()
            schedule.step()
            total += loss.detach() * len(index)
        net.eval()
        with torch.no_grad():
            said = torch.cat(
                [
                    net(taken(vx, index))
                    for index in torch.arange(len(vy)).split(learning.MAX_EVAL_BATCH)
                ]
            )
        float((said.argmax(1) == vy).float().mean()), float(total)
        yield time.monotonic() - start


def taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor kept channels-last, as a view that the layers read as such."""
    found = x[index]
    return found.permute(0, 3, 1, 2) if found.dim() == 4 else found


def in_memory(source: Source) -> tuple[Tensor, Tensor]:
    parts = [source.take(index, 0) for index in torch.arange(len(source)).split(64)]
    x = torch.cat([part.x for part in parts])
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous(), torch.cat(
        [part.y for part in parts]
    )


def measure(args: argparse.Namespace, depth: int, home: Path) -> tuple[list[float], list[float]]:
    file = arms.write_space(
        home / "loop.yaml",
        args,
        {"lr": 1e-3, "freeze_depth": depth, "epochs": args.repeats + 1, "head": "fresh"},
        {},
    )
    space = parsing.load_space(file)
    run = space.make_run({})
    where = select_device(space.settings.engine, home, 0)
    where = replace(
        where, cache_limits=replace(where.cache_limits, mode="always")
    )  # this is about what remembering costs, not about when
    bench, other = (preparation.prepare_training(run, where, "accuracy") for _ in range(2))
    for source in (bench.train, bench.valid):
        in_memory(source)  # fills what is to be remembered
    twin = bare(other.net, in_memory(bench.train), in_memory(bench.valid), run.recipe)
    turns: list[tuple[list[float], Callable[[], float]]] = [
        ([], ours(bench, run.recipe).__next__),
        ([], twin.__next__),
    ]
    for number in range(args.repeats + 1):
        for found, turn in turns[:: 1 if number % 2 else -1]:
            found.append(turn())
    return turns[0][0][1:], turns[1][0][1:]


def main() -> None:
    parser = arms.arguments(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 5, 7, 8, 9])
    parser.add_argument("--repeats", type=int, default=5)
    args = arms.parse(parser)
    print(f"{arms.hardware()}; {args.folder.name}; n = {args.repeats} epochs\n")
    print("| freeze depth | tuner's epoch, s | bare loop, s | tuner / bare |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.scratch) as home:
        for depth in args.depths:
            a, b = measure(args, depth, Path(home))
            cells = [
                arms.spread(a, 3),
                arms.spread(b, 3),
                f"{statistics.median(a) / statistics.median(b):.3f}",
            ]
            print(f"| {depth} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
