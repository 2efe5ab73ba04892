"""`tuner models --for DATA`: which pretrained model suits some data, by one forward pass each."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tuner.commands.columns import align_columns
from tuner.commands.data_scan import DataReading
from tuner.commands.init import choose_reading, has_gpu, write_new
from tuner.commands.models_space import format_models_space
from tuner.commands.session import home_folder
from tuner.config import parsing, plugins, yaml_document
from tuner.config.durations import parse_duration
from tuner.config.run import EngineSettings, Run
from tuner.config.space import dump_yaml
from tuner.errors import DataError, SpaceError, suggest_names

if TYPE_CHECKING:
    from tuner.training.model_scores import ModelScore

SAMPLE = 500  # examples of each split, classes in proportion
BEST_COUNT = 3  # models that --write takes by their scores; the generalist joins them
# small and middle-sized models of several kinds, by what their libraries call them
CANDIDATES: dict[str, tuple[str, ...]] = {
    "image": (
        "resnet18_slim",
        "mobilenet_v3_large",
        "resnet18",
        "efficientnet_b0",
        "regnet_y_1_6gf",
        "resnet50",
        "convnext_tiny",
        "swin_t",
        "timm/tf_efficientnet_lite0",
        "timm/vit_tiny_patch16_224",
        "timm/convnextv2_atto",
        "timm/vit_small_patch14_dinov2",
    ),
    "text": (
        "distilbert",
        "bert",
        "roberta",
        "hf/sentence-transformers/all-MiniLM-L6-v2",
        "hf/microsoft/deberta-v3-small",
        "hf/answerdotai/ModernBERT-base",
    ),
}


@dataclass(frozen=True)
class ScoredModel:
    """A candidate with its score, or with the reason why it has none."""

    name: str
    weights: str | None  # the user's own file or folder
    score: "ModelScore | None" = None
    reason: str = ""


def choose_models(
    data: str,
    among: str | None,
    time_limit: str,
    weights: Sequence[str],
    as_: str | None,
    out: Path | None,
) -> None:
    """Scores the candidates, prints a table, and writes a space file where `out` is given.

    Raises:
        DataError: The data cannot be read, or no candidate can be scored.
        SpaceError: An option is wrong.
    """
    reading = choose_reading(data, as_)
    own_weights = read_weights(weights)
    names = find_candidates(reading, among, own_weights)
    seconds = read_time(time_limit)
    typer.echo(
        f"{data}: {reading.description}; {SAMPLE} examples of each split, {len(names)} models"
    )
    home = home_folder(lambda text: typer.echo(f"tuner: warning: {text}", err=True))
    metric = plugins.list_metrics(reading.task)[0]
    models = []
    for model in score_models(reading, names, own_weights, home, seconds):
        models.append(model)
        if model.score is None:
            typer.echo(f"{model.name}: left out: {model.reason}")
    ranked = rank(models, metric)
    if not ranked:
        raise DataError(
            f"none of the {len(names)} models can be scored here, for the reasons above; give "
            "weights of your own with --weights MODEL=FILE"
        )
    generalist = find_generalist([model.name for model in ranked], ranked)
    for line in format_table(ranked, metric, generalist):
        typer.echo(line)
    if out is not None:
        chosen = ranked[:BEST_COUNT]
        if generalist not in {model.name for model in chosen}:
            chosen.append(next(model for model in ranked if model.name == generalist))
        weights_by_model = {model.name: model.weights for model in chosen}
        write_new(out, format_models_space(reading, weights_by_model, home, gpu=has_gpu()))
        typer.echo(f"wrote {out} with {', '.join(model.name for model in chosen)}")


def read_weights(words: Sequence[str]) -> dict[str, str]:
    """The files or folders of `--weights MODEL=FILE`, by model. Raises SpaceError."""
    own: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise SpaceError(f"--weights {word!r}: expected MODEL=FILE, such as resnet50=r50.pth")
        if not Path(path).expanduser().exists():
            raise SpaceError(f"--weights {word!r}: there is no {path}")
        own[name] = str(Path(path).expanduser())
    return own


def read_time(text: str) -> float:
    """The seconds of `--time`. Raises SpaceError."""
    try:
        return parse_duration(text)
    except ValueError:
        raise SpaceError(f"--time {text!r}: expected a duration such as 10m, 1h or 90s") from None


def find_candidates(
    reading: DataReading, among: str | None, own_weights: Mapping[str, str]
) -> list[str]:
    """The models to score: those of a pattern, or of the list for the kind of data; and those with
    weights of the user's own.

    Raises SpaceError where there are none for the task.
    """
    if among is None:
        names = list(CANDIDATES["text" if reading.side is None else "image"])
    else:
        from tuner.training.model_summary import find_models

        patterns = [part.strip() for part in among.split(",")]
        names = [
            name
            for part in patterns
            for name in (find_models(part) if "*" in part or "?" in part else [part])
        ]
    names = list(dict.fromkeys([*names, *own_weights]))
    known = []
    for name in names:
        if ":" not in name and plugins.find_model_family(name) is None:
            raise SpaceError(
                f"{name!r} is no model{suggest_names(name, plugins.list_names('model'))}"
            )
        if reading.task in plugins.list_tasks("model", name):
            known.append(name)
    if not known:
        raise SpaceError(f"none of {', '.join(names[:5])} is for {reading.task}")
    return known


def score_models(
    reading: DataReading,
    names: Sequence[str],
    own_weights: Mapping[str, str],
    home: Path,
    seconds: float,
) -> Iterator[ScoredModel]:
    """Yields each model with its score, or with the reason why it has none.

    After `seconds` no further model is begun.
    """
    from tuner.training.devices import select_device
    from tuner.training.model_scores import UnusableModel, score_model

    device_context = select_device(EngineSettings(), home)
    start = time.monotonic()
    for name in names:
        weights = own_weights.get(name)
        if time.monotonic() - start > seconds:
            yield ScoredModel(name, weights, reason="no time was left; give more with --time")
            continue
        try:
            score = score_model(make_run(reading, name, weights), device_context)
        except UnusableModel as error:
            yield ScoredModel(name, weights, reason=str(error))
        else:
            yield ScoredModel(name, weights, score)


def make_run(reading: DataReading, name: str, weights: str | None) -> Run:
    """The run of a model on a sample of the data. Raises SpaceError."""
    model: dict[str, Any] = {"name": name}
    if weights is not None:
        model[weights_key(name)] = weights
    data = {"name": reading.source, "path": reading.path, **reading.options, "limit": SAMPLE}
    text = dump_yaml({"task": reading.task, "data": data, "model": model})
    return parsing.parse_space(yaml_document.parse_document(text, "--for")).sample(None)


def weights_key(name: str) -> str:
    """The key of a model that takes the user's own weights: a folder or a file."""
    return "folder" if "folder" in plugins.read_keys("model", name).fields else "weights"


