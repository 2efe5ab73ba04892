"""Checkpoints: what a training needs to go on where it was killed, as files.

A checkpoint has the weights that are trained, the states of optimizer and schedule, the epochs so
far, and the best epoch's weights. It is one safetensors file, `<epoch>-<SHA-256>.safetensors`:
nothing in it is pickled, and reading it executes nothing. It is written under another name in the
same folder and then renamed, so that a killed process leaves the old file or the new one. Two files
stay: the newest, and the newest before it that was synced to the disk. The synced one is used when
a power cut has damaged the newest.

What is not in a checkpoint needs no saving. Random states (Python's, numpy's, torch's, the GPU's)
follow from the seed and the epoch: `epoch.train_one_epoch` sets them, so that a trial draws the
same numbers whatever its process did before. Order and views of the examples are functions of the
epoch. Early stopping follows from the epochs. Which stages wait until they are unfrozen follows
from the epoch.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import tuner
from tuner.core.adapters import load_trained_state, trained_state
from tuner.core.device_transfers import HostCopy
from tuner.files.atomic import atomic_path, disk_errors, fsync
from tuner.files.checkpoint_files import (
    checkpoint_name,
    list_checkpoints,
    read_verified,
    remove_paths,
)
from tuner.messages import Epoch
from tuner.training.checkpoint_content import (
    match_memory_layout,
    native_state,
    read_header,
    select_prefix,
    to_independent_tensors,
    to_pieces,
)
from tuner.training.micro_batches import MicroBatchSize
from tuner.training.weight_average import WeightAverage

FORMAT_VERSION = 2  # 1 had no average of the weights
# keys of a parameter group that are not saved: where the training goes on they may be others
GROUP_KEYS_OF_A_DEVICE = ("params", "fused", "foreach")
MIN_WRITE_SECONDS = 0.25  # of training that may be lost; a longer epoch is written when it ends
MAX_WRITE_SHARE = 0.05  # of a training's time, for what a write in the background keeps it waiting
SYNC_SECONDS = 1.0  # between syncs; a power cut loses no more, and the epoch that was running


@dataclass(frozen=True)
class TrainingState:
    """What changes while `net` is trained, and goes into a checkpoint.

    `average` is what is validated in place of the net's weights; None: these themselves. `scaler`
    scales the loss; None: it is not scaled. `losses` gives the parts of the loss of a batch, and
    the mean gradients of several ranks where it is DistributedDataParallel; None: the task does.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    micro_batch_size: MicroBatchSize
    average: WeightAverage | None = None
    scaler: torch.amp.GradScaler | None = None
    losses: nn.Module | None = None

    def step(self, clip_norm: float | None) -> None:
        """A step of the optimizer, of the schedule and of the average.

        Args:
            clip_norm: The largest norm of the gradients; None: there is none.
        """
        if self.scaler is not None and clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.schedule.last_epoch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss to those of the net."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def validated_weights(self) -> AbstractContextManager[None]:
        """The net has the weights that are validated and kept inside the block."""
        return nullcontext() if self.average is None else self.average.applied()

    def copy_validated_weights(self) -> dict[str, Tensor]:
        """A copy of the state of the net that is trained, with these weights."""
        with self.validated_weights():
            return {name: v.detach().clone() for name, v in trained_state(self.net).items()}


