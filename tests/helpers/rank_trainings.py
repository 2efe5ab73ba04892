"""A small training by several ranks, each a fork of this process, and functions that ranks call."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tiny_tasks import TINY_TASKS
from tuner.messages import Assignment
from tuner.training import checkpoints
from tuner.training.data_parallel import ALONE, Dismissed, join_ranks, joined_ranks, leave_ranks
from tuner.training.training_loop import fit, open_checkpoints

# 42 training examples in batches of 13, 13, 13 and 3, the last of which two ranks do not divide
WORDS = (
    "recipe.batch_size=13",
    "recipe.accumulate=3",
    "recipe.epochs=3",
    "recipe.lr=0.02",
    "recipe.clip_norm=0.5",
    "recipe.ema=0.9",
    "recipe.batchnorm=frozen",
    "recipe.unfreeze_every=1",
)


def train(folder: str, name: str, count: int, micro_batches: int, last_epoch: int) -> Any:
    """The losses and scores of a training by `count` ranks, each of which takes a batch in parts;
    its weights are written to <name>.pt. After `last_epoch` all ranks are killed.
    """
    here = Path(folder)
    rank = next((n for n in range(1, count) if os.fork() == 0), 0)
    ranks = join_ranks(rank, count, here / f"{name}-{last_epoch}.meeting") if count > 1 else ALONE
    checkpoints.MIN_WRITE_SECONDS = 0.0  # each epoch is written
    task = TINY_TASKS["classification"]
    run = task.make_run(here, *WORDS)
    context = task.prepare(run, here / "home", "cpu")
    object.__setattr__(context.device_context, "micro_batches", micro_batches)
    epochs = []
    try:
        for progress in fit(context, run.recipe, 5, open_checkpoints(run, context, here / name)):
            epochs.append((progress.epoch.loss, progress.epoch.scores))
            if progress.epoch.number == last_epoch:
                os._exit(137)
    except Dismissed:
        os._exit(0 if ranks.rank > 0 and not any(scores for _, scores in epochs) else 1)
    assert ranks.is_first
    if count > 1:
        leave_ranks()
        assert os.wait()[1] == 0
    torch.save(context.net.state_dict(), here / f"{name}.pt")
    return epochs


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / f"{name}.pt")
    return state


# -- what ranks call: function(assignment, report, slot)


def report_and_lack_memory(assignment: Assignment, report: Any, slot: int) -> Any:
    """Rank 1 has room for half of its share; rank 0 tells how often it reported."""
    ranks = joined_ranks()
    value = ranks.mean(torch.tensor(float(ranks.rank)))
    if ranks.rank == 1 and assignment.micro_batches < 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")
    count = 0
    while count < 9 and report(count):
        count += 1
    return {"reports": count, "mean": float(value), "slot": slot, "parts": assignment.micro_batches}


def fail(assignment: Assignment, report: Any, slot: int) -> Any:
    """Rank 1 fails, and rank 0 waits for it."""
    ranks = joined_ranks()
    if ranks.rank == 1:
        raise ValueError(f"slot {slot} has no luck")
    ranks.mean(torch.zeros(()))


def die(assignment: Assignment, report: Any, slot: int) -> Any:
    """Rank 1 is killed, and rank 0 waits for it."""
    ranks = joined_ranks()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.mean(torch.zeros(()))


def launch(folder: str, function: str, count: int) -> Any:
    """What the launcher returns for one of these functions; its process may end instead."""
    from tuner.config.run import EngineSettings
    from tuner.training.rank_launcher import call_on_ranks

    run = TINY_TASKS["classification"].make_run(Path(folder), "recipe.batch_size=16")
    engine = EngineSettings.model_validate({"device": "cpu", "gpus_per_trial": count})
    assignment = Assignment(run, "accuracy", engine, folder)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        value = call_on_ranks(f"{__name__}:{function}", assignment, lambda number: number < 2, 3)
        assert signal.getsignal(signal.SIGTERM) == handler
        return value
    except ValueError as error:
        return {"raised": str(error), "notes": json.dumps(getattr(error, "__notes__", []))}
