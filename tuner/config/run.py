"""The values a file describes: a Run (what one training is) and the settings of the search around
it. No torch, no Optuna.

Every field is a YAML key; its annotation is the schema, its description the help that editors show.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from tuner.config import database_url
from tuner.config.durations import parse_duration
from tuner.config.engine_settings import EngineSettings
from tuner.config.search_settings import ConfirmSettings, SearchSettings
from tuner.config.section import Section

# besides what is defined here
__all__ = ["ConfirmSettings", "EngineSettings", "SearchSettings", "Section", "parse_duration"]

LOADED_LATER = "later"  # stands for weights that are filled in after the model is built


class LoraOptions(Section):
    """LoRA: low-rank changes of frozen layers. Hu et al., ICLR 2022.

    The default scale and rate are those of Schulman et al., LoRA Without Regret, 2025: with alpha
    32 the best rate hardly depends on the rank, and is about ten times that of all weights.
    """

    rank: int = Field(
        16, ge=0, le=4096, description="of each adapter; 0: no adapters, all weights are trained"
    )
    alpha: float = Field(
        32.0, gt=0, le=65_536, description="what adapters add is multiplied by alpha / rank"
    )
    targets: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="the layers that get adapters, by the ends of their names, such as [query, "
        "value]; auto: every linear layer behind the frozen stages and before the head",
    )
    lr: float = Field(10.0, gt=0, le=1000, description="factor of recipe.lr for the adapters")


class Recipe(Section):
    """How a model is trained.

    The defaults suit pretrained weights and a head that begins as a linear probe: a small rate that
    rises first and falls to 0, so that the first steps do not lose what the probe found.
    """

    optimizer: Literal[
        "sgd",
        "adam",
        "adamw",
        "nadam",
        "radam",
        "adamax",
        "adagrad",
        "rmsprop",
        "adadelta",
        "adafactor",
    ] = Field(
        "adamw",
        description="one of torch.optim (not LBFGS, Rprop, SparseAdam, Muon and ASGD); "
        "sgd is SGD with momentum; adadelta wants rates near 1",
    )
    lr: float = Field(0.0005, gt=0, le=100, description="learning rate at its highest")
    head_lr: float = Field(1.0, gt=0, le=1000, description="factor of lr for the last stage")
    backbone_lr: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="factor of lr for the backbone: the stages before the neck of a detector, "
        "otherwise all stages but the last",
    )
    auxiliary_lr: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="factor of lr for the auxiliary classifier of a segmenter, which is trained "
        "with it and left out of its predictions",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of lr from each stage to the one before it, so that the first stages "
        "change least; 1: one rate",
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of SGD and RMSprop; the first beta of Adam and its relatives"
    )
    beta2: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="the second beta of Adam and its relatives, RMSprop's alpha, Adadelta's rho; "
        "null: torch's own",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        le=1,
        description="what all but SGD and Adafactor add to the divisor; null: torch's own",
    )
    nesterov: bool = Field(False, description="Nesterov's momentum (SGD)")
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=10,
        description="decoupled decay (AdamW, NAdam, RAdam, Adafactor), otherwise an L2 penalty",
    )
    decay_norms: bool = Field(
        False,
        description="whether weight_decay also holds for biases, for the scales of normalisations, "
        "and for embeddings of positions and class tokens",
    )
    freeze_depth: int = Field(0, ge=0, description="stages frozen, counted from the input")
    freeze: float | None = Field(
        None,
        ge=0,
        le=1,
        description="in place of freeze_depth: the share of the stages that are frozen, rounded to "
        "whole ones; 0: none, 1: all but the head; one range for models with other numbers of "
        "stages",
    )
    lora: LoraOptions | None = Field(
        None,
        description="adapters by peft for the layers behind the frozen stages: these layers stay "
        "as they are, and adapters and head alone are trained; null: all weights are trained",
    )
    unfreeze_every: int = Field(
        0,
        ge=0,
        description="gradual unfreezing: after so many epochs one more stage from the head down is "
        "trained, until freeze_depth; 0: all from the first epoch",
    )
    epochs: int = Field(
        10, ge=1, le=100_000, description="passes over the training examples; the schedule's length"
    )
    batch_size: int = Field(32, ge=1, le=65_536, description="examples per batch")
    accumulate: int = Field(
        1, ge=1, le=4096, description="batches per optimizer step: their gradients are averaged"
    )
    schedule: Literal["constant", "cosine", "linear", "polynomial", "onecycle"] = Field(
        "cosine",
        description="of the learning rate, per step; all but constant end at min_lr; polynomial: "
        "the power 0.9 of what is left; onecycle: cosines up from lr / 25 and down, the momentum "
        "opposite",
    )
    min_lr: float = Field(0.0, ge=0, le=1, description="share of lr with which the schedule ends")
    warmup: Annotated[float, Field(ge=0, le=0.5)] | Annotated[int, Field(ge=0)] = Field(
        0.1,
        description="in which lr rises, linearly from 0 (onecycle: as it says): a share of the "
        "steps, up to 0.5; or, as a whole number, so many steps, but no more than half of the "
        "run's",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="gradients are scaled down to this norm; null: as they are"
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the moving average of the weights, which is then what is validated, "
        "kept and exported; 0: the weights themselves",
    )
    batchnorm: Literal["auto", "frozen", "adapt"] = Field(
        "auto",
        description="statistics of pretrained BatchNorm: frozen as they are, or adapting to the "
        "training examples; auto: adapting from batches of 16 on",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each target spread over all classes; not for numbers and objects",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=10,
        description="examples are mixed with others by shares drawn from Beta(mixup, mixup); 0: "
        "none; not for boxes, masks, tags of words and generated texts",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=10,
        description="a rectangle of another example is pasted into each, of a share drawn from "
        "Beta(cutmix, cutmix); 0: none; with mixup, one of both for each batch; for images alone, "
        "and not for boxes and masks",
    )
    class_weights: Literal["none", "balanced", "effective_number"] = Field(
        "none",
        description="of the loss, by how many training examples (segmentation: pixels) each class "
        "has: balanced, the inverse; effective_number, that of Cui et al., which is milder, and "
        "does nothing where each class has thousands",
    )
    sampling: Literal["natural", "balanced"] = Field(
        "natural",
        description="balanced: an epoch has as many examples of each class, so that rare ones "
        "repeat and common ones are left out in turn; class_weights then change nothing",
    )
    focal_gamma: float = Field(
        0.0,
        ge=0,
        le=10,
        description="focal loss: hard examples count more; 0: cross-entropy, 2: as published",
    )
    head: Literal["fresh", "probe"] = Field(
        "probe", description="probe: the last stage is first trained alone, once for all trials"
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a better score after which training stops"
    )
    validate_every: int = Field(
        1, ge=1, description="epochs from one validation to the next; the last is always validated"
    )
    stop_epoch: int | None = Field(
        None, ge=1, description="stop here although the schedule goes on; written to best.yaml"
    )
    fit: Literal["train", "train+valid"] = Field(
        "train", description="what to learn from; best.yaml says train+valid"
    )

    def depth_of(self, max_depth: int) -> int:
        """The freeze depth of a model whose greatest one is `max_depth`."""
        if self.freeze is None:
            return self.freeze_depth
        return math.floor(self.freeze * max_depth + 0.5)

    @property
    def frozen(self) -> float:
        """How much of a model is frozen: a number that orders the runs of one study and model."""
        return self.freeze_depth if self.freeze is None else self.freeze

    @property
    def adapters(self) -> LoraOptions | None:
        """The options of the adapters; None where there are none."""
        return self.lora if self.lora is not None and self.lora.rank > 0 else None


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

    @property
    def folds(self) -> int:
        """Into how many folds its examples are divided; 1: it has no cross-validation."""
        return int(self.data.options.get("folds", 1))

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
    track: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "search": self.search.model_dump() | {"from": list(self.search.earlier_studies)},
            "engine": self.engine.model_dump(),
            "storage": self.storage and database_url.without_password(self.storage),
            "export": list(self.export),
            "track": list(self.track),
        }