@dataclass(frozen=True)
class RestoredProgress:
    """What a checkpoint has besides the training state.

    `best_epoch` is the number of the best epoch, 0 where there is none; `best_weights` are its
    weights.
    """

    epochs: list[Epoch]
    best_epoch: int
    best_weights: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one training in `folder`.

    `run_key` names the training: checkpoints of another training are not used. `notes` has lines
    for the user. Epochs shorter than MIN_WRITE_SECONDS are written only when that many seconds
    have passed, because writing must not cost more time than it saves.

    In the background a thread writes while the training goes on. The training waits only while its
    state begins its way to page-locked memory; as long as a write lasts, no other one begins. A
    kill loses no more time than where the training waits: the epoch before, and what was trained
    while it was written. An error of the disk is raised at the next epoch, or at the end.

    Args:
        folder: Where the files are; it is created at the first write.
        run_key: Equal for equal runs on equal data with an equal metric.
        keep_best_weights: Writes the best epoch's weights when the training is complete.
        in_background: A thread writes; for a training on a GPU.
    """

    def __init__(
        self,
        folder: Path,
        run_key: str,
        *,
        keep_best_weights: bool = False,
        in_background: bool = False,
    ) -> None:
        self.folder, self.run_key, self.keep_best_weights = folder, run_key, keep_best_weights
        self.thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self.writing: Future[None] | None = None
        self.wait_seconds = 0.0  # that the last write in the background kept the training waiting
        self.notes: list[str] = []
        self.last_write = self.last_sync = time.monotonic()
        self.folders_synced = False  # then the folder itself survives a power cut
        # the last file that was synced; the first file, while none is synced
        self.last_synced_file: Path | None = None

    def save_if_due(
        self, training: TrainingState, epochs: list[Epoch], best: int, weights: dict[str, Tensor]
    ) -> None:
        """Writes a checkpoint if MIN_WRITE_SECONDS have passed since the last. Raises StorageError.

        In the background it also waits until the waiting is at most MAX_WRITE_SHARE of the time.
        `best` is the number of the best epoch, 0 where there is none; `weights` are its weights.
        """
        now = time.monotonic()
        stake = max(MIN_WRITE_SECONDS, self.wait_seconds / MAX_WRITE_SHARE)
        if now - self.last_write < stake or self._is_writing():
            return
        tensors, values = collect_state(training)
        # without a best epoch there are none; those of the last epoch are in the state already
        if best not in (0, len(epochs)):
            tensors |= {f"best.{name}": value for name, value in weights.items()}
        values |= {
            "epochs": [
                (e.number, e.loss, e.scores, e.seconds, e.temperature, e.thresholds) for e in epochs
            ],
            "best": best,
        }
        sync = now - self.last_sync >= SYNC_SECONDS
        write = partial(self._write_generation, f"{len(epochs):06d}", values=values, sync=sync)
        if self.thread is None:
            write(lambda: tensors)
            self.last_write = time.monotonic()
        else:
            self.writing = self.thread.submit(write, HostCopy(tensors).wait)
            self.last_write = time.monotonic()
            self.wait_seconds = self.last_write - now
        if sync:
            self.last_sync = self.last_write

    def _write_generation(
        self,
        name: str,
        read_tensors: Callable[[], dict[str, Tensor]],
        values: dict[str, Any],
        *,
        sync: bool,
    ) -> None:
        """Writes a checkpoint and removes those before it, but for the last that was synced."""
        path = self.write_file(name, read_tensors(), values, sync=sync)
        remove_paths(
            p for p in list_checkpoints(self.folder) if p not in (path, self.last_synced_file)
        )
        if sync or self.last_synced_file is None:
            self.last_synced_file = path

    def _is_writing(self) -> bool:
        """Whether a write goes on in the background. Raises StorageError where one has failed."""
        if self.writing is None:
            return False
        if not self.writing.done():
            return True
        self.finish()
        return False

    def finish(self) -> None:
        """Waits for a write in the background. Raises StorageError where it failed."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def abandon(self) -> None:
        """Waits for a write in the background. Whether it failed does not matter any more."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.exception()

    def write_file(
        self, name: str, tensors: dict[str, Tensor], values: dict[str, Any], *, sync: bool
    ) -> Path:
        """Writes `<name>-<SHA-256>.safetensors` with `values` in its header."""
        header = {
            "format": FORMAT_VERSION,
            "tuner": tuner.__version__,
            "torch": torch.__version__,
            "run": self.run_key,
            **values,
        }
        content = to_pieces(to_independent_tensors(tensors), {"checkpoint": json.dumps(header)})
        path = self.folder / checkpoint_name(name, *content)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with (
            atomic_path(
                path, crash_prefix="checkpoint", bytes_needed=sum(map(len, content)), sync=sync
            ) as temporary,
            open(temporary, "wb") as file,
        ):
            for piece in content:
                file.write(piece)
        if sync and not self.folders_synced:
            # once, so that the names of the folders are on the disk too
            for folder in (self.folder.parent, self.folder.parent.parent):
                fsync(folder)
            self.folders_synced = True
        return path

    def restore_newest(self, training: TrainingState) -> RestoredProgress | None:
        """Loads the newest usable checkpoint of this training into `training`; None where there is
        none.

        `notes` names every file that cannot be used, and why.
        """
        remove_paths(self.folder.glob(".*.tmp"))  # of a write that was killed
        for path in list_checkpoints(self.folder):
            progress = self._restore_file(path, training)
            if isinstance(progress, str):
                self.notes.append(f"{path}: {progress}; left aside")
                continue
            fsync(path)
            self.last_synced_file = path
            last = len(progress.epochs)
            self.notes = [f"{note}; going on from epoch {last}" for note in self.notes]
            return progress
        self.notes = [f"{note}; the training begins again" for note in self.notes]
        return None

    def _restore_file(self, path: Path, training: TrainingState) -> RestoredProgress | str:
        """Loads a file into `training`.

        Returns the reason where it cannot be used; `training` is then unchanged.
        """
        content = read_verified(path)
        if content is None:
            return "damaged (its SHA-256 is not that of its name)"
        values = read_header(content)
        if values.get("format") != FORMAT_VERSION:
            return f"written by tuner {values.get('tuner', 'of unknown version')} in another format"
        if values.get("run") != self.run_key:
            return "of another run, or of other data"
        tensors = safetensors.torch.load(content)
        if not has_same_shapes(tensors, training.net):
            return "of another model"
        restore_state(training, tensors, values)
        # JSON has no tuples, and a checkpoint of an earlier version no thresholds
        epochs = [Epoch(*entry[:5], *map(tuple, entry[5:])) for entry in values["epochs"]]
        if values["best"] == len(epochs):
            best = training.copy_validated_weights()
        else:
            best = {name: v.clone() for name, v in select_prefix(tensors, "best.").items()}
        return RestoredProgress(epochs, values["best"], best)

    def save_best_weights(self, model: nn.Module, net: nn.Module) -> None:
        """Writes the weights of `net` under the names that `model` has for them, where they are to
        be kept.

        The file is not synced here: the coordinator syncs the files that it keeps, and soon removes
        the others.
        """
        if self.keep_best_weights:
            self.write_file("best", native_state(model, net), {}, sync=False)


def collect_state(training: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A training's state, split into tensors and values for JSON."""
    tensors = {f"net.{name}": value for name, value in trained_state(training.net).items()}
    if training.average is not None:
        tensors |= {f"average.{name}": v for name, v in training.average.tensors.items()}
    optimizer = training.optimizer.state_dict()
    values: dict[str, dict[str, Any]] = {}
    for number, parameter_state in optimizer["state"].items():
        for name, value in parameter_state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            else:
                values.setdefault(str(number), {})[name] = value
    groups = [
        {name: value for name, value in group.items() if name not in GROUP_KEYS_OF_A_DEVICE}
        for group in optimizer["param_groups"]
    ]
    schedule = {
        name: value
        for name, value in training.schedule.state_dict().items()
        if name != "lr_lambdas"
    }
    scaler = {} if training.scaler is None else {"scaler": training.scaler.state_dict()}
    return tensors, {
        **scaler,
        "optimizer": values,
        "groups": groups,
        "schedule": schedule,
        "room": training.micro_batch_size.value,
    }


