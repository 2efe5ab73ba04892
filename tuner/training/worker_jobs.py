"""What workers do: survey a model, inspect data and weights, carry out a trial. Values in, values out."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tuner import deferred_figures
from tuner.core.weights import is_path
from tuner.files.downloads import offline
from tuner.messages import Assignment, Epoch, Facts, Result, Survey
from tuner.training.building import build, load, task_of
from tuner.training.cross_validation import crossed, folds_of
from tuner.training.devices import gpus, place
from tuner.training.micro_batches import out_of_memory, release
from tuner.training.training_loop import Best, Diverged, check_batches


def survey(assignments: tuple[Assignment, ...], report: Callable[[Any], bool], slot: int) -> Survey:
    """How deep each model can be frozen, and how many GPUs are used. Nothing is fetched or written."""
    depths: dict[str, int] = {}
    for a in assignments:
        place(a.engine, Path(a.home), slot)  # names a missing device before anything else happens
        run = a.run.without_weights()
        staged = build(run, Path(a.home), 2)
        depths[a.run.model.name] = staged.max_depth
    return Survey(depths, gpus=len(gpus(assignments[0].engine)))


def inspect(assignments: tuple[Assignment, ...], report: Callable[[Any], bool], slot: int) -> Facts:
    """Reads data and weights of every run as a trial would. Raises DataError, SpaceError."""
    warnings: list[str] = []
    notes: list[str] = []
    for a in assignments:
        local = (
            is_path(str(a.run.model.options.get("weights", "")))
            or a.run.model.options.get("folder") is not None
        )
        with offline(not a.fetch):
            for run in folds_of(a.run):
                data = load(run, Path(a.home))
            staged = build(
                a.run if a.fetch or local else a.run.without_weights(),
                Path(a.home),
                len(data.classes),
            )
        warnings += [*data.warnings, *check_batches(data, a.run)]
        notes += [f"{a.run.model.name}: {note}" for note in staged.notes]
    return Facts(
        digest=data.digest,
        classes=data.classes,
        sizes={"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        input=data.wanted.describe(),
        parameters=sum(p.numel() for p in staged.model.parameters()),
        warnings=tuple(dict.fromkeys(warnings)),
        notes=tuple(dict.fromkeys(notes)),
    )


def carry(a: Assignment, report: Callable[[Epoch], bool], slot: int) -> Result:
    """One trial: trains until it ends or `report` says stop."""
    start = time.monotonic()
    epochs: list[Epoch] = []
    best = Best()
    state: Literal["complete", "stopped", "diverged", "oom"] = "complete"
    reason = ""
    try:
        there = replace(place(a.engine, Path(a.home), slot), parts=a.parts)
        checkpoints = Path(a.checkpoints) if a.checkpoints else None
        for epoch in crossed(a.run, there, a.metric, best, checkpoints, keep=a.keep):
            epochs.append(epoch)
            if not report(epoch):
                state = "stopped"
                break
    except Diverged as error:
        state, reason = "diverged", str(error)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        state, reason = "oom", str(error).splitlines()[0]
    if state == "oom":  # outside of the except block, whose traceback holds tensors
        release()
        return Result(state, tuple(epochs), 0, {}, time.monotonic() - start, reason)
    files = show(a, epochs, best)
    return Result(
        state,
        tuple(epochs),
        best.epoch.number if best.epoch else 0,
        files,
        time.monotonic() - start,
        reason,
    )


def show(a: Assignment, epochs: list[Epoch], best: Best) -> dict[str, bytes]:
    """The trial's learning curve, and what its task shows of the best epoch."""
    if best.epoch is None:
        return {}
    data = load(a.run, Path(a.home))
    task = task_of(a.run, data.classes)
    curve = deferred_figures.later(
        "curve", losses=[e.loss for e in epochs], scores=[e.scores for e in epochs], metric=a.metric
    )
    return {"curve.png": curve, **(task.show(best.pairs, data) if best.pairs else {})}
