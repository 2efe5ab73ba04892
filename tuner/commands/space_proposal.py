"""A space file for some data on this machine: which model, how many pixels, which ranges.

The rules, which docs/init.md tells to people:

- The model is the first of its task's list whose package is installed and whose weights are here
  or can be downloaded. The lists differ for a CPU and a GPU. Without network, images are classified
  by the embedded resnet18_slim.
- Images get the size of the preset, but at most twice their own.
- The learning rate is searched around the one that the model's authors use: from a tenth of it to
  six times as much.
- The number of epochs falls with the number of examples, so that a trial stays affordable.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from typing import Any

from tuner.commands.data_scan import DataReading
from tuner.config import plugins, related_tasks
from tuner.config.run import Recipe

TRIALS: dict[str, int] = {"quick": 6, "medium": 16, "best": 40}
EPOCH_FACTORS: dict[str, float] = {"quick": 0.5, "medium": 1.0, "best": 1.5}
# up to so many training examples, so many epochs at most: on a CPU, on a GPU
EPOCHS = ((500, 10, 20), (2000, 6, 16), (10_000, 3, 10), (50_000, 2, 6))
LEAST_EPOCHS = (1, 3)  # with more examples than that
MAX_TEXT_EPOCHS = 4  # the most that the authors of BERT recommend
QUICK_LIMIT = 2000  # examples of each split that a quick search on a CPU uses
RARE_CLASS_RATIO = 3  # between the largest and the smallest class, from which rare classes count


@dataclass(frozen=True)
class Machine:
    """What the proposal depends on. `can_download`: the hosts of weights answer."""

    has_gpu: bool
    can_download: bool
    home: Path


@dataclass(frozen=True)
class ModelChoice:
    """A model that may be proposed.

    `sizes` are the sides of its images for the presets quick, medium and best, pixels; empty for
    texts. `deepest` is the greatest freeze depth that makes sense: no more than its pretrained
    stages. `package` must be installed. `weights_file` is a pattern of the file of its weights,
    None where they come with tuner.
    """

    name: str
    deepest: int
    sizes: tuple[int, ...] = ()
    package: str = "torchvision"
    weights_file: str | None = None
    length: int | None = None  # tokens of a text
    note: str = ""

    @property
    def weights(self) -> str:
        return "default" if self.weights_file else "bundled"


_LITE0 = "timm-tf_efficientnet_lite0*"
_FRCNN = "fasterrcnn_resnet50_fpn_coco-*"
SLIM = ModelChoice("resnet18_slim", 5, (32, 64, 64), note="small, comes with tuner")
MODELS: dict[tuple[str, bool], tuple[ModelChoice, ...]] = {
    ("classification", False): (
        ModelChoice("timm/tf_efficientnet_lite0", 9, (96, 128, 160), "timm", _LITE0),
        ModelChoice("resnet18", 5, (96, 128, 160), weights_file="resnet18-*"),
        SLIM,
    ),
    ("classification", True): (
        ModelChoice("resnet50", 5, (128, 224, 224), weights_file="resnet50-*"),
        SLIM,
    ),
    ("detection", False): (
        ModelChoice(
            "ssdlite320_mobilenet_v3_large", 6, (320, 320, 320), weights_file="ssdlite320_*"
        ),
    ),
    ("detection", True): (
        ModelChoice("fasterrcnn_resnet50_fpn", 6, (416, 512, 640), weights_file=_FRCNN),
    ),
    ("segmentation", False): (
        ModelChoice("lraspp_mobilenet_v3_large", 6, (160, 224, 256), weights_file="lraspp_*"),
    ),
    ("segmentation", True): (
        ModelChoice(
            "unet/resnet18", 5, (256, 384, 512), "segmentation_models_pytorch", "resnet18-*"
        ),
        ModelChoice("deeplabv3_resnet50", 5, (256, 384, 512), weights_file="deeplabv3_resnet50*"),
    ),
    ("text_classification", False): (
        ModelChoice("distilbert", 7, package="transformers", weights_file="*distil*", length=64),
    ),
    ("text_classification", True): (
        ModelChoice("bert", 13, package="transformers", weights_file="*bert*", length=128),
    ),
    ("text_generation", False): (
        ModelChoice("gpt2", 12, package="transformers", weights_file="*gpt2*", length=64),
    ),
    ("text_generation", True): (
        ModelChoice("gpt2", 12, package="transformers", weights_file="*gpt2*", length=128),
    ),
}


def choose_model(task: str, machine: Machine) -> ModelChoice:
    """The first model that is installed and has its weights; else the first that is installed.

    Where nothing is installed it is the first of all, and `tuner check` says what to install.
    """
    choices = MODELS[related_tasks.related_task(task), machine.has_gpu]
    installed = list(filter(is_installed, choices))
    ready = [m for m in installed if machine.can_download or has_weights(m, machine.home)]
    return (ready or installed or list(choices))[0]


def is_installed(model: ModelChoice) -> bool:
    return importlib.util.find_spec(model.package) is not None


def explain_model(task: str, machine: Machine) -> str:
    """Why the chosen model is not the one that is usually proposed; empty where it is."""
    chosen = choose_model(task, machine)
    usual = MODELS[related_tasks.related_task(task), machine.has_gpu][0]
    if chosen == usual:
        return ""
    why = "its weights are not here and cannot be downloaded"
    if not is_installed(usual):
        why = f"{usual.package} is not installed"
    return f"{chosen.name} instead of {usual.name}: {why}"


def has_weights(model: ModelChoice, home: Path) -> bool:
    """Whether a model's weights are on this machine."""
    if model.weights_file is None:
        return True
    folders = (home / "weights", Path.home() / ".cache" / "torch" / "hub" / "checkpoints")
    return any(folder.is_dir() and any(folder.glob(model.weights_file)) for folder in folders)


