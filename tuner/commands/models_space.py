"""A space file in which several models are searched, for `tuner models --for DATA --write FILE`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.commands.data_scan import DataReading
from tuner.commands.space_proposal import (
    TRIALS,
    Machine,
    choose_epochs,
    has_rare_classes,
    round_down,
)
from tuner.config import plugins, related_tasks
from tuner.config.run import Recipe
from tuner.config.space import dump_yaml

PRESET = "medium"


def format_models_space(
    reading: DataReading, weights_by_model: Mapping[str, str | None], home: Path, *, gpu: bool
) -> str:
    """The space file as text. It can be run as it is.

    Args:
        reading: The data.
        weights_by_model: The models, the best first, each with the user's own file or folder of
            weights, or None.
        home: The folder of caches and downloads.
        gpu: Whether there is a GPU, which affords more epochs.
    """
    names = list(weights_by_model)
    data: dict[str, Any] = {"name": reading.source, "path": reading.path, **reading.options}
    if reading.side is not None and reading.task == "classification":
        data["augment"] = ["flip", "light"]
    search: dict[str, Any] = {"trials": TRIALS[PRESET]}
    if has_rare_classes(reading):
        search["metric"] = "balanced_accuracy"
    content = {
        "task": reading.task,
        "data": data,
        "model": {"name": names if len(names) > 1 else names[0], **_weights(weights_by_model)},
        "recipe": _recipe(reading, names, Machine(gpu, False, home)),
        "search": search,
        "export": ["safetensors", "onnx"],
    }
    header = (
        f"# {reading.path}: {reading.description}.\n"
        "# Written by `tuner models --for`: the models whose features say most about the data, and "
        "the\n# strongest in general. Change what you like, then: tuner run FILE\n"
    )
    return header + dump_yaml(content)


def _weights(weights_by_model: Mapping[str, str | None]) -> dict[str, Any]:
    """The keys of weights that are not at a default which all models share."""
    content: dict[str, Any] = {}
    for key in ("weights", "folder"):
        values: dict[str, Any] = {}
        for name, own in weights_by_model.items():
            fields = plugins.read_keys("model", name).fields
            if key not in fields:
                continue
            is_own = own is not None and (key == "folder") == ("folder" in fields)
            values[name] = own if is_own else fields[key].get_default()
        if set(values.values()) - {"default", None}:
            content[key] = by_condition(values, "name", lambda value: {"choices": [value]})
    return content


def _recipe(reading: DataReading, names: list[str], machine: Machine) -> dict[str, Any]:
    """The ranges, each model's around the rate of its authors."""
    rates = {}
    for name in names:
        authors = related_tasks.read_recipe(name, reading.task)
        rates[name] = float(authors.get("lr", Recipe.model_fields["lr"].default))
    low, high = choose_epochs(reading, machine, PRESET)
    recipe: dict[str, Any] = {
        "lr": by_condition(
            rates,
            "model",
            lambda rate: {
                "low": float(round_down(rate / 10)),
                "high": float(round_down(rate * 6)),
                "log": True,
            },
        ),
        "freeze": {"low": 0.0, "high": 1.0},
        "epochs": {"low": low, "high": high} if high > low else high,
    }
    if has_rare_classes(reading):
        recipe["class_weights"] = ["none", "balanced"]
    return recipe


def by_condition(values: Mapping[str, Any], key: str, write: Any) -> Any:
    """One value of a key where all models share it, otherwise a list with conditions by model."""
    if len(set(values.values())) == 1:
        (value,) = set(values.values())
        written = write(value)
        return written["choices"][0] if "choices" in written else written
    models: dict[Any, list[str]] = {}
    for name, value in values.items():
        models.setdefault(value, []).append(name)
    return [
        write(value) | {"when": {key: of_value if len(of_value) > 1 else of_value[0]}}
        for value, of_value in models.items()
    ]
