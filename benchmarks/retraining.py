"""How long the winner is trained again on train and validation examples: up to its best epoch, or up to the end of its schedule.

    python benchmarks/retraining.py DATA --weights tf_efficientnet_lite0.safetensors --bert MINILM [--sets sms …] [--draws 4]
    python benchmarks/retraining.py --table-only

DATA and MINILM are those of quality.py and quality_tasks.py. A case is a recipe of 3 or 4 epochs: the default one, and others
drawn at random from the shipped space file. It is trained as a trial is. Where its best validation score comes so early that the
whole epochs differ, it is trained again on train and validation examples in both ways, by `tuner train`, and tested. Otherwise
both ways are the same, and only the case is counted. Written at once to plots/retraining.json; started again, the command goes
on.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import arms
import quality
import quality_sets
import quality_tasks
import task_sets
import yaml

RAW = arms.PLOTS / "retraining.json"
IMAGES = ("clothing-500", "signdigits-500", "cifar10-500")
RATES = {"images": (1e-4, 3e-3), "texts": (1e-5, 3e-4)}
TEST = {"images": "accuracy", "texts": "f1"}


def make_case(args: argparse.Namespace, name: str, seed: int, draw: int, scratch: Path) -> Any:
    """The sizes of the parts, and the space file's tree with one recipe in it."""
    folder = scratch / "set"
    if name in IMAGES:
        sizes = quality_sets.make_set(name, args.data, folder, seed)
        tree = quality.space_tree(args, folder, seed)
        deepest, kind = 9, "images"
    else:
        sizes = task_sets.make_set(name, args.data, folder, seed)
        tree = quality_tasks.space_tree(args, name, folder, seed)
        deepest, kind = 7, "texts"
    fixed = {k: v for k, v in tree["recipe"].items() if not isinstance(v, (dict, list))}
    rng = random.Random(f"{name} {seed} {draw}")
    low, high = RATES[kind]
    drawn = {
        "lr": float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.2g}"),
        "freeze_depth": rng.randint(0, deepest - 1),
    }
    tree["recipe"] = {**fixed, **(drawn if draw else {}), "epochs": rng.choice((3, 4))}
    tree |= {"seed": seed}
    tree["search"]["compare"] = "none"
    return sizes, tree


def train(tree: dict[str, Any], scratch: Path, **recipe: Any) -> Any:
    """The validation scores of each epoch and the test scores of a recipe."""
    file, out = scratch / "recipe.yaml", scratch / "out"
    file.write_text(yaml.safe_dump(tree | {"recipe": tree["recipe"] | recipe}, sort_keys=False))
    words = [sys.executable, "-m", "tuner", "train", file, "--out", out, "--json"]
    lines = arms.stamped([*words, "--studies", scratch / "studies"], scratch / "home")
    metric = str(tree["search"].get("metric", "accuracy"))
    curve = [line["scores"][metric] for line in arms.of(lines, "retrain") if line.get("scores")]
    tested = json.loads((out / "manifest.json").read_text())["scores"]["test"]
    return curve, {key: value for key, value in tested.items() if isinstance(value, float)}


def measure(args: argparse.Namespace, name: str, seed: int, draw: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        scratch = Path(place)
        sizes, tree = make_case(args, name, seed, draw, scratch)
        curve, trial = train(tree, scratch, fit="train")
        best, epochs = curve.index(max(curve)) + 1, len(curve)
        share = sizes["train"] / (sizes["train"] + sizes["valid"])
        row = {
            "set": name,
            "seed": seed,
            "draw": draw,
            "recipe": tree["recipe"],
            "valid": sizes["valid"],
            "curve": curve,
            "trial": trial,
        }
        longest, shorter = math.ceil(epochs * share), math.ceil(best * share)
        if shorter < longest:
            for way, stop in {"best": shorter, "end": longest}.items():
                _, tested = train(tree, scratch, fit="train+valid", epochs=longest, stop_epoch=stop)
                row |= {way: tested, f"{way}_epochs": stop}
        return row


# -- the table


def show(rows: list[dict[str, Any]]) -> str:
    """The table of the cases in which both ways differ, and the mean differences."""
    head = [
        "set, seed",
        "recipe",
        "validation by epoch",
        "test: trial",
        "to the best epoch",
        "to the end",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    both = [row for row in rows if "end" in row and row["end_epochs"] > row["best_epochs"]]
    for row in both:
        key = TEST["images" if row["set"] in IMAGES else "texts"]
        recipe = row["recipe"]
        what = (
            "default" if row["draw"] == 0 else f"lr {recipe['lr']}, depth {recipe['freeze_depth']}"
        )
        curve = " ".join(f"{score:.3f}" for score in row["curve"])
        tested = [
            f"{row['trial'][key]:.3f}",
            *(f"{row[way][key]:.3f} ({row[way + '_epochs']})" for way in ("best", "end")),
        ]
        words = [f"{row['set']}, {row['seed']}", what, curve, *tested]
        lines.append("| " + " | ".join(words) + " |")
    lines += [
        "",
        f"{len(rows)} cases, {len(both)} with fewer epochs to the best one than to the end.",
    ]
    for name in dict.fromkeys(row["set"] for row in both):
        key = TEST["images" if name in IMAGES else "texts"]
        gains = [100 * (r["end"][key] - r["best"][key]) for r in both if r["set"] == name]
        lines.append(
            f"{name}: to the end - to the best epoch {statistics.fmean(gains):+.2f} points"
        )
        lines[-1] += f" (n = {len(gains)}, {sum(g > 0 for g in gains)} better)"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--bert", type=Path)
    parser.add_argument("--sets", nargs="+", default=["sms", *IMAGES], choices=["sms", *IMAGES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--scratch", type=Path, help="where sets and caches lie meanwhile")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    rows = json.loads(RAW.read_text())["rows"] if RAW.exists() else []
    if not args.table_only:
        done = {(row["set"], row["seed"], row["draw"]) for row in rows}
        for seed in range(args.seeds):
            for draw in range(args.draws):
                for name in args.sets:
                    if (name, seed, draw) in done:
                        continue
                    rows.append(measure(args, name, seed, draw))
                    RAW.write_text(
                        json.dumps({"hardware": arms.hardware(), "rows": rows}, indent=1)
                    )
                    print(name, seed, draw, rows[-1]["curve"], flush=True)
    print(show(rows))


if __name__ == "__main__":
    main()
