"""What a whole search costs, in trainings of its winner: 1 would be a search for free, the number of trials one without any saving.

    python benchmarks/tuning_factor.py FOLDER --weights lite0.safetensors [--trials 24] [--seeds 3]
    python benchmarks/tuning_factor.py --plot-only

Per seed: `tuner run` without retraining; then one full training of its winner, all its epochs on the training images, alone, once
by `tuner train` (which also tests and exports as safetensors) and once by the plain twin, plain_optuna.py --replay. Each is
a whole command, start-up included, with an empty TUNER_HOME.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import arms
import yaml

RAW = arms.PLOTS / "tuning_factor.json"
KEYS = ("lr", "momentum", "freeze_depth", "epochs")


def one(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Seconds of the search, and of its winner alone on both sides."""
    search = {"trials": args.trials, "sampler": "tpe", "pruner": "median", "seed": seed}
    file = arms.write_space(folder / "factor.yaml", args, arms.SPACE, search)
    study = arms.stamped(arms.tuner("run", file, folder / "studies"), home=folder / "home")
    best = folder / "studies" / "factor" / "best.yaml"
    recipe = yaml.safe_load(best.read_text())["recipe"]
    params = {key: recipe[key] for key in KEYS}
    full = [
        "recipe.fit=train",
        "recipe.stop_epoch=null",
    ]  # best.yaml says: train and valid together, up to the best epoch
    train = arms.stamped(
        arms.tuner("train", best, folder / "studies", *full), home=folder / "home2"
    )
    listed = folder / "trials.json"
    listed.write_text(json.dumps([params]))
    plain = arms.stamped(arms.plain("plain_optuna.py", args, "--replay", listed))
    states = [line["state"] for line in arms.of(study, "trial")]
    return {
        "params": params,
        "states": states,
        "study": study[-1]["at"],
        "train": train[-1]["at"],
        "plain": plain[-1]["at"],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = {"trials": args.trials, "workers": args.workers}
    found: dict[str, Any] = {"hardware": arms.hardware(), "settings": settings, "seeds": {}}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            found["seeds"][str(seed)] = one(args, seed, Path(folder))
        arms.save(found, RAW)  # what is measured is kept, whatever happens to the next seed
    return found


def table(found: dict[str, Any]) -> None:
    seeds = found["seeds"]
    print(f"{found['hardware']}; {found['settings']}; n = {len(seeds)} seeds\n")
    print(
        "| seed | winner | trials pruned | search, s | winner by tuner, s | winner by hand, s | search / tuner | search / by hand |"
    )
    print(f"|{'---|' * 8}")
    rows = []
    for seed, r in seeds.items():
        numbers = [
            r["study"],
            r["train"],
            r["plain"],
            r["study"] / r["train"],
            r["study"] / r["plain"],
        ]
        rows.append(numbers)
        p, pruned = r["params"], r["states"].count("pruned")
        winner = f"depth {p['freeze_depth']}, {p['epochs']} epochs, lr {p['lr']:.2g}"
        print(f"| {seed} | {winner} | {pruned} of {len(r['states'])} | {shown(numbers)} |")
    print(
        f"| **median** |  |  | {shown([statistics.median(column) for column in zip(*rows, strict=True)])} |"
    )


def shown(numbers: list[float]) -> str:
    return " | ".join([f"{n:.0f}" for n in numbers[:3]] + [f"{n:.2f}" for n in numbers[3:]])


def main() -> None:
    parser = arms.arguments(__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    args = arms.parse(parser)
    table(json.loads(RAW.read_text()) if args.plot_only else measure(args))


if __name__ == "__main__":
    main()
