"""The values a file describes: a Run (what one training is) and the settings of the search around
it. No torch, no Optuna.

Every field is a YAML key; its annotation is the schema, its description the help that editors show.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tuner.config import database_url

Fraction = Annotated[float, Field(gt=0, lt=0.5)]
RgbTriple = tuple[float, float, float]
FLIP_VERSIONS = 2  # an image and its mirror image
LOADED_LATER = "later"  # stands for weights that are filled in after the model is built


class Section(BaseModel):
    """A frozen mapping of the file; unknown keys and silent conversions are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Recipe(Section):
    """How a model is trained.

    The defaults suit pretrained weights and a head that begins as a linear probe: a small rate that
    rises first and falls to 0, so that the first steps do not lose what the probe found.
    """

    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="SGD with momentum, or AdamW")
    lr: float = Field(0.0005, gt=0, le=100, description="learning rate at its highest")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum; AdamW's first beta")
    nesterov: bool = Field(False, description="Nesterov's momentum (SGD)")
    weight_decay: float = Field(
        0.0, ge=0, le=10, description="L2 penalty (SGD) or decoupled decay (AdamW)"
    )
    freeze_depth: int = Field(0, ge=0, description="stages frozen, counted from the input")
    epochs: int = Field(
        10, ge=1, le=100_000, description="passes over the training examples; the schedule's length"
    )
    batch_size: int = Field(32, ge=1, le=65_536, description="examples per optimizer step")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="of the learning rate, per step; all but constant end at 0"
    )
    warmup: float = Field(
        0.1, ge=0, le=0.5, description="share of the steps in which lr rises linearly from 0"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="gradients are scaled down to this norm; null: as they are"
    )
    batchnorm: Literal["auto", "frozen", "adapt"] = Field(
        "auto",
        description="statistics of pretrained BatchNorm: frozen as they are, or adapting to the "
        "training examples; auto: adapting from batches of 16 on",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target spread over all classes"
    )
    head: Literal["fresh", "probe"] = Field(
        "probe", description="probe: the last stage is first trained alone, once for all trials"
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a better score after which training stops"
    )
    stop_epoch: int | None = Field(
        None, ge=1, description="stop here although the schedule goes on; written to best.yaml"
    )
    fit: Literal["train", "train+valid"] = Field(
        "train", description="what to learn from; best.yaml says train+valid"
    )


class SplitOptions(Section):
    """The keys every data source shares: what trains, what validates, what tests."""

    valid: Fraction = Field(
        0.15, description="share for validation, where the data has no such part"
    )
    test: Fraction = Field(
        0.15, description="share for the final test, where the data has no such part"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the split")
    limit: int | None = Field(
        None, ge=10, description="use so many examples of each part, classes in proportion"
    )
    folds: int = Field(
        1,
        ge=1,
        le=20,
        description="cross-validation: a trial is trained so often, "
        "each time with another part of train and valid held out",
    )
    fold: int = Field(
        0, ge=0, le=19, description="which of the folds validates, where one is trained alone"
    )


class ImageOptions(SplitOptions):
    """The keys every source of images shares.

    What is null is taken from the weights' own transform.
    """

    size: int | None = Field(None, ge=8, le=2048, description="side of the square input, pixels")
    resize: int | None = Field(
        None, ge=8, le=4096, description="shorter side before the centre crop, pixels"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        None, description="for resizing"
    )
    mean: RgbTriple | None = Field(None, description="subtracted from RGB in 0..1")
    std: RgbTriple | None = Field(
        None, description="divides RGB in 0..1 after the mean is subtracted"
    )
    augment: Literal["none", "flip"] = Field(
        "none", description="flip mirrors images left to right"
    )
    views: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] | None = Field(
        "auto",
        description="augmented versions of each image, seen in turn; auto: 2 with flip, otherwise "
        "1; null: drawn anew in each epoch, not cached",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="skip leaves out unreadable images, up to 1 %"
    )


