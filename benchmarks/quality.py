"""The benchmark that decides: test scores and wall seconds of `tuner run` beside what a person would write or pick instead.

    python benchmarks/quality.py DATA --weights tf_efficientnet_lite0.safetensors [--sets clothing-500 …] [--arms …]
    python benchmarks/quality.py --table-only

DATA holds the unpacked sets that quality_sets.py names. Every arm is a whole command, timed from its start, over the same
images, weights, pixels and range of epochs:

    tuner     `tuner run` with search_spaces/timm.yaml, 12 trials; retrained, tested, exported
    timed     the same with `--time`: 0.4 of the seconds that the plain script took on this set and
              seed; so it is measured by a second call, with `--arms timed`
    default   `tuner train` of that file's default recipe, the longest allowed, without a search
    plain     plain_optuna.py: TPE, MedianPruner, 12 trials; the best trial's weights
    fastai    plain_fastai.py: `fine_tune` at its defaults (pip install fastai)
    timm      plain_timm.py: AdamW, cosine, warm-up, RandAugment, mixup, EMA, without a search

The arms of a set and seed run one after another, and the first one rotates from seed to seed. A seed splits each set anew.
What is measured is written at once to plots/quality.json; started again, the command goes on. Test scores are computed here,
for all arms alike, from the probabilities that each arm leaves for the test images.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import arms
import numpy as np
import quality_sets
import yaml

RAW = arms.PLOTS / "quality.json"
SIZE, RESIZE = 96, 110  # pixels: of the square, and of the shorter side before it is cut out
EPOCHS = 4  # the longest training
TIMED = 0.4  # of the plain script's wall seconds, for the arm `timed`
TRIALS = 12
TICKS = (60, 200, 600, 2000, 6000)  # seconds, of the plot
BINS = 15  # of the expected calibration error
SPACE = arms.HERE.parent / "search_spaces" / "timm.yaml"
ARMS = ("tuner", "timed", "default", "plain", "fastai", "timm")
FIRST_ARMS = [arm for arm in ARMS if arm != "timed"]
OTHERS = ("plain", "fastai", "timm")


# -- the arms: each leaves the probabilities of the test images in a file, and says what it chose


def timed(command: Sequence[str | Path], home: Path) -> dict[str, Any]:
    """The wall seconds of a command, and [seconds, validation accuracy] of each epoch of its search
    that it tells. Exits where it fails.
    """
    lines = arms.stamped(command, home)
    epochs = [
        [line["at"], line["scores"]["accuracy"] if "scores" in line else line["score"]]
        for line in arms.of(lines, "epoch")
    ]
    return {"seconds": lines[-1]["at"], **({"epochs": epochs} if epochs else {})}


def space_tree(args: argparse.Namespace, images: Path, seed: int) -> dict[str, Any]:
    """The shipped space file over these images, weights and epochs."""
    tree: dict[str, Any] = yaml.safe_load(SPACE.read_text())
    tree["data"] |= {"path": str(images), "size": SIZE, "resize": RESIZE}
    tree["model"]["weights"] = str(args.weights.resolve())
    tree["recipe"]["epochs"] = {"low": 1, "high": EPOCHS}
    tree["search"] |= {"trials": TRIALS, "seed": seed, "name": "quality"}
    tree["export"] = ["safetensors"]
    return tree


def tuner(
    args: argparse.Namespace, images: Path, scratch: Path, seed: int, *more: str
) -> dict[str, Any]:
    """A whole search."""
    file, studies = scratch / "space.yaml", scratch / "studies"
    file.write_text(yaml.safe_dump(space_tree(args, images, seed), sort_keys=False))
    words = [sys.executable, "-m", "tuner", "run", file, "--studies", studies, "--json", *more]
    told = timed(words, scratch / "home")
    study = studies / "quality"
    write_tuner_probabilities(study / "export", images, scratch)
    manifest = json.loads((study / "export" / "manifest.json").read_text())
    return {
        **told,
        "recipe": chosen_recipe(study / "best.yaml", file),
        "comparison": manifest["comparison"],
    }


def timed_tuner(args: argparse.Namespace, images: Path, scratch: Path, seed: int) -> dict[str, Any]:
    """A whole search in a share of the plain script's time, which has to be measured before."""
    found = json.loads(RAW.read_text())["rows"]
    wanted = (args.measured_set, seed, "plain")
    seconds = [row["seconds"] for row in found if (row["set"], row["seed"], row["arm"]) == wanted]
    if not seconds:
        raise SystemExit(f"the arm plain of {args.measured_set}, seed {seed}, is not measured yet")
    asked = TIMED * seconds[0]
    said = tuner(args, images, scratch, seed, "--time", f"{asked:.0f}s")
    return {**said, "asked": asked}


