"""What pruners save and what they lose, on the same learning curves: whole studies without pruning, pruned afterwards.

    python benchmarks/pruners.py digits FOLDER [FOLDER ...] [--trials 24] [--seeds 2] [--size 64]
    python benchmarks/pruners.py --table-only

Per data set and seed a random search by `tuner run` without pruning, every epoch's score and seconds kept. Each pruner is then shown
the trials in their order, epoch by epoch. Saved: the share of the epochs' seconds in trials that it ends. Lost: how far the best
of what it lets complete stays below the best of all, in points of validation accuracy.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import arms
import optuna
import yaml

from tuner.search.pruners import PRUNERS

RAW = arms.PLOTS / "pruners.json"
LONGEST = 8
DEFAULT = 1  # the default recipe's trial; trial 0 is the linear probe's
KINDS = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
    "momentum": optuna.distributions.FloatDistribution(0.8, 0.99),
    "freeze_depth": optuna.distributions.IntDistribution(0, 5),
    "epochs": optuna.distributions.IntDistribution(1, LONGEST),
}


def write(folder: Path, data: str, search: dict[str, Any], args: argparse.Namespace) -> Path:
    """The space file of one study."""
    source = (
        {"name": "digits", "size": 32}
        if data == "digits"
        else {"name": "folder", "path": str(Path(data).resolve()), "size": args.size}
    )
    tree = {
        "task": "classification",
        "data": source,
        "model": {"name": "resnet18_slim", "weights": "bundled"},
        "recipe": {
            **arms.SPACE,
            "freeze_depth": {"low": 0, "high": 5},
            "epochs": {"low": 1, "high": 8},
            "batch_size": 32,
        },
        "search": {"retrain": False, "keep": 0, "confirm": "none", **search},
        "export": ["safetensors"],
    }
    file = folder / "race.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def curves(data: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameters, scores and seconds of every trial of a search without pruning."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        file = write(
            Path(place),
            data,
            {"sampler": "random", "pruner": "none", "seed": seed, "trials": args.trials},
            args,
        )
        lines = arms.stamped(
            arms.tuner("run", file, Path(place) / "studies"), home=Path(place) / "home"
        )
    trials, epochs = [], []
    for line in lines:
        if line["event"] == "epoch":
            epochs.append(line)
        elif line["event"] == "trial":
            scores, seconds = (
                [e["scores"]["accuracy"] for e in epochs],
                [e["seconds"] for e in epochs],
            )
            trials.append({"params": line["params"], "scores": scores, "seconds": seconds})
            epochs = []
    return trials


def pruned(trials: list[dict[str, Any]], pruner: str) -> tuple[float, float]:
    """The share of the seconds saved, and the points lost."""
    study = optuna.create_study(direction="maximize", pruner=PRUNERS[pruner](LONGEST))
    spent, best = 0.0, 0.0
    for known in trials:
        trial = study.ask(KINDS) if study.enqueue_trial(known["params"]) is None else None
        assert trial is not None and trial.params == known["params"]
        for step, (value, seconds) in enumerate(
            zip(known["scores"], known["seconds"], strict=True), 1
        ):
            trial.report(value, step)
            spent += seconds
            # as the search does: never the default recipe, and nobody after the last epoch
            last = step == len(known["scores"])
            if not last and trial.number != DEFAULT and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            best = max(best, *known["scores"])
            study.tell(trial, max(known["scores"]))
    return 1 - spent / sum(sum(t["seconds"]) for t in trials), 100 * (
        max(max(t["scores"]) for t in trials) - best
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "hardware": arms.hardware(),
        "settings": {"trials": args.trials, "size": args.size},
        "data": {},
    }
    for seed in range(args.seeds):
        for data in args.data:
            found["data"].setdefault(Path(data).name, []).append(curves(data, seed, args))
            arms.save(found, RAW)
    return found


def table(found: dict[str, Any]) -> None:
    print(f"{found['hardware']}; {found['settings']}\n")
    names = [name for name in PRUNERS if name != "none"]
    print(
        f"| data | n | {' | '.join(f'{name}: saved, % | lost, points' for name in names)} |\n|{'---|' * (2 + 2 * len(names))}"
    )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for data, studies in [
        *found["data"].items(),
        ("**all**", [s for each in found["data"].values() for s in each]),
    ]:
        cells = []
        for name in names:
            results = [pruned(trials, name) for trials in studies]
            cells += [
                f"{100 * statistics.mean(r[0] for r in results):.0f}",
                f"{statistics.mean(r[1] for r in results):.2f}",
            ]
        print(f"| {data} | {len(studies)} | {' | '.join(cells)} |")


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", help="digits, or a folder of images")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="side of the folders' images, pixels")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument(
        "--table-only",
        action="store_true",
        help="measure nothing; show again what plots/*.json holds",
    )
    args = parser.parse_args()
    if not args.table_only and not args.data:
        parser.error("name at least one data set, unless --table-only")
    return args


def main() -> None:
    args = arguments(__doc__)
    table(json.loads(RAW.read_text()) if args.table_only else measure(args))


if __name__ == "__main__":
    main()
