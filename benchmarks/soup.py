"""What a greedy soup buys on the test examples: its score minus the winner's, from one search.

    python benchmarks/soup.py DATA --weights tf_efficientnet_lite0.safetensors [--sets clothing-500 …]
    python benchmarks/soup.py --table-only

Per set and seed, which splits the set anew: `tuner run` with 8 trials of 1 to 4 epochs at 96 pixels,
whose weights are all kept, exports the winner with the weights of its trial. Then the same command
with `search.soup=greedy` exports the soup, where validation takes one. Nothing is retrained, so both
are of the same trainings. Results are written as they come; a second start goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arms
import quality_sets
import yaml

RESULTS = arms.PLOTS / "soup.json"
SETS = ("clothing-500", "signdigits-500", "cifar10-500")
TRIALS, EPOCHS = 8, 4
SETTINGS = f"{TRIALS} trials of 1 to {EPOCHS} epochs, 96 pixels, all kept; retrain: false"


def write_space(args: argparse.Namespace, images: Path, seed: int, file: Path) -> None:
    """The space file of one search."""
    tree = {
        "task": "classification",
        "data": {"name": "folder", "path": str(images), "size": 96, "resize": 110},
        "model": {"name": "timm/tf_efficientnet_lite0", "weights": str(args.weights.resolve())},
        "recipe": {
            "lr": {"low": 1e-4, "high": 3e-3, "log": True},
            "freeze_depth": {"low": 0, "high": arms.MAX_DEPTH},
            "epochs": {"low": 1, "high": EPOCHS},
            "batch_size": 32,
        },
        "search": {
            "trials": TRIALS,
            "seed": seed,
            "keep": TRIALS,
            "retrain": False,
            "confirm": "none",
            "compare": "none",
            "name": "soup",
        },
        "engine": {"name": "inline", "device": "cpu"},
        "export": ["safetensors"],
    }
    file.write_text(yaml.safe_dump(tree))


def run_tuner(folder: Path, *words: str) -> tuple[dict[str, Any], float]:
    """The manifest that a command leaves, and its seconds. Exits where it fails."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tuner", "run", str(folder / "space.yaml"), *words]
    command += ["--studies", str(folder / "studies"), "--quiet"]
    environment = os.environ | {"TUNER_HOME": str(folder / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}")
    manifest = json.loads((folder / "studies/soup/export/manifest.json").read_text())
    return manifest, time.monotonic() - start


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Test scores of winner and soup of one search."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        quality_sets.make_set(name, args.data, folder / "images", seed)
        write_space(args, folder / "images", seed, folder / "space.yaml")
        winner, search_seconds = run_tuner(folder)
        soup, soup_seconds = run_tuner(folder, "search.soup=greedy")
    findings = soup["soup"] or {"taken": False, "tried": []}
    return {
        "set": name,
        "seed": seed,
        "examples": winner["examples"],
        "taken": findings["taken"],
        "tried": [
            {key: entry[key] for key in ("trial", "score", "stays")}
            | {"freeze_depth": entry["recipe"]["freeze_depth"], "lr": entry["recipe"]["lr"]}
            for entry in findings["tried"]
        ],
        "winner": {split: winner["scores"][split] for split in ("valid", "test")},
        "soup": {split: soup["scores"][split] for split in ("valid", "test")},
        "search_seconds": search_seconds,
        "soup_seconds": soup_seconds,
    }


def gains(rows: list[dict[str, Any]], split: str, metric: str = "accuracy") -> list[float]:
    """The soup's score minus the winner's; 0 where no soup was taken."""
    return [row["soup"][split][metric] - row["winner"][split][metric] for row in rows]


def print_table(results: dict[str, Any]) -> None:
    """A line for each set and one for all: means over the seeds."""
    rows = results["rows"]
    print(f"{results['hardware']}; {SETTINGS}\n")
    head = ("set", "n", "taken", "test, winner", "test, soup", "gain, points", "least to most")
    print(f"| {' | '.join(head)} | where taken: validation, test | log loss on test |")
    print(f"|{'---|' * (len(head) + 2)}")
    for name in (*SETS, "all"):
        chosen = [row for row in rows if name in (row["set"], "all")]
        if not chosen:
            continue
        taken = [row for row in chosen if row["taken"]]
        gain = [100 * value for value in gains(chosen, "test")]
        winner, soup = (
            statistics.mean(row[arm]["test"]["accuracy"] for row in chosen)
            for arm in ("winner", "soup")
        )
        both = (
            ", ".join(
                f"{100 * statistics.mean(gains(taken, split)):+.1f}" for split in ("valid", "test")
            )
            if taken
            else ""
        )
        loss = statistics.mean(gains(chosen, "test", "log_loss"))
        error = ""
        if len(gain) > 1:
            error = f" ± {statistics.stdev(gain) / len(gain) ** 0.5:.1f}"
        print(
            f"| {name} | {len(chosen)} | {len(taken)} | {winner:.3f} | {soup:.3f} | "
            f"{statistics.mean(gain):+.1f}{error} | {min(gain):+.1f} to {max(gain):+.1f} | "
            f"{both} | {loss:+.3f} |"
        )
    gain = gains(rows, "test")
    better, worse = sum(value > 0 for value in gain), sum(value < 0 for value in gain)
    seconds = sum(row["soup_seconds"] for row in rows) / sum(row["search_seconds"] for row in rows)
    print(f"\ntest accuracy better {better}, worse {worse}, equal {len(gain) - better - worse}")
    print(f"seconds of the second command / of the search: {seconds:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only and (args.data is None or args.weights is None):
        parser.error("DATA and --weights are needed, unless --table-only")
    results: dict[str, Any] = {"hardware": arms.hardware(), "rows": []}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    known = {(row["set"], row["seed"]) for row in results["rows"]}
    for seed in range(0 if args.table_only else args.seeds):
        for name in args.sets:
            if (name, seed) not in known:
                results["rows"].append(measure(args, name, seed))
                arms.save(results, RESULTS)
                print(json.dumps(results["rows"][-1]), flush=True)
    if results["rows"]:
        print_table(results)
    else:
        print("nothing is measured yet")


if __name__ == "__main__":
    main()
