"""What a search buys on the test examples: the winner's score minus the linear probe's.

    python benchmarks/probe_gain.py DATA --weights tf_efficientnet_lite0.safetensors [--sets clothing]
    python benchmarks/probe_gain.py --table-only

Per set and seed: `tuner run` with 12 trials of 1 to 4 epochs at 96 pixels, the winner retrained on
train and validation, tested once; and `tuner train` of the probe alone, on the same examples.
Both are whole commands. Results are written as they come; a second start goes on.
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
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "plots" / "probe_gain.json"
SETS = {"clothing": "clothing", "signdigits": "signdigits", "cifar10": "cifar10/train"}
MAX_DEPTH = 9


def write_space(args: argparse.Namespace, name: str, seed: int, file: Path) -> None:
    """The space file of one search."""
    tree = {
        "task": "classification",
        "data": {
            "name": "folder",
            "path": str(args.data.resolve() / SETS[name]),
            "size": 96,
            "resize": 110,
            "limit": args.limit,
        },
        "model": {"name": "timm/tf_efficientnet_lite0", "weights": str(args.weights.resolve())},
        "recipe": {
            "lr": {"low": 1e-4, "high": 3e-3, "log": True},
            "freeze_depth": {"low": 0, "high": MAX_DEPTH},
            "epochs": {"low": 1, "high": 4},
            "batch_size": 32,
        },
        "search": {"trials": args.trials, "seed": seed, "pruner": args.pruner},
        "export": ["safetensors"],
    }
    file.write_text(yaml.safe_dump(tree))


def run_tuner(home: Path, *words: object) -> float:
    """The seconds of a command, whose folder of caches is `home`."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tuner", *map(str, words), "--quiet"]
    subprocess.run(command, check=True, env=os.environ | {"TUNER_HOME": str(home)})
    return time.monotonic() - start


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Test scores of the winner and of the probe, and what the search cost."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        write_space(args, name, seed, folder / "search.yaml")
        studies = ("--studies", folder / "studies")
        search_seconds = run_tuner(folder / "home", "run", folder / "search.yaml", *studies)
        study = folder / "studies" / "search"
        winner = json.loads((study / "export" / "manifest.json").read_text())
        recipe = yaml.safe_load((study / "best.yaml").read_text())["recipe"]
        alone_seconds = run_tuner(
            folder / "home2", "train", study / "best.yaml", "--out", folder / "alone", *studies
        )
        probe_words = [f"recipe.freeze_depth={MAX_DEPTH}", "recipe.lr=1e-9", "recipe.epochs=1"]
        run_tuner(
            folder / "home",
            "train",
            study / "best.yaml",
            *probe_words,
            "recipe.stop_epoch=null",
            "--out",
            folder / "probe",
            *studies,
        )
        probe = json.loads((folder / "probe" / "manifest.json").read_text())
    return {
        "set": name,
        "seed": seed,
        "winner": winner["scores"]["test"]["accuracy"],
        "probe": probe["scores"]["test"]["accuracy"],
        "recipe": {key: recipe[key] for key in ("lr", "freeze_depth", "epochs", "stop_epoch")},
        "search_seconds": search_seconds,
        "winner_seconds": alone_seconds,
    }


def print_table(results: dict[str, Any]) -> None:
    print(f"{results['settings']}; {platform.machine()}, {os.cpu_count()} cores\n")
    print(
        "| set | seed | winner | test, winner | test, probe | gain, points | search, s | ÷ winner |"
    )
    print(f"|{'---|' * 8}")
    gains = []
    for row in results["rows"]:
        gain = 100 * (row["winner"] - row["probe"])
        gains.append(gain)
        recipe = row["recipe"]
        winner = f"depth {recipe['freeze_depth']}, {recipe['epochs']} epochs, lr {recipe['lr']:.2g}"
        ratio = row["search_seconds"] / row["winner_seconds"]
        print(
            f"| {row['set']} | {row['seed']} | {winner} | {row['winner']:.3f} | "
            f"{row['probe']:.3f} | {gain:+.1f} | {row['search_seconds']:.0f} | {ratio:.1f} |"
        )
    print(f"\nmedian gain {statistics.median(gains):+.1f} points, n = {len(gains)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--limit", type=int, default=1000, help="images of each part")
    parser.add_argument("--pruner", default="median")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    settings = f"{args.trials} trials of 1 to 4 epochs, at most {args.limit} images of each part"
    results: dict[str, Any] = {"settings": settings, "rows": []}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    known = {(row["set"], row["seed"]) for row in results["rows"]}
    for seed in range(0 if args.table_only else args.seeds):
        for name in args.sets:
            if (name, seed) not in known:
                results["rows"].append(measure(args, name, seed))
                RESULTS.write_text(json.dumps(results, indent=1))
                print_table(results)
    if args.table_only:
        print_table(results)


if __name__ == "__main__":
    main()
