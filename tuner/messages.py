"""What the coordinator sends to workers and receives from them: values that need no torch."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tuner.config.objective import Direction
from tuner.config.run import EngineSettings, Run, SearchSettings

LAST_ATTEMPT_MICRO_BATCHES = 4
THRESHOLD_DIGITS = 4  # after the point, as of the temperature
TEMPERATURE_DIGITS = 4  # after the point; so best.yaml has a number that people can read


def micro_batch_count(attempt: int, killed: int, retries: int) -> int:
    """Into how many micro-batches an attempt divides a batch.

    Several in the last attempt, if a memory limit ended all earlier ones; else one.
    """
    return LAST_ATTEMPT_MICRO_BATCHES if 1 < attempt == retries + 1 and killed == attempt - 1 else 1


@dataclass(frozen=True)
class Assignment:
    """A run, and where and how to carry it out. `allow_downloads`: weights may be downloaded.

    `metric` decides which epoch is the best, and `direction` whether its higher or its lower values
    are better.

    `checkpoint_folder` is where the run continues from and leaves its state; `keep_best_weights`:
    at its end also the weights of the best epoch. `micro_batches`: into how many parts a batch is
    divided, whose gradients are added up, because whole batches did not fit the machine's memory.
    `limits`: what the model may cost, by the names of `search.limits`; empty: nothing is measured.
    """

    run: Run
    metric: str
    engine: EngineSettings
    home: str
    allow_downloads: bool = True
    checkpoint_folder: str | None = None
    keep_best_weights: bool = False
    micro_batches: int = 1
    direction: Direction = "maximise"
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSurvey:
    max_depths: dict[str, int]  # model name -> the deepest freeze
    gpu_count: int


@dataclass(frozen=True)
class DatasetReport:
    """What a worker read of data and weights.

    Warnings and notes are not compared, because nodes that agree may word them differently.
    """

    digest: str
    classes: tuple[str, ...]
    split_sizes: dict[str, int]
    input_description: dict[str, Any]  # what the model takes, as the manifest says it
    parameter_count: int
    # of how many validation examples the score has the noise of, where it is a mean over classes
    macro_count: float | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Epoch:
    """The result of one epoch: `number` counts from 1.

    `scores` are of the validation examples, and `temperature` is fitted to them; None: the task has
    none, or no examples are left to fit it to. `thresholds` are fitted to them too, one for each
    label; empty: the task has none. `notes`: what the user must read before it.
    """

    number: int
    loss: float
    scores: dict[str, float]
    seconds: float
    temperature: float | None = None
    thresholds: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def mean_temperature(temperatures: Iterable[float | None]) -> float | None:
    """The geometric mean of temperatures, rounded as each of them is; None where there are none.

    2 and 0.5 are as far from 1, so their mean is 1.
    """
    known = [temperature for temperature in temperatures if temperature is not None]
    return round(statistics.geometric_mean(known), TEMPERATURE_DIGITS) if known else None


def scale_probability(probability: float, temperature: float | None) -> float:
    """The probability whose logit is that of another one, divided by the temperature, where there
    is one. It is rounded, and inside of 0 and 1.
    """
    logit = math.log(probability / (1 - probability)) / (temperature or 1.0)
    value, least = 1 / (1 + math.exp(-logit)), float(10**-THRESHOLD_DIGITS)
    return min(max(round(value, THRESHOLD_DIGITS), least), 1 - least)


def mean_thresholds(thresholds: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """The mean of the thresholds of each label, rounded; empty where there are none."""
    by_label = zip(*thresholds, strict=True)
    return tuple(round(statistics.fmean(values), THRESHOLD_DIGITS) for values in by_label)


@dataclass(frozen=True)
class GpuUse:
    """What a trial used of a GPU that it had for itself: shares of 1.

    `memory` is the most that it needed; `busy` of its epochs' time, None where that cannot be seen.
    """

    memory: float
    busy: float | None


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    `best_epoch` is the number of the best epoch; `artifacts` are file name -> content for the
    dashboard. `gpu_use` is measured with `engine.per_gpu: auto` on a GPU, `costs` are what the
    model costs where there are limits.
    """

    state: Literal["complete", "stopped", "diverged", "oom", "over_limit"]
    epochs: tuple[Epoch, ...]
    best_epoch: int
    artifacts: dict[str, bytes]
    seconds: float
    reason: str = ""
    gpu_use: GpuUse | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSettings:
    """What is done with a trained model's outputs before they are scored, exported or shown.

    `calibrate`: the temperature that divides the logits; `temperature`, the one that is fitted
    where the training validates; `none`. `test_flips`: the outputs for an image and its mirror
    image are averaged.
    """

    calibrate: float | Literal["temperature", "none"] = "none"
    test_flips: bool = False

    @staticmethod
    def of(search: SearchSettings) -> "OutputSettings":
        """Those that a file states."""
        return OutputSettings(search.calibrate, search.test_flips)


