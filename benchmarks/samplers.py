"""Whether minding costs pays: `sampler: cost-aware` against plain `tpe`, the same studies otherwise, whole searches by `tuner run`.

    python benchmarks/samplers.py digits FOLDER [FOLDER ...] [--trials 24] [--seeds 5] [--size 64]
    python benchmarks/samplers.py --table-only

Data sets: scikit-learn's digits, and folders of images (photographs.py makes one). Model: resnet18_slim with its bundled weights,
every trial's head begun as a linear probe. Per seed both arms search with an empty TUNER_HOME, the first arm in turn. The bar is
the worse of their two best validation accuracies, so that both reach it; its time runs from the start of the command. Then a sign
test over all seeds of all data sets.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import arms
import yaml
from time_to_score import best, reached

RAW = arms.PLOTS / "samplers.json"
ARMS = ("tpe", "cost-aware")


def write(folder: Path, data: str, search: dict[str, Any], args: argparse.Namespace) -> Path:
    """The space file of one study."""
    source = (
        {"name": "digits", "size": 32} if data == "digits" else {"name": "folder", "path": str(Path(data).resolve()), "size": args.size}
    )
    tree = {
        "task": "classification",
        "data": source,
        "model": {"name": "resnet18_slim", "weights": "bundled"},
        "recipe": {**arms.SPACE, "freeze_depth": {"low": 0, "high": 5}, "epochs": {"low": 1, "high": 8}, "batch_size": 32},
        "search": {"retrain": False, **search},
        "export": ["safetensors"],
    }
    file = folder / "race.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def one(data: str, sampler: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        file = write(Path(place), data, {"trials": args.trials, "sampler": sampler, "pruner": "median", "seed": seed}, args)
        lines = arms.stamped(arms.tuner("run", file, Path(place) / "studies"), home=Path(place) / "home")
    epochs = [[line["at"], line["scores"]["accuracy"]] for line in arms.of(lines, "epoch")]
    return {"epochs": epochs, "whole": lines[-1]["at"]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"hardware": arms.hardware(), "settings": {"trials": args.trials, "size": args.size}, "data": {}}
    for seed in range(args.seeds):
        for data in args.data:
            arm = {sampler: one(data, sampler, seed, args) for sampler in ARMS[:: 1 if seed % 2 else -1]}
            found["data"].setdefault(Path(data).name, {})[str(seed)] = arm
            arms.save(found, RAW)  # what is measured is kept, whatever happens to the next
    return found


def table(found: dict[str, Any]) -> None:
    print(f"{found['hardware']}; {found['settings']}\n")
    print(
        "| data | n | tpe to the bar, s | cost-aware to the bar, s | tpe / cost-aware | best, tpe | best, cost-aware | search, tpe, s | search, cost-aware, s |"
    )
    print(f"|{'---|' * 9}")
    faster, slower = 0, 0
    for data, seeds in found["data"].items():
        pairs = [(seed["tpe"], seed["cost-aware"]) for seed in seeds.values()]
        bars = [min(best(a), best(b)) for a, b in pairs]
        times = [(reached(a, bar), reached(b, bar)) for (a, b), bar in zip(pairs, bars, strict=True)]
        ratios = [a / b for a, b in times]
        faster, slower = faster + sum(r > 1 for r in ratios), slower + sum(r < 1 for r in ratios)
        cells = [arms.spread([t[i] for t in times]) for i in (0, 1)] + [arms.spread(ratios, 2)]
        cells += [arms.spread([best(p[i]) for p in pairs], 4) for i in (0, 1)] + [
            arms.spread([p[i]["whole"] for p in pairs], 0) for i in (0, 1)
        ]
        print(f"| {data} | {len(pairs)} | {' | '.join(cells)} |")
    count = faster + slower
    chance = min(1.0, 2 * sum(math.comb(count, k) for k in range(max(faster, slower), count + 1)) / 2**count)
    every = [
        reached(s["tpe"], bar) / reached(s["cost-aware"], bar)
        for d in found["data"].values()
        for s in d.values()
        if (bar := min(best(s["tpe"]), best(s["cost-aware"])))
    ]
    print(
        f"\nSooner in {faster} of {count} pairs (sign test, two-sided, p = {chance:.3g}); median tpe / cost-aware {statistics.median(every):.2f}."
    )


def arguments(description: str | None, *, seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="digits, or a folder of images")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--size", type=int, default=64, help="side of the folders' images, pixels")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--table-only", action="store_true", help="measure nothing; show again what plots/*.json holds")
    args = parser.parse_args()
    if not args.table_only and not args.data:
        parser.error("name at least one data set, unless --table-only")
    return args


def main() -> None:
    args = arguments(__doc__, seeds=5)
    table(json.loads(RAW.read_text()) if args.table_only else measure(args))


if __name__ == "__main__":
    main()
