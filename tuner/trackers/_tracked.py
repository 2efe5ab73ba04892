"""What a tracker is told of a study, and what it must be able to do."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from tuner.config.objective import Direction
from tuner.files.tracker_folders import make_tracker_folder
from tuner.messages import Epoch

WINNER = "winner"  # the key of the run of the winner as it is exported

FORMATS = ("PNG", "JPEG")  # in which tasks make pictures


@dataclass(frozen=True)
class TrackedStudy:
    """A study. `identifier` is its own, whatever other studies are called.

    A tracker keeps its files in the study's `folder`. `settings` are the task, the data and the
    model, by dotted key.
    """

    name: str
    identifier: str
    folder: Path
    metric: str
    direction: Direction
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackedRun:
    """A trial, or the winner as it is exported.

    `key` is `trial-0003`, by the trial's proposal, or `winner`. So it stays the same when a trial
    that was killed is tried again. `number` is the trial's number in the study, which the next
    attempt does not share. `params` has the values of the searched keys.
    """

    key: str
    number: int
    params: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"trial {self.number}" if self.key != WINNER else f"winner (trial {self.number})"


@dataclass(frozen=True)
class RunEnd:
    """How a run ended. `scores` are those of its best epoch on the validation examples, or the
    winner's on the test examples, by a name that says so (`best/accuracy`, `test/accuracy`).
    `files` are file name -> content, pictures as PNG. `steps` is its number of epochs.
    """

    state: Literal["complete", "pruned", "failed"]
    scores: Mapping[str, float]
    reason: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    steps: int = 0


class Tracker(Protocol):
    """What `start(study)` returns. It may raise whatever it likes: then it gets nothing more.

    Every method is called on one thread. The epochs of a trial that is tried again come from the
    first one on. A trial without epochs, and the winner, are ended without having begun.
    """

    def log_epoch(self, run: TrackedRun, epoch: Epoch) -> None: ...
    def end_run(self, run: TrackedRun, end: RunEnd) -> None: ...
    def close(self) -> None:
        """The command ends. Runs that did not end are continued by the next one."""


def own_folder(study: TrackedStudy, name: str) -> Path:
    """The folder in which a tracker keeps its files, made with the mark that it is tuner's."""
    folder = study.folder / name
    make_tracker_folder(folder)
    return folder


def epoch_values(epoch: Epoch) -> dict[str, float]:
    """The curves' values of an epoch: `train/loss`, `valid/accuracy`, `seconds`."""
    scores = {f"valid/{name}": value for name, value in epoch.scores.items()}
    return {"train/loss": epoch.loss, **scores, "seconds": epoch.seconds}


def open_pictures(files: Mapping[str, bytes]) -> dict[str, Image.Image]:
    """The pictures among a trial's files, opened, by their names without the suffix."""
    return {
        name: Image.open(io.BytesIO(content), formats=FORMATS)
        for name, content in pictures(files).items()
    }


def pictures(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The pictures among a trial's files, by their names without the suffix."""
    return {
        name.removesuffix(".png"): content
        for name, content in files.items()
        if name.endswith(".png")
    }