def format_space(
    reading: DataReading, machine: Machine, preset: str, time: str | None = None
) -> str:
    """The space file as text, with comments. It can be run as it is.

    `time`: how long the search takes; None: the preset has a number of trials.
    """
    model = choose_model(reading.task, machine)
    trials = TRIALS[preset]
    lines = [
        f"# {reading.path}: {reading.description}.",
        f"# Written by `tuner init` (preset {preset}); change what you like, then: tuner run FILE",
        f"task: {reading.task}",
        "data:",
        *_data_lines(reading, machine, model, preset),
        "model:",
        f"  name: {model.name}{_comment(model.note or '`tuner models` lists the others')}",
        *([f"  # {why}"] if (why := explain_model(reading.task, machine)) else []),
        *_weights_lines(model),
        "recipe:                  # what is left out has the defaults of the model's authors",
        *_recipe_lines(reading, machine, model, preset),
        "search:",
        f"  trials: {trials}{_comment('more find better values; the same command goes on')}"
        if time is None
        else f"  time: {time}{_comment('of the whole command; or a number of trials')}",
        *_metric_lines(reading),
        "export: [safetensors, onnx]",
    ]
    return "\n".join(lines) + "\n"


def _data_lines(
    reading: DataReading, machine: Machine, model: ModelChoice, preset: str
) -> list[str]:
    lines = [f"  name: {reading.source}", f"  path: {quote(reading.path)}"]
    lines += [f"  {key}: {_scalar(value)}" for key, value in reading.options.items()]
    if reading.side is not None:
        size = choose_size(reading, model, preset)
        lines += [
            f"  size: {size}{_comment(f'pixels; the images have about {reading.side}')}",
            f"  augment: {_augment(preset)}{_comment('none where left and right differ')}",
        ]
    if preset == "quick" and not machine.has_gpu and reading.examples > 3 * QUICK_LIMIT:
        lines.append(f"  limit: {QUICK_LIMIT}{_comment('examples of each split, to be quick')}")
    missing = [name for name in ("valid", "test") if name not in reading.splits]
    lines += [
        f"  {name}: 0.15{_comment(f'share set aside for {why}')}"
        for name, why in (("valid", "choosing"), ("test", "the test at the end"))
        if name in missing
    ]
    return lines


