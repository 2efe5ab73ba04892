"""The same trials on both sides: one per freeze depth, identical parameters, no search and no pruning.

    python benchmarks/replay.py FOLDER --weights lite0.safetensors [--epochs 2] [--repeats 3]
    python benchmarks/replay.py --plot-only

Plain: plain_optuna.py --replay, seconds of each trial. `tuner`: `tuner run` over a grid of freeze depths, in its own worker
process, with an empty TUNER_HOME for each repeat; a trial's seconds reach from the end of the one before to its own end, so
the coordinator's time counts. Decoding, which `tuner` does once before the first trial, is measured apart and added to its total.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import arms

RAW = arms.PLOTS / "replay.json"
DEPTHS = range(arms.MAX_DEPTH + 1)


def plain(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    listed = [
        {"lr": args.lr, "momentum": args.momentum, "freeze_depth": d, "epochs": args.epochs}
        for d in DEPTHS
    ]
    file = folder / "trials.json"
    file.write_text(json.dumps(listed))
    lines = arms.stamped(arms.plain("plain_optuna.py", args, "--replay", file))
    trials = arms.of(lines, "trial")
    return {
        "trials": [t["took"] for t in trials],
        "scores": [t["score"] for t in trials],
        "decoding": 0.0,
        "whole": lines[-1]["at"],
    }


def tuner(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    depth = {"low": 0, "high": arms.MAX_DEPTH}
    recipe = {
        "head": "fresh",
        "lr": args.lr,
        "momentum": args.momentum,
        "freeze_depth": depth,
        "epochs": args.epochs,
    }
    search = {"sampler": "grid", "pruner": "none", "trials": len(DEPTHS)}
    file = arms.write_space(folder / "replay.yaml", args, recipe, search)
    lines = arms.stamped(arms.tuner("run", file, folder / "studies"), home=folder / "home")
    ends = [arms.of(lines, "begin")[0]["at"], *(line["at"] for line in arms.of(lines, "trial"))]
    order = [line["params"]["freeze_depth"] for line in arms.of(lines, "trial")]
    took = dict(zip(order, (b - a for a, b in itertools.pairwise(ends)), strict=True))
    scores = {line["params"]["freeze_depth"]: line["value"] for line in arms.of(lines, "trial")}
    return {
        "trials": [round(took[d], 3) for d in DEPTHS],
        "scores": [scores[d] for d in DEPTHS],
        "decoding": decoding(file, folder / "home2"),
        "whole": lines[-1]["at"],
    }


def decoding(file: Path, home: Path) -> float:
    """Seconds for decoding all images of a space into an empty home."""
    from tuner.config import parsing
    from tuner.training import building

    home.mkdir()
    run = parsing.load_space(file).make_run({})
    building.input_spec_of(run.model)  # imports what it needs
    start = time.monotonic()
    building.load_dataset(run, home)
    return round(time.monotonic() - start, 3)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both arms in turn; the one that begins alternates."""
    hardware, repeats = arms.hardware(), []
    for number in range(args.repeats):
        found = {}
        for name, arm in [("plain", plain), ("tuner", tuner)][:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
                found[name] = arm(args, Path(folder))
        repeats.append(found)
    settings = {
        "epochs": args.epochs,
        "lr": args.lr,
        "momentum": args.momentum,
        "workers": args.workers,
    }
    return {"hardware": hardware, "settings": settings, "repeats": repeats}


def total(arm: dict[str, Any]) -> float:
    return sum(arm["trials"]) + arm["decoding"]


def table(found: dict[str, Any]) -> None:
    repeats = found["repeats"]
    print(
        f"{found['hardware']}; {found['settings']}; medians (least to most) of n = {len(repeats)} repeats\n"
    )
    print(
        "| freeze depth | plain, s | tuner, s | plain / tuner | accuracy, plain | accuracy, tuner |\n|---|---|---|---|---|---|"
    )

    def row(label: object, measured: Any, scores: str) -> None:
        a, b = ([measured(r[name]) for r in repeats] for name in ("plain", "tuner"))
        ratios = [x / y for x, y in zip(a, b, strict=True) if x]
        print(
            f"| {label} | {arms.spread(a)} | {arms.spread(b)} | {arms.spread(ratios, 2) if ratios else ''} | {scores} |"
        )

    for depth in DEPTHS:
        scores = (
            f"{statistics.median(r[name]['scores'][depth] for r in repeats):.3f}"
            for name in ("plain", "tuner")
        )
        row(depth, lambda arm, d=depth: arm["trials"][d], " | ".join(scores))
    row("decoding", lambda arm: arm["decoding"], " | ")
    row("**all trials**", total, " | ")
    row("whole command", lambda arm: arm["whole"], " | ")


def plot(found: dict[str, Any]) -> None:
    repeats = found["repeats"]
    fig, (axis,) = arms.figure(1)
    for place, name in ((-0.2, "plain"), (0.2, "tuner")):
        heights = [statistics.median(r[name]["trials"][d] for r in repeats) for d in DEPTHS]
        bars = axis.bar([d + place for d in DEPTHS], heights, 0.38, color=arms.COLOURS[name])
        axis.bar_label(
            bars,
            [f"{h:.1f}" if h < 10 else f"{h:.0f}" for h in heights],
            fontsize=8,
            color=arms.COLOURS[name],
        )
        axis.text(
            0.98,
            0.92 if name == "plain" else 0.84,
            _words(repeats, name),
            color=arms.COLOURS[name],
            ha="right",
            transform=axis.transAxes,
        )
    axis.set_xticks(list(DEPTHS))
    axis.set_xlabel("freeze depth")
    axis.set_title(
        f"seconds per trial, identical parameters; epochs: {found['settings']['epochs']}",
        loc="left",
        fontsize=10,
    )
    axis.margins(y=0.12)
    fig.savefig(arms.PLOTS / "replay.png")


def _words(repeats: list[dict[str, Any]], name: str) -> str:
    seconds = statistics.median(total(r[name]) for r in repeats)
    return f"{'the same loop by hand' if name == 'plain' else 'tuner, decoding included'}: {seconds:.0f} s in all"


def main() -> None:
    parser = arms.arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=2, help="of each trial")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3)
    args = arms.parse(parser)
    if not args.plot_only:
        arms.save(measure(args), RAW)
    found = json.loads(RAW.read_text())
    table(found)
    plot(found)


if __name__ == "__main__":
    main()
