"""What a model costs where it is used: parameters, megabytes, milliseconds for one example."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tuner.config.run import Run
from tuner.core.export_module import ExportModule
from tuner.messages import Assignment
from tuner.training.building import build_model, load_dataset

TIMED_CALLS, WARM_UP_CALLS = 10, 2
TIMED_SECONDS = 2.0
FLOAT_BYTES = 4
_known: dict[str, dict[str, float]] = {}  # of this process: equal models cost the same


@torch.no_grad()
def costs_of(run: Run, home: Path) -> dict[str, float]:
    """The costs of a run's model, measured once in this process for equal models.

    Returns:
        `parameters`; `megabytes` of all weights in float32; `milliseconds`, the median of
        up to TIMED_CALLS calls with one example, by torch on the CPU.
    """
    key = f"{run.task.name} {run.model.to_dict()} {run.data.options.get('size')} {home}"
    if key not in _known:
        dataset = load_dataset(run, home)
        staged_model = build_model(run.without_weights(), home, len(dataset.classes))
        model = ExportModule(staged_model, dataset.input_spec).eval()
        weights = sum(value.numel() for value in model.export_state().values())
        example = dataset.input_spec.to_export_input(dataset.valid.take(torch.tensor([0]), 0).x)
        _known[key] = {
            "parameters": float(sum(p.numel() for p in staged_model.model.parameters())),
            "megabytes": round(FLOAT_BYTES * weights / 1e6, 3),
            "milliseconds": median_milliseconds(lambda: model(example), TIMED_CALLS)[0],
        }
    return _known[key]


def median_milliseconds(call: Callable[[], Any], calls: int) -> tuple[float, int]:
    """The median of up to `calls` calls, and how many they were, after WARM_UP_CALLS that warm up.

    Slow calls are fewer: they end after TIMED_SECONDS, warming up included, but are at least one.
    """
    milliseconds: list[float] = []
    begin = time.perf_counter()
    for number in range(WARM_UP_CALLS + calls):
        start = time.perf_counter()
        if milliseconds and start - begin > TIMED_SECONDS:
            break
        call()
        if number >= WARM_UP_CALLS:
            milliseconds.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(milliseconds), 3), len(milliseconds)


def describe_excess(costs: Mapping[str, float], limits: Mapping[str, float]) -> str | None:
    """Which limits a model exceeds, in words; None: it keeps them all."""
    over = [
        f"{costs[name]:,.4g} {name}, at most {limit:,.4g}"
        if name != "parameters"
        else f"{costs[name]:,.0f} {name}, at most {limit:,.0f}"
        for name, limit in limits.items()
        if costs[name] > limit
    ]
    return "; ".join(over) or None


def measure_model_costs(
    assignments: tuple[Assignment, ...], report: Callable[[Any], bool], slot: int
) -> list[dict[str, float]]:
    """The costs of each run's model, all measured one after another in this process."""
    return [costs_of(a.run, Path(a.home)) for a in assignments]
