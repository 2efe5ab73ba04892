"""What a training needs to go on where it was killed, on the disk: weights, optimizer, schedule, the epochs so far, the best one's weights.

A checkpoint is one safetensors file, `<epoch>-<SHA-256>.safetensors`: nothing in it is pickled, and reading it executes nothing. It is
written beside its place and renamed, so that a killed process leaves the old file or the new one. Two stay: the newest, and the last
that was synced to the disk before it, which takes over when a power cut has torn the newest.

What is not in it has no state of its own. Random states (Python's, numpy's, torch's, the GPU's) follow the seed and the epoch,
which `trial.learn` sets them by, so that a trial draws alike whatever its process did before. Order and views of the examples are
functions of the epoch. Early stopping follows from the epochs. There is no gradient scaler, since bfloat16 needs none, and no
average of weights over time.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import tuner
from tuner.files.atomic import atomic_path, disk_errors, fsync
from tuner.files.checkpoint_files import (
    checkpoint_name,
    list_checkpoints,
    read_verified,
    remove_paths,
)
from tuner.messages import Epoch
from tuner.training.micro_batches import MicroBatchSize

FORMAT_VERSION = 1
MIN_WRITE_SECONDS = (
    0.25  # seconds of training that may be lost; a longer epoch is written as it ends
)
SYNC_SECONDS = 1.0  # seconds between syncs; a power cut takes no more, and the epoch then running


@dataclass(frozen=True)
class TrainingState:
    """What changes while `net` is trained."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    micro_batch_size: MicroBatchSize


@dataclass(frozen=True)
class RestoredProgress:
    """What is remembered of a training besides its state. `best`: the number and the weights of its best epoch, where it has one."""

    epochs: list[Epoch]
    best_epoch: int
    best_weights: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one training in `folder`. `key` says which: those of another are left aside. `notes` has what the user must hear.

    Epochs shorter than STAKE are written when so many seconds are at stake: writing must not cost what it saves.
    """

    def __init__(self, folder: Path, run_key: str, *, keep_best_weights: bool = False) -> None:
        self.folder, self.run_key, self.keep_best_weights = folder, run_key, keep_best_weights
        self.notes: list[str] = []
        self.last_write = self.last_sync = time.monotonic()
        self.folders_synced = False  # whether a power cut leaves the folder
        self.last_synced_file: Path | None = (
            None  # the last that was synced; the first, until one is
        )

    def save_if_due(
        self, training: TrainingState, epochs: list[Epoch], best: int, weights: dict[str, Tensor]
    ) -> None:
        """Writes what `load` gives back, if enough is at stake. Raises StorageError."""
        now = time.monotonic()
        if now - self.last_write < MIN_WRITE_SECONDS:
            return
        tensors, values = collect_state(training)
        if best not in (0, len(epochs)):  # else there is none, or it is what is trained
            tensors |= {f"best.{name}": value for name, value in weights.items()}
        values |= {
            "epochs": [(e.number, e.loss, e.scores, e.seconds) for e in epochs],
            "best": best,
        }
        sync = now - self.last_sync >= SYNC_SECONDS
        path = self.write_file(f"{len(epochs):06d}", tensors, values, sync=sync)
        remove_paths(
            p for p in list_checkpoints(self.folder) if p not in (path, self.last_synced_file)
        )
        self.last_write = time.monotonic()
        if sync or self.last_synced_file is None:
            self.last_synced_file = path
        if sync:
            self.last_sync = self.last_write

    def write_file(
        self, what: str, tensors: dict[str, Tensor], values: dict[str, Any], *, sync: bool
    ) -> Path:
        header = {
            "format": FORMAT_VERSION,
            "tuner": tuner.__version__,
            "torch": torch.__version__,
            "run": self.run_key,
            **values,
        }
        content = safetensors.torch.save(
            to_independent_tensors(tensors), {"checkpoint": json.dumps(header)}
        )
        path = self.folder / checkpoint_name(what, content)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(
            path, crash_prefix="checkpoint", bytes_needed=len(content), sync=sync
        ) as temporary:
            temporary.write_bytes(content)
        if sync and not self.folders_synced:
            for folder in (
                self.folder.parent,
                self.folder.parent.parent,
            ):  # the folders' own names, once
                fsync(folder)
            self.folders_synced = True
        return path

    def restore_newest(self, training: TrainingState) -> RestoredProgress | None:
        """Puts the newest checkpoint that is whole and of this training into `training`; None where there is none.

        Whatever is left aside is said in `notes`.
        """
        remove_paths(self.folder.glob(".*.tmp"))  # of a write that was killed
        for path in list_checkpoints(self.folder):
            found = self._restore_file(path, training)
            if isinstance(found, str):
                self.notes.append(f"{path}: {found}; left aside")
                continue
            fsync(path)
            self.last_synced_file = path
            self.notes = [f"{note}; going on from epoch {len(found.epochs)}" for note in self.notes]
            return found
        self.notes = [f"{note}; the training begins again" for note in self.notes]
        return None

    def _restore_file(self, path: Path, training: TrainingState) -> RestoredProgress | str:
        """What a file has, or why it cannot be used; then `training` is untouched."""
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
        epochs = [Epoch(*entry) for entry in values["epochs"]]
        best = select_prefix(tensors, "net." if values["best"] == len(epochs) else "best.")
        return RestoredProgress(
            epochs, values["best"], {name: value.clone() for name, value in best.items()}
        )

    def save_best_weights(self, model: nn.Module, net: nn.Module) -> None:
        """Leaves the trained weights of a trial that completed: those of `net` under the names that `model` has for them.

        What the coordinator keeps it syncs; what it does not is gone in a moment.
        """
        if self.keep_best_weights:
            self.write_file("best", native_state(model, net), {}, sync=False)


def read_header(content: bytes) -> dict[str, Any]:
    """What a safetensors file says of itself; nothing where it is none of ours."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        found = json.loads(header["__metadata__"]["checkpoint"])
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def collect_state(training: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A training's state as tensors and as values that JSON holds."""
    tensors = {f"net.{name}": value for name, value in training.net.state_dict().items()}
    optimizer = training.optimizer.state_dict()
    values: dict[str, dict[str, Any]] = {}
    for number, of_parameter in optimizer["state"].items():
        for name, value in of_parameter.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            else:
                values.setdefault(str(number), {})[name] = value
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer["param_groups"]
    ]
    schedule = {
        name: value
        for name, value in training.schedule.state_dict().items()
        if name != "lr_lambdas"
    }
    return tensors, {
        "optimizer": values,
        "groups": groups,
        "schedule": schedule,
        "room": training.micro_batch_size.value,
    }


