"""Whether `tuner run --time T` takes T: the whole command, with retraining, test, export and report.

    python benchmarks/promised_time.py WORK [--data FOLDER] [--time 150s] [--repeats 1]
    python benchmarks/promised_time.py --table-only

WORK is an empty folder for studies and caches. FOLDER holds clothing/ and signdigits/, each with a folder per class;
without it only the sets that packages bring are used. Each space is searched by a command of its own, with an empty
home, and once more with what that command has remembered. Results are written as they come.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tuner.config.durations import parse_duration

RESULTS = Path(__file__).parent / "plots" / "promised_time.json"
GOAL = 0.05
MODEL = "model: {name: resnet18_slim, weights: bundled}\n"
RECIPE = "recipe: {lr: {low: 5.0e-5, high: 3.0e-3, log: true}, freeze_depth: {low: 0, high: 5}, "
EXPORT = "export: [safetensors, onnx]\n"
DIGITS = "task: classification\ndata: {name: digits}\n"
SYNTHETIC = (
    "task: classification\ndata: {name: synthetic, examples: 600, classes: 5, size: 32, noise: 2}\n"
)
FOLDER = "task: classification\ndata: {name: folder, path: DATA/%s, size: 32, limit: %d%s}\n"
SPLIT = ", valid: 0.15, test: 0.15"

SPACES = {
    "digits, 1 to 3 epochs": DIGITS + MODEL + RECIPE + "epochs: {low: 1, high: 3}}\n",
    "synthetic, 2 to 8 epochs": SYNTHETIC + MODEL + RECIPE + "epochs: {low: 2, high: 8}}\n",
    "synthetic, repeats": SYNTHETIC
    + MODEL
    + RECIPE
    + "epochs: {low: 1, high: 2}}\nsearch: {confirm: {top: 2, repeats: 2}}\n",
    "signdigits, 1 to 4 epochs": FOLDER % ("signdigits", 800, SPLIT)
    + MODEL
    + RECIPE
    + "epochs: {low: 1, high: 4}}\n",
    "clothing, 1 to 4 epochs": FOLDER % ("clothing", 600, "")
    + MODEL
    + RECIPE
    + "epochs: {low: 1, high: 4}}\n",
    "clothing, no comparison": FOLDER % ("clothing", 600, "")
    + MODEL
    + RECIPE
    + "epochs: {low: 1, high: 4}}\nsearch: {compare: none}\n",
}


def run_space(name: str, args: argparse.Namespace, is_known: bool) -> dict[str, Any]:
    """One command; how long it took, by the clock on the wall."""
    number = list(SPACES).index(name)
    folder = args.work / f"space-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{'again' if is_known else 'first'}.yaml"
    file.write_text(SPACES[name].replace("DATA", str(args.data)) + EXPORT)
    environment = os.environ | {"TUNER_HOME": str(folder / "home")}
    words = [sys.executable, "-m", "tuner", "run", str(file), "--time", args.time]
    begun = time.monotonic()
    subprocess.run(
        [*words, "--studies", str(folder / "studies"), "--quiet"], env=environment, check=True
    )
    seconds = time.monotonic() - begun
    asked = parse_duration(args.time)
    return {"space": name, "known": is_known, "asked": asked, "seconds": round(seconds, 1)}


def print_table() -> None:
    """The results as Markdown."""
    rows = json.loads(RESULTS.read_text())
    print("| space | asked, s | first command, s | off | second command, s | off |")
    print("|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["space"] for row in rows):
        cells = []
        for is_known in (False, True):
            of_space = [r for r in rows if r["space"] == name and r["known"] == is_known]
            seconds = [f"{row['seconds']:.0f}" for row in of_space]
            off = [f"{row['seconds'] / row['asked'] - 1:+.1%}" for row in of_space]
            cells += [", ".join(seconds), ", ".join(off)]
        asked = next(row["asked"] for row in rows if row["space"] == name)
        print(f"| {name} | {asked:.0f} | {' | '.join(cells)} |")
    off = [abs(row["seconds"] / row["asked"] - 1) for row in rows]
    print(f"\n{sum(o <= GOAL for o in off)} of {len(off)} commands within {GOAL:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--time", default="150s")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--spaces", type=int, default=len(SPACES), help="only the first so many")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        rows = []
        for name in list(SPACES)[: args.spaces]:
            if "DATA" in SPACES[name] and args.data is None:
                continue
            for known in [False, *[True] * args.repeats]:
                rows.append(run_space(name, args, known))
                print(rows[-1], flush=True)
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print_table()


if __name__ == "__main__":
    main()