SECONDS_PER_UNIT = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}  # in seconds
DURATION_PATTERN = re.compile(
    "".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in SECONDS_PER_UNIT)
)
MAX_DURATION_DAYS = 10_000  # days


def parse_duration(text: str) -> float:
    """'90s', '10m', '1h30m', '1.5h', '2d' in seconds; ValueError on anything else."""
    match = DURATION_PATTERN.fullmatch(text)
    if not text or match is None:
        raise ValueError("write a duration such as 90s, 10m, 1h30m, 1.5h or 2d")
    total = sum(
        float(part or 0) * size
        for part, size in zip(match.groups(), SECONDS_PER_UNIT.values(), strict=True)
    )
    if not 0 < total <= MAX_DURATION_DAYS * SECONDS_PER_UNIT["d"]:
        raise ValueError(f"a duration must be above 0 and at most {MAX_DURATION_DAYS:,}d")
    return total


def _check_duration(text: str | None) -> str | None:
    if text is not None:
        parse_duration(text)
    return text


STUDY_NAME_PATTERN = re.compile(r"[^/\x00-\x1f]{1,200}")


def _check_study_name(text: str | None) -> str | None:
    if text is not None and (not STUDY_NAME_PATTERN.fullmatch(text) or text.startswith(".")):
        raise ValueError(
            "a study's name is a folder's name: at most 200 characters, no slash, no leading dot"
        )
    return text


class ConfirmSettings(Section):
    """How the best trials of a search are confirmed."""

    top: int = Field(3, ge=1, le=100, description="how many trials, the best ones")
    repeats: int = Field(3, ge=1, le=20, description="how often each is trained again")


class SearchSettings(Section):
    """How the space is searched."""

    trials: int = Field(20, ge=1, le=1_000_000, description="the budget: trials that ended")
    timeout: Annotated[str | None, AfterValidator(_check_duration)] = Field(
        None, description="ask no more this long after the command began: 90s, 10m, 1h30m, 1.5h, 2d"
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="how parameters are proposed"
    )
    pruner: Literal["median", "projection", "successive-halving", "hyperband", "none"] = Field(
        "median", description="what ends bad trials"
    )
    metric: str | None = Field(
        None, description="what is maximised on the validation examples; null: the task's first"
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="of the sampler and, with the trial's number, of each training",
    )
    name: Annotated[str | None, AfterValidator(_check_study_name)] = Field(
        None, description="of the study; null: the file's"
    )
    retries: int = Field(
        2, ge=0, le=10, description="further attempts for a trial whose worker died"
    )
    retrain: bool = Field(
        True,
        description="retrain the best on train and validation before it is tested and exported; "
        "false: as its trial left it",
    )
    confirm: ConfirmSettings | Literal["auto", "none"] = Field(
        "auto",
        description="before the winner is made, the best `top` trials are trained `repeats` times "
        "more, each with another seed and another part of train and valid held out, and the best "
        "mean wins; auto: none under 10 trials, 2 x 2 under 50, 3 x 3 from 50 on",
    )
    compare: Literal["default", "none"] = Field(
        "default",
        description="default: the default recipe is retrained and tested as the winner is, so that "
        "the difference on the test examples is known; none: the winner alone",
    )
    grace: Annotated[str, AfterValidator(_check_duration)] = Field(
        "8s",
        description="what SIGTERM leaves to the running epoch: a little less than the time until "
        "SIGKILL, which Kubernetes calls terminationGracePeriodSeconds",
    )
    keep: int = Field(
        3,
        ge=0,
        le=1000,
        description="trials whose best epoch's weights stay on the disk: the best so many",
    )


def _check_gpus(value: int | list[int] | None) -> int | list[int] | None:
    if isinstance(value, int) and value < 1:
        raise ValueError(
            "write how many GPUs, at least 1, or their numbers, such as [0, 2]; for none, device: "
            "cpu"
        )
    if isinstance(value, list) and (not value or min(value) < 0 or len(set(value)) < len(value)):
        raise ValueError("write the GPUs' numbers, each once and from 0, such as [0, 2]")
    return value