def restore_state(
    training: TrainingState, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """The way back."""
    training.net.load_state_dict(select_prefix(tensors, "net."))
    optimizer = training.optimizer.state_dict()
    parameters = dict(
        enumerate(p for group in training.optimizer.param_groups for p in group["params"])
    )
    states: dict[int, dict[str, Any]] = {
        int(number): dict(of) for number, of in values["optimizer"].items()
    }
    for name, value in select_prefix(tensors, "optimizer.").items():
        number, _, what = name.partition(".")
        states.setdefault(int(number), {})[what] = match_memory_layout(
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
    training.micro_batch_size.value = min(training.micro_batch_size.value, values["room"])


def match_memory_layout(parameter: Tensor, value: Tensor) -> Tensor:
    """A value of the optimizer as it lay in memory: beside its parameter, its axes in the same order."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def has_same_shapes(tensors: dict[str, Tensor], net: nn.Module) -> bool:
    """Whether all that `net` has is there, in its shapes."""
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    return {name: value.shape for name, value in select_prefix(tensors, "net.").items()} == shapes


def select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def to_independent_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: contiguous, on the CPU, none sharing memory with another."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value
        seen.add(place)
    return found


def native_state(model: nn.Module, net: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of `net` under the names that they have in `model`."""
    names = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    return {
        names[id(value)]: value
        for value in net.state_dict(keep_vars=True).values()
        if id(value) in names
    }


def load_best_weights(path: Path, model: nn.Module, net: nn.Module) -> bool:
    """Gives `net` the weights that `finish` left at `path`; False where they are damaged or of another model."""
    content = read_verified(path)
    if content is None:
        return False
    tensors, own = safetensors.torch.load(content), native_state(model, net)
    if {name: value.shape for name, value in tensors.items()} != {
        name: value.shape for name, value in own.items()
    }:
        return False
    model.load_state_dict(tensors, strict=False)
    return True