def chosen_recipe(best: Path, space: Path) -> dict[str, Any]:
    """The winner's values of the keys that were searched, and its best epoch."""
    recipe = yaml.safe_load(best.read_text())["recipe"]
    searched = yaml.safe_load(space.read_text())["recipe"]
    names = [key for key, value in searched.items() if isinstance(value, (dict, list))]
    return {key: recipe.get(key) for key in [*names, "stop_epoch"]}


def default(args: argparse.Namespace, images: Path, scratch: Path, seed: int) -> dict[str, Any]:
    """The default recipe alone: what the file leaves open has its default."""
    tree = space_tree(args, images, seed)
    tree["recipe"] = {"epochs": EPOCHS}
    tree |= {"seed": seed}
    file, out = scratch / "default.yaml", scratch / "out"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    words = [sys.executable, "-m", "tuner", "train", file, "--out", out, "--quiet"]
    told = timed([*words, "--studies", scratch / "studies"], scratch / "home")
    write_tuner_probabilities(out, images, scratch)
    return told


def write_tuner_probabilities(export: Path, images: Path, scratch: Path) -> None:
    """The probabilities that `tuner predict` tells of the test images, in the other arms' form."""
    files = sorted((images / "test").rglob("*.jpg"))
    told = subprocess.run(
        [sys.executable, "-m", "tuner", "predict", export, *files, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    classes = sorted(lines[0]["classes"])
    rows = [
        [classes.index(file.parent.name), [line["classes"][name] for name in classes]]
        for file, line in zip(files, lines, strict=True)
    ]
    (scratch / "probabilities.json").write_text(json.dumps({"classes": classes, "rows": rows}))


def script(name: str, *more: str) -> Callable[..., dict[str, Any]]:
    """The arm of a script beside this file."""

    def run(args: argparse.Namespace, images: Path, scratch: Path, seed: int) -> dict[str, Any]:
        words: list[str | Path] = [sys.executable, arms.HERE / name, images]
        words += ["--weights", args.weights.resolve(), "--size", str(SIZE), "--seed", str(seed)]
        words += ["--probabilities", scratch / "probabilities.json", *more]
        return timed(words, scratch / "home")

    return run


RUN: dict[str, Callable[..., dict[str, Any]]] = {
    "tuner": tuner,
    "timed": timed_tuner,
    "default": default,
    "plain": script("plain_optuna.py", "--trials", str(TRIALS), "--workers", "0"),
    "fastai": script("plain_fastai.py", "--epochs", str(EPOCHS)),
    "timm": script("plain_timm.py", "--epochs", str(EPOCHS)),
}


# -- scores


def scores(file: Path) -> dict[str, float]:
    """Accuracy, expected calibration error (Guo et al., ICML 2017) and log loss of an arm's file."""
    rows = json.loads(file.read_text())["rows"]
    truth = np.array([row[0] for row in rows])
    probabilities = np.array([row[1] for row in rows])
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    hits = predicted == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [
        abs(hits[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    ]
    right = probabilities[np.arange(len(truth)), truth]
    return {
        "accuracy": float(hits.mean()),
        "calibration_error": float(sum(gaps)),
        "log_loss": float(-np.log(np.maximum(right, 1e-12)).mean()),
    }


def measure(args: argparse.Namespace, name: str, seed: int, arm: str) -> dict[str, Any]:
    """One arm on one set and seed."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        scratch = Path(place)
        sizes = quality_sets.make_set(name, args.data, scratch / "images", seed)
        args.measured_set = name
        said = RUN[arm](args, scratch / "images", scratch, seed)
        return {
            "set": name,
            "seed": seed,
            "arm": arm,
            "sizes": sizes,
            **said,
            **scores(scratch / "probabilities.json"),
        }


# -- what is told


def cells(rows: list[dict[str, Any]], name: str, arm: str, key: str) -> list[float]:
    """An arm's values of a set, in the order of the seeds."""
    chosen = [row for row in rows if row["set"] == name and row["arm"] == arm]
    return [row[key] for row in sorted(chosen, key=lambda row: int(row["seed"]))]


def print_table(found: dict[str, Any]) -> None:
    rows = found["rows"]
    names = [name for name in quality_sets.SETS if any(row["set"] == name for row in rows)]
    there = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    print(f"{found['hardware']}; {TRIALS} trials of 1 to {EPOCHS} epochs, {SIZE} pixels\n")
    for key, digits in (("accuracy", 3), ("seconds", 0), ("calibration_error", 3)):
        print(
            f"| {key.replace('_', ' ')} | n | {' | '.join(there)} |\n|{'---|' * (len(there) + 2)}"
        )
        for name in names:
            values = [cells(rows, name, arm, key) for arm in there]
            means = [f"{statistics.mean(v):.{digits}f}" if v else "" for v in values]
            counts = sorted({len(v) for v in values if v})
            print(f"| {name} | {' or '.join(map(str, counts))} | {' | '.join(means)} |")
        print()
    print_goals(rows, names)


def complete_sets(
    rows: list[dict[str, Any]], names: list[str], needed: Sequence[str] = FIRST_ARMS
) -> list[str]:
    """The sets that each of these arms has measured, some perhaps with fewer seeds."""
    return [name for name in names if all(cells(rows, name, arm, "accuracy") for arm in needed)]


def print_goals(rows: list[dict[str, Any]], names: list[str]) -> None:
    """The figures that the goals speak of, over the sets that all arms have measured; those of the
    arm `timed` over the sets that it has measured too.
    """
    names = complete_sets(rows, names)
    if not names:
        return
    timed_names = complete_sets(rows, names, ARMS)
    goals = [
        gain_goal(rows, names, "tuner"),
        *([gain_goal(rows, timed_names, "timed")] if timed_names else []),
        ratio_goal("whole `tuner run` / plain script, seconds", 0.4, whole_ratios(rows, names)),
        ratio_goal("time to the plain script's best / its own", 1 / 15, time_ratios(rows, names)),
        default_goal(rows, names),
        calibration_goal(rows, names),
        worse_goal(rows, names),
    ]
    print("| figure | goal | reached | |\n|---|---|---|---|")
    for figure, goal, reached, is_met in goals:
        print(f"| {figure} | {goal} | {reached} | {'' if is_met else '**missed**'} |")


Goal = tuple[str, str, str, bool]


def mean_of(rows: list[dict[str, Any]], name: str, arm: str, key: str) -> float:
    return statistics.mean(cells(rows, name, arm, key))


def paired(
    rows: list[dict[str, Any]], name: str, arms_of_pair: tuple[str, str], key: str
) -> list[tuple[Any, Any]]:
    """Two arms' values of a set, for the seeds that both have measured."""
    one, other = (
        {row["seed"]: row[key] for row in rows if row["set"] == name and row["arm"] == arm}
        for arm in arms_of_pair
    )
    return [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]


def mean_gain(rows: list[dict[str, Any]], name: str, arm: str, other: str) -> float:
    """By how many points an arm's test accuracy is above another's, over the seeds of both."""
    pairs = paired(rows, name, (arm, other), "accuracy")
    return 100 * statistics.mean(ours - theirs for ours, theirs in pairs)


def gain_goal(rows: list[dict[str, Any]], names: list[str], arm: str) -> Goal:
    """Test accuracy of a search above that of the best other arm of each set."""
    gains = {name: min(mean_gain(rows, name, arm, other) for other in OTHERS) for name in names}
    listed = ", ".join(f"{name} {gain:+.1f}" for name, gain in gains.items())
    mean = statistics.mean(gains.values())
    is_met = mean >= 1 and min(gains.values()) >= -0.5
    goal = ">= +1.0, no set below -0.5"
    figure = f"test accuracy, {arm} - best other arm, points"
    return figure, goal, f"{mean:+.1f} ({listed})", is_met


def ratio_goal(figure: str, goal: float, ratios: list[float]) -> Goal:
    return figure, f"<= {goal:.2g}", arms.spread(ratios, 3), statistics.median(ratios) <= goal


def whole_ratios(rows: list[dict[str, Any]], names: list[str]) -> list[float]:
    """Seconds of the whole commands, for each set and seed."""
    return [
        ours / theirs
        for name in names
        for ours, theirs in paired(rows, name, ("tuner", "plain"), "seconds")
    ]


def time_ratios(rows: list[dict[str, Any]], names: list[str]) -> list[float]:
    """Seconds until the best validation accuracy of the plain script, for each set and seed."""
    ratios = []
    for name in names:
        for ours, theirs in paired(rows, name, ("tuner", "plain"), "epochs"):
            bar = max(score for _, score in theirs) - 1e-6
            first = [
                min((at for at, score in curve if score >= bar), default=math.inf)
                for curve in (ours, theirs)
            ]
            ratios.append(first[0] / first[1])
    return ratios


def default_goal(rows: list[dict[str, Any]], names: list[str]) -> Goal:
    """The default recipe beside fastai's, both trained once on the training images alone."""
    gains = {name: mean_gain(rows, name, "default", "fastai") for name in names}
    listed = ", ".join(f"{name} {gain:+.1f}" for name, gain in gains.items())
    return "default recipe - fastai, points", ">= 0", listed, min(gains.values()) >= 0


def calibration_goal(rows: list[dict[str, Any]], names: list[str]) -> Goal:
    """The calibration error of the search's export beside the lowest of the other arms."""
    key = "calibration_error"
    pairs = {
        name: (mean_of(rows, name, "tuner", key), min(mean_of(rows, name, a, key) for a in OTHERS))
        for name in names
    }
    listed = ", ".join(f"{name} {ours:.3f} / {best:.3f}" for name, (ours, best) in pairs.items())
    is_met = all(ours <= best for ours, best in pairs.values())
    return "calibration error, tuner / best other arm", "not above", listed, is_met


def worse_goal(rows: list[dict[str, Any]], names: list[str]) -> Goal:
    """Searches whose winner is worse than the default recipe, both retrained, on the test images."""
    compared = [row["comparison"] for row in rows if row["arm"] == "tuner" and row["set"] in names]
    worse = sum(c.get("difference", 0) < 0 for c in compared)
    itself = sum("difference" not in c for c in compared)
    reached = f"{worse} of {len(compared)} ({itself} are the default recipe)"
    goal = "<= 1 in 20"
    return "winners worse than the default recipe", goal, reached, worse * 20 <= len(compared)


def plot(found: dict[str, Any]) -> None:
    """Test accuracy over wall seconds, a panel for each set, a dot for each arm and seed."""
    rows = found["rows"]
    names = [name for name in quality_sets.SETS if any(row["set"] == name for row in rows)]
    rows_of_panels = 2 if len(names) > 3 and len(names) % 2 == 0 else 1
    figure, panels = arms.figure(len(names), 3.6 * rows_of_panels, rows_of_panels)
    colours = {
        **arms.COLOURS,
        "timed": "#7b4fa3",
        "default": "#7aa6d6",
        "fastai": "#c98a2b",
        "timm": "#5d8f4e",
    }
    for axis, name in zip(panels, names, strict=True):
        for arm in ARMS:
            seconds, accuracy = (cells(rows, name, arm, key) for key in ("seconds", "accuracy"))
            axis.scatter(seconds, accuracy, s=28, color=colours[arm], label=arm)
        axis.set_xscale("log")
        axis.set_xticks(TICKS, labels=[str(seconds) for seconds in TICKS])
        axis.set_xticks([], minor=True)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("wall seconds", fontsize=9)
    panels[0].set_ylabel("test accuracy", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(arms.PLOTS / "quality.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument(
        "--sets", nargs="+", default=list(quality_sets.SETS), choices=list(quality_sets.SETS)
    )
    parser.add_argument("--arms", nargs="+", default=FIRST_ARMS, choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where sets, caches and studies lie meanwhile")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only and (args.data is None or args.weights is None):
        parser.error("DATA and --weights are needed, unless --table-only")
    found = arms.measure_missing(args, RAW, measure)
    print_table(found)
    plot(found)


if __name__ == "__main__":
    main()