def restore_state(
    training: TrainingState, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Loads what `collect_state` gave into `training`."""
    load_trained_state(training.net, select_prefix(tensors, "net."))
    if training.average is not None:
        training.average.load(select_prefix(tensors, "average."))
    optimizer = training.optimizer.state_dict()
    parameters = dict(
        enumerate(p for group in training.optimizer.param_groups for p in group["params"])
    )
    states: dict[int, dict[str, Any]] = {
        int(number): dict(parameter_state)
        for number, parameter_state in values["optimizer"].items()
    }
    for name, value in select_prefix(tensors, "optimizer.").items():
        number, _, key = name.partition(".")
        states.setdefault(int(number), {})[key] = match_memory_layout(
            parameters[int(number)], value
        )
    for group, saved in zip(optimizer["param_groups"], values["groups"], strict=True):
        group.update(
            {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in saved.items()
            }
        )
    training.optimizer.load_state_dict({**optimizer, "state": states})
    training.schedule.load_state_dict({**training.schedule.state_dict(), **values["schedule"]})
    if training.scaler is not None and "scaler" in values:
        training.scaler.load_state_dict(values["scaler"])
    training.micro_batch_size.value = min(training.micro_batch_size.value, values["room"])


def has_same_shapes(tensors: dict[str, Tensor], net: nn.Module) -> bool:
    """Whether the tensors are exactly those of `net` that are trained, in its shapes."""
    shapes = {name: value.shape for name, value in trained_state(net).items()}
    return {name: value.shape for name, value in select_prefix(tensors, "net.").items()} == shapes