def rank(models: Sequence[ScoredModel], metric: str) -> list[ScoredModel]:
    """The models with a score, the best first: by the linear probe, then by LogME."""
    minimised = {
        name for task in plugins.list_names("task") for name in plugins.list_minimised(task)
    }
    sign = 1 if metric in minimised else -1
    return sorted(
        (model for model in models if model.score is not None),
        key=lambda m: (sign * m.score.probe[metric], -m.score.logme) if m.score else (0.0, 0.0),
    )


def find_generalist(names: Sequence[str], models: Sequence[ScoredModel]) -> str:
    """The model that is best whatever the data: of the highest ImageNet accuracy that torchvision
    publishes; where it publishes none of these, of the most parameters.
    """
    accuracies = published_accuracies(names)
    if accuracies:
        return max(accuracies, key=accuracies.__getitem__)
    return max(models, key=lambda m: m.score.parameters if m.score else 0).name


def published_accuracies(names: Sequence[str]) -> dict[str, float]:
    """The accuracy on ImageNet of the default weights of torchvision's classifiers, in per cent."""
    from torchvision.models import get_model_weights, list_models

    known = set(list_models())
    found = {}
    for name in names:
        if name not in known:
            continue
        metrics = get_model_weights(name).DEFAULT.meta.get("_metrics", {})
        accuracy = metrics.get("ImageNet-1K", {}).get("acc@1")
        if accuracy is not None:
            found[name] = float(accuracy)
    return found


def format_table(models: Sequence[ScoredModel], metric: str, generalist: str) -> list[str]:
    """The lines of the table, the best model first."""
    rows = []
    for place, model in enumerate(models):
        score = model.score
        assert score is not None
        notes = ["first choice"] * (place == 0) + ["generalist"] * (model.name == generalist)
        rows.append(
            (
                model.name,
                f"{score.probe[metric]:.4f}",
                f"{score.logme:.3f}",
                f"{score.milliseconds:.2f}",
                f"{score.parameters / 1e6:.2f} M",
                str(score.features),
                ", ".join(notes),
            )
        )
    header = ("model", f"probe {metric}", "LogME", "ms", "parameters", "features", "")
    return align_columns(header, rows, right=(1, 2, 3, 4, 5))