@dataclass(frozen=True)
class DefaultTestJob:
    """Retrain and test the default recipe, without an export: its assignment and its outputs.

    `weights_file`: it is not retrained, but gets the weights that its trial left there.
    """

    assignment: Assignment
    weights_file: str | None = None
    outputs: OutputSettings = OutputSettings()


@dataclass(frozen=True)
class DefaultComparison:
    """The default recipe, with which the winner is compared on the test examples.

    `tested_run`: the content of the file with its test; None where the winner is the default
    recipe. `seed`: of the bootstrap.
    """

    trial_number: int
    tested_run: bytes | None
    seed: int


@dataclass(frozen=True)
class Ingredient:
    """A trial whose weights may be averaged with those of others.

    `run` is the run as it is exported: up to one of its trial's epochs. `weights_file` has the
    weights that the trial left, or, where it was retrained, those of the retraining.
    """

    trial_number: int
    run: Run
    weights_file: str


@dataclass(frozen=True)
class SoupJob:
    """Choose a soup: the winner's assignment, and the candidates, the winner first."""

    assignment: Assignment
    candidates: tuple[Ingredient, ...]


@dataclass(frozen=True)
class SoupChoice:
    """What was chosen. `tried`: of each candidate the trial's number, the score of the average with
    it, and whether it stays. `scores`: all validation scores of the average of those that stay.
    """

    tried: tuple[tuple[int, float, bool], ...]
    scores: dict[str, float]


@dataclass(frozen=True)
class Soup:
    """What is averaged, and what the manifest says of it.

    `ingredients` is empty where the winner is exported alone, and where an earlier export of the
    same soup has its weights. `valid_scores` are those of the average that was chosen, `seconds` is
    what the retraining of the ingredients took. `findings` has the keys `metric`, `taken`,
    `score`, `winner_score` and `tried`, and `failed` where an ingredient could not be retrained.
    """

    ingredients: tuple[Ingredient, ...]
    valid_scores: dict[str, float]
    findings: dict[str, Any]
    seconds: float = 0.0


@dataclass(frozen=True)
class FinalizeJob:
    """Retrain, test and export the winner: its assignment, where to publish, scores and outputs.

    `weights_file`: it is not retrained, but gets the weights that its trial left there. `soup`: it
    gets the average of the weights of several trials, where that was chosen.
    `comparison`: the default recipe, where the winner is compared with it; then the export keeps
    the results of single test examples. `confirmation` is what the manifest says of the winner's
    repeats.
    """

    assignment: Assignment
    export_formats: tuple[str, ...]
    export_folder: str
    study_name: str
    trial_number: int
    valid_scores: tuple[tuple[str, float], ...] = ()
    weights_file: str | None = None
    comparison: DefaultComparison | None = None
    confirmation: dict[str, Any] | None = None
    soup: Soup | None = None
    outputs: OutputSettings = OutputSettings()


@dataclass(frozen=True)
class ProfileJob:
    """Measure what trainings cost: one run for each model and its data, and the freeze depths."""

    assignment: Assignment
    runs: tuple[Run, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True)
class DepthCost:
    """What training at one freeze depth costs for an example.

    `train_seconds` and `valid_seconds` are of one epoch. `fill_seconds` is what it takes to compute
    an example's activations, once; without the cache it comes on top of every epoch. `cached_bytes`
    is their size. Both are 0 where nothing is cached.
    """

    depth: int
    train_seconds: float
    valid_seconds: float
    fill_seconds: float
    cached_bytes: float
    is_cached: bool


@dataclass(frozen=True)
class TrainingProfile:
    """What trainings of one model cost. `begin_seconds`: to load data and model the first time;
    `setup_seconds`: before each training. `peak_bytes`: of the process that measured it.
    `largest_batch`: that the GPU can train at once at the shallowest depth; None: on no GPU.
    """

    depths: tuple[DepthCost, ...]
    begin_seconds: float
    setup_seconds: float
    split_sizes: dict[str, int]
    peak_bytes: int
    largest_batch: int | None = None

    def cost_at(self, depth: int) -> DepthCost:
        """The cost at the nearest depth that was measured."""
        return min(self.depths, key=lambda cost: abs(cost.depth - depth))

    def seconds_of_training(self, depth: int, epochs: int, *, validates: bool = True) -> float:
        """Of one training whose activations, if any, are cached."""
        cost = self.cost_at(depth)
        train, valid = self.split_sizes["train"], self.split_sizes["valid"]
        beside = cost.valid_seconds * valid if validates else 0.0
        return self.setup_seconds + epochs * (cost.train_seconds * train + beside)

    def seconds_to_fill(self, depth: int) -> float:
        """Of computing the activations of train and validation examples, once."""
        examples = self.split_sizes["train"] + self.split_sizes["valid"]
        return self.cost_at(depth).fill_seconds * examples
