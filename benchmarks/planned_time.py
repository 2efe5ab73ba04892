"""How well `tuner plan` foretells: the seconds that it says beside those that `tuner run` takes.

    python benchmarks/planned_time.py WORK --data DATA [--trials 8]
    python benchmarks/planned_time.py --table-only

WORK is an empty folder for studies and caches; DATA holds clothing/ and signdigits/, each with a
folder per class. For each of four spaces of promised_time.py `tuner plan FILE --json` runs with an
empty home, and then `tuner run FILE`, timed from its start to its end: the search with its pruner,
retraining, the default recipe's, test and exports. Results are written as they come.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from promised_time import EXPORT, SPACES

RESULTS = Path(__file__).parent / "plots" / "planned_time.json"
GOAL = 0.2
NAMES = (
    "digits, 1 to 3 epochs",
    "synthetic, 2 to 8 epochs",
    "signdigits, 1 to 4 epochs",
    "clothing, 1 to 4 epochs",
)


def run_space(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What is planned and what is taken, in seconds by the clock on the wall."""
    folder = args.work / f"space-{NAMES.index(name)}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "space.yaml"
    content = SPACES[name].replace("DATA", str(args.data)) + EXPORT
    file.write_text(f"{content}search: {{trials: {args.trials}}}\n")
    environment = os.environ | {"TUNER_HOME": str(folder / "home")}
    tuner = [sys.executable, "-m", "tuner"]
    begun = time.monotonic()
    told = subprocess.run(
        [*tuner, "plan", str(file), "--json"], env=environment, check=True, stdout=subprocess.PIPE
    )
    plan = json.loads(told.stdout)
    planning = time.monotonic() - begun
    begun = time.monotonic()
    run = [*tuner, "run", str(file), "--studies", str(folder / "studies"), "--quiet"]
    subprocess.run(run, env=environment, check=True)
    return {
        "space": name,
        "trials": args.trials,
        "planning": round(planning, 1),
        "planned": round(plan["seconds"], 1),
        "low": round(plan["seconds_low"], 1),
        "high": round(plan["seconds_high"], 1),
        "taken": round(time.monotonic() - begun, 1),
    }


def print_table() -> None:
    """The results as Markdown."""
    rows = json.loads(RESULTS.read_text())
    print("| space | trials | planning, s | planned, s | least to most | taken, s | off |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        spread = f"{row['low']:.0f} to {row['high']:.0f}"
        off = row["planned"] / row["taken"] - 1
        print(
            f"| {row['space']} | {row['trials']} | {row['planning']:.0f} | {row['planned']:.0f} "
            f"| {spread} | {row['taken']:.0f} | {off:+.0%} |"
        )
    middle = statistics.median(abs(row["planned"] / row["taken"] - 1) for row in rows)
    print(f"\nmedian error {middle:.0%}; goal {GOAL:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        if args.work is None or args.data is None:
            parser.error("WORK and --data are needed, unless --table-only")
        rows = []
        for name in NAMES:
            rows.append(run_space(name, args))
            print(rows[-1], flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print_table()


if __name__ == "__main__":
    main()