def _augment(preset: str) -> str:
    return "flip" if preset == "quick" else "[flip, light, standard]"


def choose_size(reading: DataReading, model: ModelChoice, preset: str) -> int:
    """The side of the images, pixels: the preset's, at most twice their own, a multiple of 32."""
    wanted = model.sizes[list(TRIALS).index(preset)]
    if related_tasks.related_task(reading.task) != "classification" or reading.side is None:
        return wanted
    return min(wanted, max(32, round(2 * reading.side / 32) * 32))


def _weights_lines(model: ModelChoice) -> list[str]:
    if model.length is not None:  # the weights of texts' models have no key of their own
        return [f"  length: {model.length}{_comment('tokens of a text; longer ones are cut')}"]
    return [f"  weights: {model.weights}"]


def _recipe_lines(
    reading: DataReading, machine: Machine, model: ModelChoice, preset: str
) -> list[str]:
    authors = related_tasks.read_recipe(model.name, reading.task)
    rate = float(authors.get("lr", Recipe.model_fields["lr"].default))
    low, high = choose_epochs(reading, machine, preset)
    epochs = f"{{low: {low}, high: {high}}}" if high > low else str(high)
    lines = [
        f"  lr: {{low: {round_down(rate / 10)}, high: {round_down(rate * 6)}, log: true}}",
        f"  freeze_depth: {{low: 0, high: {model.deepest}}}"
        f"{_comment(f'stages frozen; `tuner models {model.name}` lists them')}",
        f"  epochs: {epochs}",
    ]
    if "batch_size" not in authors:
        lines.append(f"  batch_size: {32 if reading.examples >= 400 else 16}")
    if preset == "best":
        lines.append(f"  weight_decay: [0.0, 0.0001, 0.01]{_comment('pulls weights to 0')}")
    if has_rare_classes(reading):
        lines.append(f"  class_weights: [none, balanced]{_comment('the classes are unequal')}")
    return lines


def choose_epochs(reading: DataReading, machine: Machine, preset: str) -> tuple[int, int]:
    """The fewest and the most epochs of a trial."""
    limits = next((row[1:] for row in EPOCHS if reading.examples <= row[0]), LEAST_EPOCHS)
    limit = limits[machine.has_gpu]
    if reading.side is None:
        limit = min(MAX_TEXT_EPOCHS, limit)
    most = max(1, round(limit * EPOCH_FACTORS[preset]))
    return max(1, most // 3), most


def has_rare_classes(reading: DataReading) -> bool:
    if "class_weights" not in plugins.read_task_names(reading.task, "RECIPE_KEYS"):
        return False
    sizes = list(reading.class_sizes.values())
    return bool(sizes) and max(sizes) > RARE_CLASS_RATIO * min(sizes)


def _metric_lines(reading: DataReading) -> list[str]:
    if not has_rare_classes(reading):
        return []
    comment = _comment("accuracy would hardly notice the small classes")
    return [f"  metric: balanced_accuracy{comment}"]


def round_down(value: float) -> str:
    """A number with one significant digit, such as 5e-05, in a form that YAML reads as one."""
    digit = floor(log10(value))
    return f"{floor(value / 10**digit + 1e-9)}e{digit}"


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    return str(value).lower() if isinstance(value, bool) else quote(str(value))


def quote(text: str) -> str:
    """A text as a YAML scalar."""
    return text if re.fullmatch(r"[\w./-]*[A-Za-z][\w./-]*", text) else json.dumps(text)


def _comment(text: str) -> str:
    return f"  # {text}"
