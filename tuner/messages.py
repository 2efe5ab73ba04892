"""What the coordinator tells workers and hears from them: values that need no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tuner.config.run import Engine, Run


@dataclass(frozen=True)
class Assignment:
    """A run and where to carry it out. `fetch`: weights may be downloaded.

    `checkpoints` is the folder that the run continues from and leaves its state in; `keep`: the best epoch's weights too, at its end.
    `parts`: batches are taken in so many parts, their gradients added up, since whole ones did not fit the machine's memory.
    """

    run: Run
    metric: str
    engine: Engine
    home: str
    fetch: bool = True
    checkpoints: str | None = None
    keep: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Survey:
    depths: dict[str, int]  # model name -> the deepest freeze
    gpus: int


@dataclass(frozen=True)
class Facts:
    """What was found when data and weights were read. Warnings and notes are not compared: nodes that agree may word them apart."""

    digest: str
    classes: tuple[str, ...]
    sizes: dict[str, int]
    input: dict[str, Any]  # what the model takes, as the manifest says it
    parameters: int
    warnings: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Epoch:
    """`number` counts from 1; `scores` are of the validation examples, larger is better. `notes`: what the user must hear before it."""

    number: int
    loss: float
    scores: dict[str, float]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """How a trial went. `best` is the number of the best epoch; `files` are name -> content for the dashboard."""

    state: Literal["complete", "stopped", "diverged", "oom"]
    epochs: tuple[Epoch, ...]
    best: int
    files: dict[str, bytes]
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Crown:
    """Retrain, test, export: the winner's assignment, where to publish, and what the search knows of it.

    `weights`: not retrained, but given what its trial has left there.
    """

    assignment: Assignment
    formats: tuple[str, ...]
    folder: str
    study: str
    trial: int
    valid: tuple[tuple[str, float], ...] = ()
    weights: str | None = None
