"""How long until the score: `tuner run` against the plain scripts, same search space, same images, best score so far over wall time.

    python benchmarks/time_to_score.py FOLDER --weights lite0.safetensors [--trials 24] [--seeds 3] [--arms plain ray tuner]
    python benchmarks/time_to_score.py --plot-only

The bar is the best validation accuracy that plain Optuna reaches with its whole budget. Each arm's time is that of the first epoch at
or above the bar, on a clock that begins with its command, imports and start-up included. `tuner` begins with an empty
TUNER_HOME, so it decodes every image and computes every activation itself, and does not retrain its winner, as the plain
scripts do not. The arms of a seed run one after another; the seeds' first arm rotates.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import arms
from matplotlib.axes import Axes

RAW = arms.PLOTS / "time_to_score.json"
Curve = list[list[float]]  # seconds, score of every epoch, in order


def plain(script: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    lines = arms.stamped(
        arms.plain(script, args, "--trials", str(args.trials), "--seed", str(seed))
    )
    epochs = [[line["at"], line["score"]] for line in arms.of(lines, "epoch")]
    states = [line["state"] for line in arms.of(lines, "trial")]
    return {"epochs": epochs, "states": states, "whole": lines[-1]["at"]}


def tuner(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    search = {"trials": args.trials, "sampler": "tpe", "pruner": "median", "seed": seed}
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        folder = Path(place)
        file = arms.write_space(folder / "race.yaml", args, arms.SPACE, search)
        lines = arms.stamped(arms.tuner("run", file, folder / "studies"), home=folder / "home")
    epochs = [[line["at"], line["scores"]["accuracy"]] for line in arms.of(lines, "epoch")]
    states = [line["state"] for line in arms.of(lines, "trial")]
    return {
        "epochs": epochs,
        "states": states,
        "whole": lines[-1]["at"],
        "begin": arms.of(lines, "begin")[0]["at"],
    }


ARMS = {
    "plain": lambda args, seed: plain("plain_optuna.py", args, seed),
    "ray": lambda args, seed: plain("plain_ray.py", args, seed),
    "tuner": tuner,
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = {"trials": args.trials, "workers": args.workers}
    found: dict[str, Any] = {"hardware": arms.hardware(), "settings": settings, "seeds": {}}
    for number, seed in enumerate(range(args.first_seed, args.first_seed + args.seeds)):
        turn = number % len(args.arms)
        order = args.arms[turn:] + args.arms[:turn]
        found["seeds"][str(seed)] = {name: ARMS[name](args, seed) for name in order}
        arms.save(found, RAW)  # what is measured is kept, whatever happens to the next seed
    return found


def best(arm: dict[str, Any]) -> float:
    return max(score for _, score in arm["epochs"])


def reached(arm: dict[str, Any], bar: float) -> float:
    """Seconds until the first epoch at or above `bar`; infinite where there is none."""
    return min(
        (seconds for seconds, score in arm["epochs"] if score >= bar - 1e-6), default=math.inf
    )


def table(found: dict[str, Any]) -> None:
    seeds = found["seeds"]
    names = [name for name in arms.NAMES if all(name in arm for arm in seeds.values())]
    others = [name for name in names if name != "plain"]
    print(f"{found['hardware']}; {found['settings']}; n = {len(seeds)} seeds\n")
    head = [
        "bar: plain's best",
        *(f"{name} there, s" for name in names),
        *(f"plain / {name}" for name in others),
    ]
    head += [f"best, {name}" for name in others] + [f"whole command, {name}, s" for name in names]
    formats = [
        "{:.4f}",
        *["{:.0f}"] * len(names),
        *["{:.2f}"] * len(others),
        *["{:.4f}"] * len(others),
        *["{:.0f}"] * len(names),
    ]
    print(f"| seed | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
    rows = [row(seed, names) for seed in seeds.values()]
    for seed, cells in [
        *zip(seeds, rows, strict=True),
        ("**median**", [statistics.median(column) for column in zip(*rows, strict=True)]),
    ]:
        print(
            f"| {seed} | {' | '.join(shown(cell, form) for cell, form in zip(cells, formats, strict=True))} |"
        )
    for name in others:
        missed = sum(
            math.isinf(reached(seed[name], best(seed["plain"]))) for seed in seeds.values()
        )
        if missed:
            print(
                f"\n{name} missed plain's best score within its budget in {missed} of {len(seeds)} seeds."
            )


def row(seed: dict[str, Any], names: list[str]) -> list[float]:
    bar = best(seed["plain"])
    times = {name: reached(seed[name], bar) for name in names}
    others = [name for name in names if name != "plain"]
    ratios = [times["plain"] / times[name] for name in others]
    return [
        bar,
        *times.values(),
        *ratios,
        *(best(seed[name]) for name in others),
        *(seed[name]["whole"] for name in names),
    ]


def shown(cell: float, form: str) -> str:
    return "never" if math.isinf(cell) else form.format(cell)


# -- the plot: every seed's curve on the left, the time to plain's best on the right


def plot(found: dict[str, Any]) -> None:
    seeds = list(found["seeds"].values())
    names = [name for name in arms.NAMES if all(name in seed for seed in seeds)]
    fig, (left, right) = arms.figure(2)
    for name in names:
        for number, seed in enumerate(seeds):
            xs, ys = climb(seed[name])
            left.step(
                xs,
                ys,
                where="post",
                color=arms.COLOURS[name],
                lw=1.6 if number == 0 else 1.0,
                alpha=0.9 if number == 0 else 0.45,
            )
    label(left, names)
    left.set_xlabel("wall seconds since the command began")
    left.set_title("best validation accuracy so far, each seed", loc="left", fontsize=10)
    left.set_xlim(left=0)
    waits(right, seeds, names)
    fig.savefig(arms.PLOTS / "time_to_score.png")


def climb(arm: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The best score so far, up to the end of the command."""
    xs, ys, top = [], [], 0.0
    for seconds, score in arm["epochs"]:
        if score > top:
            top = score
            xs.append(seconds)
            ys.append(score)
    return [*xs, arm["whole"]], [*ys, top]


