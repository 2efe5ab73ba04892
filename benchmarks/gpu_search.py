"""The rows of the GPU kit that are about whole commands: a search against a plain Optuna script, and workers that share a GPU."""

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arms
import yaml
from gpu_measure import Figure, Setup, compare
from gpu_training import photographs, square

ROOT = Path(__file__).parent.parent
DEPTHS, RATES = (0, 2, 3, 5), (0.001, 0.003, 0.01, 0.03)  # a grid of 16 trials
LOOKS_OFF = {"retrain": False, "keep": 0, "confirm": "none", "compare": "none", "pruner": "none"}


def write_space(
    file: Path, folder: Path, model: str, side: int, recipe: Any, search: Any, engine: Any
) -> Path:
    document = {
        "task": "classification",
        "data": {"name": "folder", "path": str(folder), "size": side},
        "model": {"name": model, "weights": "none"},
        "recipe": {
            "optimizer": "sgd",
            "momentum": 0.9,
            "schedule": "constant",
            "warmup": 0.0,
            **recipe,
        },
        "search": {**LOOKS_OFF, **search},
        "engine": {"name": "local", **engine},
        "export": ["safetensors"],
    }
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


def stamped(setup: Setup, command: list[str | Path]) -> arms.Lines:
    """The command's JSON lines, each with the seconds at which it came. Its processes find what this one found."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return arms.stamped(command, home=setup.home)


def trial_ends(lines: arms.Lines) -> list[float]:
    """The seconds at which the trials ended."""
    return [line["at"] for line in arms.of(lines, "trial")]


# -- a search against a plain script


def search_row(setup: Setup) -> Iterator[Figure]:
    """The same 16 trials of a ResNet-18 by `tuner run` and by Optuna over ImageFolder and DataLoader."""
    depths, rates = grid(setup)
    trials = [{"freeze_depth": depth, "lr": lr} for depth in depths for lr in rates]
    listed = setup.folder / "trials.json"
    listed.write_text(json.dumps(trials))
    tuner = grid_search(setup)
    workers = setup.pick(min(16, len(os.sched_getaffinity(0))), 0)
    script = [
        sys.executable,
        ROOT / "benchmarks" / "gpu_plain_search.py",
        photographs(setup, square(setup)),
        "--trials",
        listed,
    ]
    words = {
        **sizes(setup),
        "workers": workers,
        "device": setup.device,
    }
    script += [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    plain = stamped(setup, script)
    counts = len(trial_ends(tuner)), len(trial_ends(plain))
    what = f"search of {len(trials)} ResNet-18 trials, tuner ÷ plain Optuna script"
    notes = f"trials that ended: {counts[0]} and {counts[1]}"
    whole = tuner[-1]["at"], plain[-1]["at"]
    yield compare(what, [whole[0]], [whole[1]], 1 / 5, "s, the whole command", notes=notes)


def grid(setup: Setup) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Freeze depths and learning rates, of which each pair is a trial."""
    return setup.pick((DEPTHS, RATES), ((0, 5), (0.01,)))


def sizes(setup: Setup) -> dict[str, int]:
    """The pixels of a side, the images of a batch, and the epochs of a trial."""
    return {"size": setup.pick(224, 32), "batch": setup.pick(128, 16), "epochs": setup.pick(2, 1)}


@functools.cache
def grid_search(setup: Setup) -> arms.Lines:
    """What `tuner run` says while it carries out all trials of the grid, with one worker."""
    (depths, rates), size = grid(setup), sizes(setup)
    recipe = {
        "freeze_depth": list(depths),
        "lr": list(rates),
        "epochs": size["epochs"],
        "batch_size": size["batch"],
        # one setting for both: what freezing spares must not go to another choice of the statistics
        "batchnorm": "adapt",
        "head": "fresh",
    }
    file = write_space(
        setup.folder / "search.yaml",
        photographs(setup, square(setup)),
        "resnet18",
        size["size"],
        recipe,
        {"trials": len(depths) * len(rates), "sampler": "grid"},
        engine(setup, 1),
    )
    return stamped(setup, arms.tuner("run", file, setup.folder / "studies"))


def engine(setup: Setup, per_gpu: int) -> dict[str, Any]:
    """That many workers on one GPU; on a CPU they are simply so many workers."""
    if setup.device.type == "cuda":
        return {"device": "auto", "gpus": 1, "per_gpu": per_gpu}
    return {"device": "cpu", "workers": per_gpu}


# -- workers that share the GPU


def sharing_row(setup: Setup) -> Iterator[Figure]:
    """Trials an hour with 1, 2, 4 and 8 workers on one GPU: the best against one worker."""
    rates = {
        workers: trials_an_hour(setup, workers) for workers in setup.pick((1, 2, 4, 8), (1, 2))
    }
    best = max(rates, key=lambda workers: rates[workers] if workers > 1 else 0.0)
    notes = ", ".join(f"{workers}: {rate:.0f}" for workers, rate in rates.items())
    what = f"trials an hour of a small model, per_gpu: {best} ÷ per_gpu: 1"
    yield compare(
        what, [rates[best]], [rates[1]], 2.0, "trials an hour", at_least=True, notes=notes
    )


def trials_an_hour(setup: Setup, workers: int) -> float:
    """Of a search in its stride: the trials after the first of each worker, whose processes start meanwhile.

    In miniature the search of the other row, which has one worker, is read again.
    """
    if setup.small and workers == 1:
        return rate_after_first(trial_ends(grid_search(setup)), workers)
    trials = workers + setup.pick(max(4, 2 * workers), 1)
    folder = photographs(setup, square(setup))
    recipe = {
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "epochs": setup.pick(3, 1),
        "batch_size": setup.pick(64, 16),
        "head": "fresh",
    }
    file = write_space(
        setup.folder / f"sharing-{workers}.yaml",
        folder,
        "resnet18_slim",
        setup.pick(64, 32),
        recipe,
        {"trials": trials, "sampler": "random"},
        engine(setup, workers),
    )
    command = arms.tuner("run", file, setup.folder / "studies")
    return rate_after_first(trial_ends(stamped(setup, command)), workers)


def rate_after_first(ends: list[float], workers: int) -> float:
    """Trials an hour after the first trial of each worker."""
    return 3600 * (len(ends) - workers) / (ends[-1] - ends[workers - 1])
