"""What lies between trials, and what a worker needs of memory.

    python benchmarks/worker.py FOLDER --weights lite0.safetensors [--repeats 3]

Gap: from the line that ends a trial to the beginning of the next one's first epoch, over a whole search of ten cheap trials by `tuner
run`. Memory: the largest peak resident set among a command's processes, with the files it has mapped, for the same two trials
(nothing frozen, and all but the head) by the plain script and by `tuner run`.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import arms

PEAK = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
assert resource.RUSAGE_CHILDREN  # what PEAK asks for is not there on every system


def gaps(args: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds between each trial and the next."""
    recipe = {**arms.SPACE, "freeze_depth": arms.MAX_DEPTH}
    file = arms.write_space(folder / "gap.yaml", args, recipe, {"trials": 10})
    lines = [
        line
        for line in arms.stamped(arms.tuner("run", file, folder / "studies"), home=folder / "home")
        if line["event"] in ("trial", "epoch")
    ]
    return [
        b["at"] - b["seconds"] - a["at"]
        for a, b in itertools.pairwise(lines)
        if a["event"] == "trial" and b["event"] == "epoch"
    ]


def peak(command: Sequence[str | Path], home: Path | None = None) -> float:
    """MB of the largest process that the command starts, itself included."""
    env = [f"TUNER_HOME={home}"] if home else []
    words = [sys.executable, "-c", PEAK, "env", *env, *map(str, command)]
    return (
        int(
            subprocess.run(
                words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ).stdout
        )
        / 1024
    )


def memory(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Peaks of the plain script and of tuner."""
    listed = folder / "trials.json"
    listed.write_text(
        json.dumps(
            [
                {"lr": 1e-3, "momentum": 0.9, "freeze_depth": d, "epochs": 1}
                for d in (0, arms.MAX_DEPTH)
            ]
        )
    )
    search = {"trials": 2, "sampler": "grid"}
    recipe = {"lr": 1e-3, "momentum": 0.9, "epochs": 1, "freeze_depth": [0, arms.MAX_DEPTH]}
    file = arms.write_space(folder / "memory.yaml", args, recipe, search)
    plain = peak(arms.plain("plain_optuna.py", args, "--replay", listed))
    return plain, peak(arms.tuner("run", file, folder / "studies"), folder / "home2")


def main() -> None:
    parser = arms.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = arms.parse(parser)
    print(f"{arms.hardware()}; {args.folder.name}; n = {args.repeats}\n")
    between: list[float] = []
    peaks: list[tuple[float, float]] = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            between += gaps(args, Path(folder))
            peaks.append(memory(args, Path(folder)))
    print("| | |\n|---|---|")
    print(f"| gap between trials, s, {len(between)} gaps | {arms.spread(between, 3)} |")
    print(f"| peak memory, plain script, MB | {arms.spread([p for p, _ in peaks], 0)} |")
    print(f"| peak memory, tuner's largest process, MB | {arms.spread([t for _, t in peaks], 0)} |")
    print(
        f"| difference of the medians, MB | {statistics.median(t for _, t in peaks) - statistics.median(p for p, _ in peaks):.0f} |"
    )


if __name__ == "__main__":
    main()