def label(axis: Axes, names: list[str]) -> None:
    """Each arm's name in its colour, below the curves."""
    for place, name in enumerate(names):
        axis.text(
            0.98,
            0.06 + 0.08 * place,
            arms.NAMES[name],
            color=arms.COLOURS[name],
            ha="right",
            transform=axis.transAxes,
            fontsize=10,
        )


def waits(axis: Axes, seeds: list[dict[str, Any]], names: list[str]) -> None:
    """Seconds to plain's best score, a dot per seed and a line at the median; what was never reached at the edge."""
    edge = max(seed[name]["whole"] for seed in seeds for name in names)
    for height, name in enumerate(reversed(names)):
        times = [reached(seed[name], best(seed["plain"])) for seed in seeds]
        middle = statistics.median(times)
        axis.plot(
            [min(t, edge) for t in times],
            [height] * len(times),
            "o",
            color=arms.COLOURS[name],
            ms=6,
            alpha=0.6,
        )
        axis.plot(
            [min(middle, edge)] * 2, [height - 0.22, height + 0.22], color=arms.COLOURS[name], lw=2
        )
        words = f"{arms.NAMES[name]}: {'never' if math.isinf(middle) else f'{middle:.0f} s'}"
        axis.text(
            min(middle, edge),
            height + 0.28,
            words,
            color=arms.COLOURS[name],
            ha="center" if middle < 0.7 * edge else "right",
            fontsize=10,
        )
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_ylim(-0.5, len(names) - 0.3)
    axis.set_xlim(0, edge * 1.05)
    axis.set_xlabel("wall seconds")
    axis.set_title("until plain Optuna's best score; line: median", loc="left", fontsize=10)


def main() -> None:
    parser = arms.arguments(__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--arms", nargs="+", choices=sorted(ARMS), default=["plain", "ray", "tuner"]
    )
    args = arms.parse(parser)
    found = json.loads(RAW.read_text()) if args.plot_only else measure(args)
    table(found)
    plot(found)


if __name__ == "__main__":
    main()
