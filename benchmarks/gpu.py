"""What `tuner` makes of a GPU: one command, at most nine minutes, a table and a JSON file.

    python benchmarks/gpu.py [--rows NAME ...] [--minutes 9] [--json FILE]
    python benchmarks/gpu.py --cpu --small          # every row in miniature, to see that the kit works

Each row is a ratio of two things measured in one run, in turn, after a warm-up that does not count: medians. It makes its data
itself, needs no network and no weights, and wants Python 3.11 or later, torch, torchvision and what `scripts/gpu_wheels.py` brings.
The JSON file is written anew after each row, so a run that is cut off leaves what it had. Rows come in the order of their
importance; one that does not fit what is left of the minutes, or whose package is missing, says so and is left out.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
RESULTS = HERE / "plots" / "gpu.json"
CPU_RESULTS = HERE.parent / "build" / "gpu-cpu.json"
HOW_TO_BRING = "scripts/gpu_wheels.py brings most packages to a machine without a network"
# modules without which nothing of `tuner` can be measured
NEEDED = ("torch", "torchvision", "numpy", "PIL", "pydantic", "yaml", "torchmetrics", "safetensors")


@dataclass(frozen=True)
class Row:
    """A row of the table. `seconds` are what it is expected to take on an H100; `needs` are modules."""

    name: str
    function: str
    seconds: float
    needs: tuple[str, ...] = ()


# the order is that of importance: the last ones go first where the minutes do not suffice
ROWS = (
    Row("epoch", "gpu_training:epoch_row", 40),
    Row("loader", "gpu_training:loader_row", 30),
    Row("freeze", "gpu_training:freeze_row", 65, ("timm",)),
    Row("checkpoints", "gpu_training:checkpoint_row", 45),
    Row("busy", "gpu_training:busy_row", 15),
    Row("memory", "gpu_training:memory_row", 10),
    Row("faster-rcnn", "gpu_training:faster_rcnn_row", 20, ("faster_coco_eval",)),
    Row("rt-detr", "gpu_training:rtdetr_row", 25, ("faster_coco_eval", "transformers", "scipy")),
    Row("u-net", "gpu_training:unet_row", 15, ("segmentation_models_pytorch", "timm")),
    Row("bert", "gpu_training:bert_row", 20, ("transformers",)),
    Row("search", "gpu_search:search_row", 75, ("optuna", "typer", "rich")),
    Row("sharing", "gpu_search:sharing_row", 75, ("optuna", "typer", "rich")),
    Row("precision", "gpu_precision:precision_row", 60, ("faster_coco_eval", "timm")),
    Row("photographs", "gpu_training:photograph_row", 35),
)


def missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def measure(row: Row, setup: Any, left: float) -> Any:
    """What becomes of a row when so many seconds are left."""
    from gpu_measure import RowResult, release

    lacking = missing(row.needs)
    if lacking:
        return RowResult(
            row.name, "skipped", f"not installed: {', '.join(lacking)}; {HOW_TO_BRING}"
        )
    if not setup.small and row.seconds > left:
        need = f"it takes about {row.seconds:.0f} s, and {max(0, left):.0f} s are left"
        return RowResult(row.name, "skipped", f"{need}; --rows {row.name} measures it alone")
    module, _, function = row.function.partition(":")
    start, figures = time.monotonic(), []
    state, reason = "measured", ""
    try:
        for figure in getattr(importlib.import_module(module), function)(setup):
            figures.append(figure)
    # whatever goes wrong in a row, the others are worth having; the file and the table say what it was
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        state, reason = "failed", f"{type(error).__name__}: {error}"
    release()
    return RowResult(row.name, state, reason, time.monotonic() - start, figures)


def hardware(setup: Any) -> str:
    import torch
    import torchvision

    device = "CPU"
    if setup.device.type == "cuda":
        memory = torch.cuda.get_device_properties(setup.device).total_memory / 2**30
        device = f"{torch.cuda.get_device_name(setup.device)}, {memory:.0f} GiB"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    cores = len(os.sched_getaffinity(0))
    load = f"load average {os.getloadavg()[0]:.1f} at the start"
    return f"{device}; {cores} cores, {load}; Python {platform.python_version()}, {versions}"


def write(path: Path, content: dict[str, Any]) -> None:
    """The file is the old one or the new one, also where the process is killed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def lines(result: Any, small: bool) -> Iterator[str]:
    """The table's lines of a row."""
    from arms import spread

    for figure in result.figures:
        goal = "" if figure.goal is None else f"{'≥' if figure.at_least else '≤'} {figure.goal:.3g}"
        verdict = "(miniature)" if small else figure.verdict
        both = f"{spread(figure.tuner, 3)} against {spread(figure.plain, 3)} {figure.unit}"
        told = f"{both}; {figure.notes}" if figure.notes else both
        n = f"n = {len(figure.tuner)}"
        yield f"| {result.name} | {figure.what} | {goal} | {figure.ratio:.3f} | {verdict} | {told}, {n} |"
    if result.state != "measured":
        yield f"| {result.name} | | | | {result.state} | {result.reason} |"


def run(args: argparse.Namespace, setup: Any) -> list[Any]:
    start = time.monotonic()
    results: list[Any] = []
    told = {"hardware": hardware(setup), "small": args.small, "minutes": args.minutes}
    print(f"{told['hardware']}\n")
    if args.small:
        print("In miniature: that each row runs is what this shows, and its figures say nothing.\n")
    print("| row | what | goal | ratio | | measured |\n|---|---|---|---|---|---|")
    for row in ROWS:
        if args.rows and row.name not in args.rows:
            continue
        result = measure(row, setup, 60 * args.minutes - (time.monotonic() - start))
        results.append(result)
        write(args.json, {**told, "rows": [each.to_dict() for each in results]})
        for line in lines(result, args.small):
            print(line, flush=True)
    print(f"\n{time.monotonic() - start:.0f} s; {args.json}")
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU, with stand-ins")
    parser.add_argument("--small", action="store_true", help="each row in miniature")
    parser.add_argument("--minutes", type=float, default=9.0, help="what all rows may take")
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS.relative_to(HERE.parent)}")
    args = parser.parse_args()
    args.json = args.json or (CPU_RESULTS if args.cpu else RESULTS)
    return args


def main() -> None:
    args = parse()
    if lacking := missing(NEEDED):
        wheels = "python scripts/gpu_wheels.py fetch where there is a network, then install here"
        raise SystemExit(f"gpu.py: not installed: {', '.join(lacking)}; {wheels}")
    import torch
    from gpu_measure import Setup

    from tuner.engines import _process_settings

    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit(
            f"gpu.py: torch {torch.__version__} sees no GPU here; --cpu --small runs each row in miniature"
        )
    _process_settings.keep_freed_memory()  # for all arms: it is the worker's setting
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(torch.device("cpu" if args.cpu else "cuda:0"), args.small, Path(folder))
        results = run(args, setup)
    if any(result.state == "failed" for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
