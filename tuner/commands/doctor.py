"""`tuner doctor`: what is installed here, what this machine has, and what a search would use."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

import tuner
from tuner.commands.session import home_folder
from tuner.config.engine_settings import EngineSettings
from tuner.config.requirements import needed, pip_install
from tuner.errors import StorageError, count_words

PACKAGES = ("torch", "torchvision", "optuna", "optuna-dashboard", "numpy", "onnxruntime")
EXTRAS = (
    "timm",
    "segmentation",
    "text",
    "lora",
    "yolo",
    "parquet",
    "datasets",
    "ray",
    "postgres",
    "pandas",
    "openvino",
    "tensorboard",
    "mlflow",
    "wandb",
    "trackio",
)
LOW_DISK_BYTES = 2e9


def examine(studies: Path, *, as_json: bool) -> None:
    """Prints what the machine has. Raises StorageError where a folder cannot be written."""
    warnings: list[str] = []
    facts = gather_facts(studies, warnings.append)
    if as_json:
        typer.echo(json.dumps(facts | {"warnings": warnings}))
    else:
        for title, text in described(facts):
            typer.echo(f"{title:<10} {text}")
        for warning in warnings:
            print(f"tuner: warning: {warning}", file=sys.stderr)
    locked = [name for name in ("studies", "cache") if not facts[name]["writable"]]
    if locked:
        folder = facts[locked[0]]["folder"]
        way_out = "TUNER_HOME=FOLDER" if locked[0] == "cache" else "--studies FOLDER"
        raise StorageError(f"{folder} cannot be written; choose another with {way_out}")


def gather_facts(studies: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Everything that is printed, as --json prints it."""
    home = home_folder(warn)
    facts: dict[str, Any] = {
        "tuner": tuner.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: installed_version(name) for name in PACKAGES},
        "extras": {extra: missing_packages(extra) for extra in EXTRAS},
        "cpus": usable_cpus(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "studies": disk_facts(studies),
        "cache": disk_facts(home),
    }
    facts |= device_facts(home)
    for name in ("studies", "cache"):
        if facts[name]["free_gb"] * 1e9 < LOW_DISK_BYTES:
            warn(f"only {facts[name]['free_gb']} GB are free in {facts[name]['folder']}")
    return facts


def usable_cpus() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_facts(home: Path) -> dict[str, Any]:
    """The GPUs that torch sees, and what `engine: {device: auto}` takes."""
    import torch

    from tuner.training.devices import select_device, select_gpus

    engine = EngineSettings()
    context = select_device(engine, home)
    gpus = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        gpus.append({"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)})
    used = {
        "device": str(context.device),
        "precision": context.precision,
        "workers": max(1, len(select_gpus(engine)) * engine.gpu_sharing // engine.rank_count),
    }
    return {"gpus": gpus, "used": used}


def disk_facts(folder: Path) -> dict[str, Any]:
    """A folder, the gigabytes free on its disk, and whether it can be written or made."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return {
        "folder": str(folder.absolute()),
        "free_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
    }


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed; their versions are not compared."""
    names = [re.split(r"[<>=!~\[ ;(]", requirement)[0] for requirement in needed(extra)]
    return [name for name in names if installed_version(name) is None]


def described(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines that a person reads, each with its title."""
    packages = (f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    gpus = [f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in facts["gpus"]]
    used = facts["used"]
    cores = count_words(facts["cpus"], "CPU core", "CPU cores")
    workers = f"{used['workers']} worker{'s' if used['workers'] > 1 else ''}"
    lines = [
        ("tuner", f"{facts['tuner']}, Python {facts['python']}, {facts['system']}"),
        ("packages", ", ".join(packages)),
        ("machine", f"{cores}, {facts['memory_gb']} GB of memory"),
        ("GPUs", ", ".join(gpus) or "none that torch sees"),
        ("would use", f"{used['device']}, {used['precision']}, {workers}"),
    ]
    for name in ("studies", "cache"):
        place = facts[name]
        denied = "" if place["writable"] else "; CANNOT BE WRITTEN"
        lines.append((name, f"{place['folder']}, {place['free_gb']} GB free{denied}"))
    for extra, missing in facts["extras"].items():
        state = f"lacks {', '.join(missing)}: {pip_install(extra)}" if missing else "installed"
        lines.append((f"[{extra}]", state))
    return lines