ADDRESS_PATTERN = re.compile(r"auto|local|[^\s:/]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}")


def _check_address(text: str) -> str:
    if "://" in text:
        raise ValueError(
            "Ray's client protocol hides which node fails, and its port runs anyone's code; start "
            "the command on a machine of the "
            "cluster and write auto, or HOST:PORT of its head"
        )
    if not ADDRESS_PATTERN.fullmatch(text):
        raise ValueError(
            "write auto, local, or HOST:PORT of the cluster's head, such as 10.0.0.1:6379"
        )
    return text


def _stall(text: str) -> str:
    if text not in ("auto", "never"):
        try:
            parse_duration(text)
        except ValueError as error:
            raise ValueError(f"{error}; or auto, or never") from None
    return text


class EngineSettings(Section):
    """Where trials are carried out."""

    name: str = Field("local", description="inline, local, ray")
    workers: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = Field(
        "auto",
        description="auto: per_gpu for each GPU, or one on the CPU; "
        "ray: as many as the cluster has room for",
    )
    gpus: Annotated[int | list[int] | None, AfterValidator(_check_gpus)] = Field(
        None, description="how many of a machine's GPUs, or a list of their numbers; null: all"
    )
    per_gpu: int = Field(
        1, ge=1, le=64, description="workers that share a GPU, each with its part of the memory"
    )
    address: Annotated[str, AfterValidator(_check_address)] = Field(
        "auto", description="ray: auto finds a running cluster; local; or HOST:PORT"
    )
    gpus_per_trial: float | None = Field(
        None, ge=0, le=1, description="ray: 1, or a fraction; null: 1 where the cluster has GPUs"
    )
    cpus_per_trial: int = Field(1, ge=1, le=1024, description="ray: cores of a trial")
    stall: Annotated[str, AfterValidator(_stall)] = Field(
        "auto",
        description="a training that reports no epoch for so long is given up: 30m, 2h; never; "
        "auto: 10 times the longest epoch of its own, and an hour at least, after its first epoch",
    )
    ship: bool = Field(
        False, description="ray: send data and weights to nodes that do not have them"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
        description="auto, cpu, cuda, cuda:N or mps",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on GPUs that have it"
    )
    cache: Literal["auto", "always", "never"] = Field(
        "auto", description="remember what frozen stages compute"
    )
    cache_gb: float = Field(
        4.0, ge=0, le=100_000, description="disk for remembered activations, gigabytes"
    )


@dataclass(frozen=True)
class PluginConfig:
    """A plug-in by name, and its keyword arguments: all of them, defaults included."""

    name: str
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()},
        }


@dataclass(frozen=True)
class Run:
    """One training, complete: what `tuner train` carries out."""

    task: PluginConfig
    data: PluginConfig
    model: PluginConfig
    recipe: Recipe
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The run as the file would say it."""
        return {
            "task": self.task.to_dict(),
            "data": self.data.to_dict(),
            "model": self.model.to_dict(),
            "recipe": self.recipe.model_dump(),
            "seed": self.seed,
        }

    def without_weights(self) -> "Run":
        """The same run with fresh parameters, where its model lets one say so.

        Its layers may follow which weights it has: then LATER.
        """
        options = self.model.options
        if "weights" not in options:
            return self
        no_weights = {"weights": "none"}
        if "backbone" in options:
            no_weights = {
                key: "none" if options[key] == "none" else LOADED_LATER
                for key in ("weights", "backbone")
            }
        return replace(self, model=PluginConfig(self.model.name, {**options, **no_weights}))

    def digest(self) -> str:
        """SHA-256 of the run as JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Settings:
    """The sections that hold no ranges.

    `tree` leaves out a password that is written in `storage`.
    """

    search: SearchSettings
    engine: EngineSettings
    storage: str | None
    export: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "search": self.search.model_dump(),
            "engine": self.engine.model_dump(),
            "storage": self.storage and database_url.without_password(self.storage),
            "export": list(self.export),
        }
