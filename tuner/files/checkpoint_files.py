"""Checkpoint files as the coordinator, which has no torch, sees them.

Their names, their digests, and which of them stay.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tuner.files import removal
from tuner.files.atomic import disk_errors, fsync
from tuner.files.removal import CHECKPOINT as NAME

CHECKPOINTS_FOLDER = "checkpoints"
Rank = tuple[float, int, int]
"""Of a trial that completed, smaller is better: minus its value, its best epoch, its number."""


def checkpoint_name(what: str, *content: bytes | memoryview) -> str:
    """The name of a checkpoint file, which vouches for its content, given in pieces.

    `000012-<SHA-256>.safetensors`, `best-<SHA-256>.safetensors`.
    """
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return f"{what}-{digest.hexdigest()}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    checkpoints = [
        p
        for p in folder.glob("*.safetensors")
        if (match := NAME.fullmatch(p.name)) and match[1] != "best"
    ]
    return sorted(checkpoints, key=lambda p: int(p.name.partition("-")[0]), reverse=True)


def find_best_weights(folder: Path) -> Path | None:
    """The weights of a completed trial's best epoch; None where there are none."""
    return next(
        (p for p in sorted(folder.glob("best-*.safetensors")) if NAME.fullmatch(p.name)), None
    )


def read_verified(path: Path) -> bytes | None:
    """A file's content; None where it does not match its name, is missing or cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    match = NAME.fullmatch(path.name)
    return content if match and hashlib.sha256(content).hexdigest() == match[2] else None


class CheckpointRetention:
    """The rule which trials' files stay under `folder`, which has one folder for each proposal.

    A trial that will be continued keeps all its files, the best `count` completed trials keep the
    weights of their best epoch, and the other trials keep nothing. Only the coordinator removes
    files.
    """

    def __init__(self, folder: Path | None, count: int) -> None:
        self.folder, self.max_kept = folder, count
        self.ranks: dict[int, Rank] = {}  # proposal -> its rank, of those whose weights are kept

    def folder_of(self, proposal: int) -> str | None:
        return str(self.folder / str(proposal)) if self.folder is not None else None

    def best_weights_of(self, proposal: int) -> Path | None:
        """The weights of a proposal's best epoch, where they are kept."""
        return find_best_weights(self.folder / str(proposal)) if self.folder is not None else None

    def take_over(self, ended: Mapping[int, Rank | None]) -> None:
        """Applies the rule to the files that an earlier coordinator left.

        `ended` has every proposal that has ended, with its rank where it completed.
        """
        self.ranks = dict(
            sorted(((d, r) for d, r in ended.items() if r is not None), key=lambda item: item[1])[
                : self.max_kept
            ]
        )
        if self.folder is not None and self.folder.is_dir():
            for proposal in [int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()]:
                if proposal in self.ranks:
                    self._keep_best_weights_only(proposal)
                elif proposal in ended:
                    self._remove_all(proposal)

    def on_trial_end(self, proposal: int, rank: Rank | None = None) -> None:
        """Applies the rule to a trial that has ended; `rank` is given if it completed."""
        if rank is None or self.folder is None:
            self._remove_all(proposal)
            return
        self.ranks[proposal] = rank
        for worse in sorted(self.ranks, key=self.ranks.__getitem__)[self.max_kept :]:
            del self.ranks[worse]
            self._remove_all(worse)
        if proposal in self.ranks:
            self._keep_best_weights_only(proposal)

    def _keep_best_weights_only(self, proposal: int) -> None:
        """Keeps the weights of the best epoch alone, synced so that they survive a power cut."""
        assert self.folder is not None
        folder = self.folder / str(proposal)
        weights = find_best_weights(folder)
        if weights is None:
            self._remove_all(proposal)
            return
        with disk_errors(folder):
            for path in (weights, folder, self.folder):
                fsync(path)
            removal.remove_checkpoints(folder, keep=weights)

    def _remove_all(self, proposal: int) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                removal.remove_checkpoints(self.folder / str(proposal))


def remove_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        removal.remove_file(path)


def place_of(export: Path) -> Path:
    """The folder of the checkpoints of the training for an export.

    It is in the study's folder if the export is, else beside the export, hidden and with its name.
    """
    if removal.is_study(export.parent):
        return export.parent / CHECKPOINTS_FOLDER / export.name
    return export.with_name(f".{export.name}.checkpoints")


def remove_training_checkpoints(folder: Path) -> None:
    """Removes a training's checkpoints, and the folder around a study's once it is empty."""
    with contextlib.suppress(OSError):
        removal.remove_checkpoints(folder)
    if folder.parent.name == CHECKPOINTS_FOLDER:
        removal.remove_empty(folder.parent)
