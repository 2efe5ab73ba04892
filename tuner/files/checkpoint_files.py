"""Checkpoint files as the coordinator sees them, which has no torch.

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


def checkpoint_name(what: str, content: bytes) -> str:
    """A file's name vouches for its content.

    `000012-<SHA-256>.safetensors`, `best-<SHA-256>.safetensors`.
    """
    return f"{what}-{hashlib.sha256(content).hexdigest()}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    found = [
        p
        for p in folder.glob("*.safetensors")
        if (match := NAME.fullmatch(p.name)) and match[1] != "best"
    ]
    return sorted(found, key=lambda p: int(p.name.partition("-")[0]), reverse=True)


def find_best_weights(folder: Path) -> Path | None:
    """Where a trial that completed has left the weights of its best epoch."""
    return next(
        (p for p in sorted(folder.glob("best-*.safetensors")) if NAME.fullmatch(p.name)), None
    )


def read_verified(path: Path) -> bytes | None:
    """A file's content.

    None where it is not what its name vouches for, is gone or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    match = NAME.fullmatch(path.name)
    return content if match and hashlib.sha256(content).hexdigest() == match[2] else None


class CheckpointRetention:
    """Which trials' files stay under `folder`, one folder a draw: a trial that is to go on keeps
    all, the best `count` of those that completed keep their best epoch's weights, the others
    nothing. Only the coordinator removes.
    """

    def __init__(self, folder: Path | None, count: int) -> None:
        self.folder, self.max_kept = folder, count
        self.ranks: dict[int, Rank] = {}  # draw -> its rank, of those whose weights are kept

    def folder_of(self, proposal: int) -> str | None:
        return str(self.folder / str(proposal)) if self.folder is not None else None

    def best_weights_of(self, proposal: int) -> Path | None:
        """Of a trial's best epoch, where they are kept."""
        return find_best_weights(self.folder / str(proposal)) if self.folder is not None else None

    def take_over(self, ended: Mapping[int, Rank | None]) -> None:
        """Takes over what an earlier coordinator left.

        `ended` has every draw that is over, with its rank where it completed.
        """
        self.ranks = dict(
            sorted(((d, r) for d, r in ended.items() if r is not None), key=lambda item: item[1])[
                : self.max_kept
            ]
        )
        if self.folder is not None and self.folder.is_dir():
            for draw in [int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()]:
                if draw in self.ranks:
                    self._keep_best_weights_only(draw)
                elif draw in ended:
                    self._remove_all(draw)

    def on_trial_end(self, proposal: int, rank: Rank | None = None) -> None:
        """A trial is over; `rank`: it completed."""
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
        """Leaves a trial the weights of its best epoch, which must survive a power cut from now on."""
        assert self.folder is not None
        place = self.folder / str(proposal)
        kept = find_best_weights(place)
        if kept is None:
            self._remove_all(proposal)
            return
        with disk_errors(place):
            for path in (kept, place, self.folder):
                fsync(path)
            removal.remove_checkpoints(place, keep=kept)

    def _remove_all(self, proposal: int) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                removal.remove_checkpoints(self.folder / str(proposal))


def remove_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        removal.remove_file(path)


def place_of(export: Path) -> Path:
    """Where the checkpoints of the training for an export lie.

    In its study's folder, else beside it, hidden and with its name.
    """
    if removal.is_study(export.parent):
        return export.parent / CHECKPOINTS_FOLDER / export.name
    return export.with_name(f".{export.name}.checkpoints")


def remove_training_checkpoints(folder: Path) -> None:
    """Removes a training's checkpoints, and the folder around those of a study once it is empty."""
    with contextlib.suppress(OSError):
        removal.remove_checkpoints(folder)
    if folder.parent.name == CHECKPOINTS_FOLDER:
        removal.remove_empty(folder.parent)
