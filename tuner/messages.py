"""What the coordinator tells workers and hears from them: values that need no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tuner.config.run import EngineSettings, Run

LAST_ATTEMPT_MICRO_BATCHES = 4


def micro_batch_count(attempt: int, killed: int, retries: int) -> int:
    """In how many micro-batches an attempt takes a batch.

    Several in the last one, where a memory limit ended all others.
    """
    return LAST_ATTEMPT_MICRO_BATCHES if 1 < attempt == retries + 1 and killed == attempt - 1 else 1


@dataclass(frozen=True)
class Assignment:
    """A run and where to carry it out. `fetch`: weights may be downloaded.

    `checkpoints` is the folder that the run continues from and leaves its state in; `keep`: the
    best epoch's weights too, at its end. `micro_batches`: in so many a batch is taken, their
    gradients added up, since whole ones did not fit the machine's memory.
    """

    run: Run
    metric: str
    engine: EngineSettings
    home: str
    allow_downloads: bool = True
    checkpoint_folder: str | None = None
    keep_best_weights: bool = False
    micro_batches: int = 1


@dataclass(frozen=True)
class ModelSurvey:
    max_depths: dict[str, int]  # model name -> the deepest freeze
    gpu_count: int


@dataclass(frozen=True)
class DatasetReport:
    """What was found when data and weights were read.

    Warnings and notes are not compared: nodes that agree may word them apart.
    """

    digest: str
    classes: tuple[str, ...]
    split_sizes: dict[str, int]
    input_description: dict[str, Any]  # what the model takes, as the manifest says it
    parameter_count: int
    warnings: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Epoch:
    """`number` counts from 1; `scores` are of the validation examples, larger is better.

    `notes`: what the user must hear before it.
    """

    number: int
    loss: float
    scores: dict[str, float]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialResult:
    """How a trial went.

    `best` is the number of the best epoch; `files` are name -> content for the dashboard.
    """

    state: Literal["complete", "stopped", "diverged", "oom"]
    epochs: tuple[Epoch, ...]
    best_epoch: int
    artifacts: dict[str, bytes]
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class FinalizeJob:
    """Retrain, test, export.

    The winner's assignment, where to publish, and what the search knows of it.

    `weights`: not retrained, but given what its trial has left there.
    """

    assignment: Assignment
    export_formats: tuple[str, ...]
    export_folder: str
    study_name: str
    trial_number: int
    valid_scores: tuple[tuple[str, float], ...] = ()
    weights_file: str | None = None
