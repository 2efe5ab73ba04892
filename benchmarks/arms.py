"""What the speed benchmarks share: commands whose lines are stamped as they come, `tuner`'s side of a comparison, the plots' looks.

Every arm is a command of its own and its clock starts when it is started, so imports and start-up count for all alike. No torch
here: the process that measures stays small.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
PLOTS = HERE / "plots"
COLOURS = {"plain": "#8a8a8a", "ray": "#c98a2b", "tuner": "#2460a7"}
NAMES = {"plain": "plain Optuna", "ray": "Ray Tune", "tuner": "tuner"}
MAX_DEPTH = 9

Lines = list[dict[str, Any]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every speed benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="images: FOLDER/{train,valid,test}/<class>/*.jpg; photographs.py makes one",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="ImageNet weights of tf_efficientnet_lite0, a .safetensors file with timm's names",
    )
    parser.add_argument(
        "--model", default="timm/tf_efficientnet_lite0", help="tuner's name for that model"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="loader processes of the plain script; 0 can be faster: try both",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="where TUNER_HOME and the studies lie meanwhile; default: the temporary folder",
    )
    parser.add_argument(
        "--plot-only",
        action="store_true",
        help="measure nothing; show again what plots/*.json holds",
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if not args.plot_only and (args.folder is None or args.weights is None):
        parser.error("FOLDER and --weights are needed, unless --plot-only")
    return args


def stamped(command: Sequence[str | Path], home: Path | None = None) -> Lines:
    """The JSON lines a command prints, each with the seconds `at` which it came; the last is {"event": "end"}. Exits if it fails."""
    env = {**os.environ, **({"TUNER_HOME": str(home)} if home else {})}
    lines: Lines = []
    with tempfile.TemporaryFile("w+") as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"event"'):
                lines.append({**json.loads(line), "at": round(time.monotonic() - start, 3)})
        if process.wait() != 0:
            errors.seek(0)
            raise SystemExit(
                f"{' '.join(map(str, command))}\nended with {process.returncode}:\n{errors.read()[-3000:]}"
            )
        lines.append({"event": "end", "at": round(time.monotonic() - start, 3)})
    return lines


def of(lines: Lines, event: str) -> Lines:
    return [line for line in lines if line["event"] == event]


# -- the two sides


def plain(script: str, args: argparse.Namespace, *more: str | Path) -> list[str | Path]:
    """The command of a plain script beside this file."""
    return [
        sys.executable,
        HERE / script,
        args.folder,
        "--weights",
        args.weights,
        "--workers",
        str(args.workers),
        *more,
    ]


def tuner(verb: str, file: Path, studies: Path, *overrides: str) -> list[str | Path]:
    return [sys.executable, "-m", "tuner", verb, file, *overrides, "--studies", studies, "--json"]


def write_space(
    path: Path, args: argparse.Namespace, recipe: Mapping[str, Any], search: Mapping[str, Any]
) -> Path:
    """A space file over the same images, prepared as the plain script's transforms do it, and the same model."""
    pixels = {
        "size": 128,
        "resize": 146,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    tree = {
        "task": "classification",
        "data": {"name": "folder", "path": str(args.folder.resolve()), **pixels},
        "model": {"name": args.model, "weights": str(args.weights.resolve())},
        "recipe": {"optimizer": "sgd", "batch_size": 32, "schedule": "constant", **recipe},
        "search": {"retrain": False, "keep": 0, "confirm": "none", **search},
        "export": ["safetensors"],
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


SPACE = {
    "lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "momentum": {"low": 0.8, "high": 0.99},
    "freeze_depth": {"low": 0, "high": MAX_DEPTH},
    "epochs": {"low": 1, "high": 4},
}
"""What every search looks through; the plain scripts say the same in their own words."""


# -- what is told


def hardware() -> str:
    """Cores, processor, what else the machine does, versions: in one line, to be taken before anything is measured."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0))
    model = names[0] if names else platform.machine()
    versions = (
        f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}"
    )
    waiting = os.environ.get(
        "OMP_WAIT_POLICY", "as each sets it"
    )  # spinning threads on a crowded machine change everything
    return f"{cores} cores of {model}, load average {os.getloadavg()[0]:.1f} at the start, OMP_WAIT_POLICY {waiting}, {versions}"


def measure_missing(
    args: argparse.Namespace,
    raw: Path,
    measure: Callable[[argparse.Namespace, str, int, str], dict[str, Any]],
) -> dict[str, Any]:
    """The results in `raw`, after every arm of every set and seed that lacks there was measured.

    The arms of a set and seed run one after another, and the first one rotates from seed to seed. Each result is written at
    once, so that the next call goes on where this one was stopped. With `--table-only` nothing is measured.
    """
    found: dict[str, Any] = {"hardware": hardware(), "rows": []}
    if raw.exists():
        found = json.loads(raw.read_text())
    known = {(row["set"], row["seed"], row["arm"]) for row in found["rows"]}
    for seed in range(0 if args.table_only else args.seeds):
        turn = seed % len(args.arms)
        for name in args.sets:
            for arm in args.arms[turn:] + args.arms[:turn]:
                if (name, seed, arm) not in known:
                    found["rows"].append(measure(args, name, seed, arm))
                    save(found, raw)
                    print(json.dumps(found["rows"][-1]), flush=True)
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median; with the least and the most where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return (
        middle
        if len(values) == 1
        else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def save(found: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def figure(panels: int, height: float = 3.6, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure 900 pixels wide and its panels, without frames, as many in each of its rows."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, height), dpi=100, layout="constrained")
    axes = list(fig.subplots(rows, panels // rows, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=3, labelsize=9)
    return fig, axes
