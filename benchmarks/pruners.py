"""What pruners save and what they lose: learning curves of studies without pruning, pruned afterwards.

    python benchmarks/pruners.py digits DATA/clothing DATA/signdigits [--trials 16] [--seeds 3]
    python benchmarks/pruners.py --table-only

For each set, seed and sampler one search by `tuner run` without pruning keeps the score and the seconds of every epoch.
Each pruner then judges these trials one after the other, as the search would. A random search proposes every order of its
trials with the same probability, so its trials are replayed in ORDERS orders; the linear-probe trial and the default
recipe stay first. A TPE search is replayed in its own order.

- winner ended: in how many percent of the replays the pruner ends the trial that won without pruning, and each that equals it
- saved: the share of the seconds of all epochs, in percent
- lost: how far the best completed trial stays below the winner, in points of validation accuracy

Results are written as they come; a second start goes on.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import arms
import optuna
import yaml

from tuner.search.pruners import PRUNERS

RESULTS = arms.PLOTS / "pruners.json"
EPOCHS = {"low": 1, "high": 8}
MAX_DEPTH = 5
DISTRIBUTIONS = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
    "momentum": optuna.distributions.FloatDistribution(0.8, 0.99),
    "freeze_depth": optuna.distributions.IntDistribution(0, MAX_DEPTH),
    "epochs": optuna.distributions.IntDistribution(EPOCHS["low"], EPOCHS["high"]),
}
FIRST_TRIALS = 2  # the linear-probe trial and the default recipe begin every study
DEFAULT_RECIPE = 1  # the number of the trial that is never pruned
SAMPLERS = ("random", "tpe")
ORDERS = 100

Trials = list[dict[str, Any]]


class Replay(NamedTuple):
    """What a pruner did to the trials of one study in one order."""

    winner_ended: bool
    saved: float  # share of the seconds
    lost: float  # points of validation accuracy


def write_space(args: argparse.Namespace, data: str, sampler: str, seed: int, file: Path) -> None:
    """The space file of one search without pruning."""
    source = (
        {"name": "digits", "size": 32}
        if data == "digits"
        else {"name": "folder", "path": str(Path(data).resolve()), "size": args.size}
    )
    tree = {
        "task": "classification",
        "data": {**source, "limit": args.limit},
        "model": {"name": "resnet18_slim", "weights": "bundled"},
        "recipe": {
            **arms.SPACE,
            "freeze_depth": {"low": 0, "high": MAX_DEPTH},
            "epochs": EPOCHS,
            "batch_size": 32,
        },
        "search": {
            "retrain": False,
            "keep": 0,
            "confirm": "none",
            "sampler": sampler,
            "pruner": "none",
            "seed": seed,
            "trials": args.trials,
        },
        "engine": {"name": "inline", "device": "cpu"},
        "export": ["safetensors"],
    }
    file.write_text(yaml.safe_dump(tree))


def measure(
    args: argparse.Namespace, data: str, sampler: str, seed: int, home: Path
) -> dict[str, Any]:
    """Parameters, scores and seconds of every trial of a search without pruning."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        write_space(args, data, sampler, seed, folder / "pruners.yaml")
        command = arms.tuner("run", folder / "pruners.yaml", folder / "studies")
        lines = arms.stamped(command, home=home)
    trials: Trials = []
    epochs: arms.Lines = []
    for line in lines:
        if line["event"] == "epoch":
            epochs.append(line)
        elif line["event"] == "trial":
            # a duplicate has no epochs of its own: the search does not train it
            if epochs:
                scores = [epoch["scores"]["accuracy"] for epoch in epochs]
                seconds = [epoch["seconds"] for epoch in epochs]
                trials.append({"params": line["params"], "scores": scores, "seconds": seconds})
            epochs = []
    return {"set": Path(data).name, "sampler": sampler, "seed": seed, "trials": trials}


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "hardware": arms.hardware(),
        "settings": f"{args.trials} trials of {EPOCHS['low']} to {EPOCHS['high']} epochs, "
        f"at most {args.limit} images of each part",
        "studies": [],
    }
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    known = {(study["set"], study["sampler"], study["seed"]) for study in results["studies"]}
    cells = itertools.product(range(args.seeds), args.samplers, args.data)
    with tempfile.TemporaryDirectory(dir=args.scratch) as home:  # its caches serve all studies
        for seed, sampler, data in cells:
            if (Path(data).name, sampler, seed) not in known:
                results["studies"].append(measure(args, data, sampler, seed, Path(home)))
                arms.save(results, RESULTS)
    return results


def orders(study: dict[str, Any]) -> Iterator[Trials]:
    """The orders in which the trials of a study are replayed, the same ones at every call."""
    trials = study["trials"]
    yield trials
    first, later = trials[:FIRST_TRIALS], trials[FIRST_TRIALS:]
    generator = random.Random(0)
    for _ in range(ORDERS - 1 if study["sampler"] == "random" else 0):
        yield [*first, *generator.sample(later, len(later))]


def replay(trials: Trials, pruner: optuna.pruners.BasePruner) -> Replay:
    """Show the trials to a pruner as the search does."""
    study = optuna.create_study(direction="maximize", pruner=pruner)
    best, spent = 0.0, 0.0
    for number, known in enumerate(trials):
        study.enqueue_trial(known["params"])
        trial = study.ask(DISTRIBUTIONS)
        epochs = train(trial, known, judged=number != DEFAULT_RECIPE)
        spent += sum(known["seconds"][:epochs])
        if epochs == len(known["scores"]):
            best = max(best, *known["scores"])
            study.tell(trial, max(known["scores"]))
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    whole = sum(sum(trial["seconds"]) for trial in trials)
    winner = max(max(trial["scores"]) for trial in trials)
    return Replay(best < winner, 1 - spent / whole, 100 * (winner - best))


def train(trial: optuna.trial.Trial, known: dict[str, Any], *, judged: bool) -> int:
    """Report the epochs of a trial until the pruner ends it. Return how many were reported.

    As in the search, no trial is judged after its last epoch.
    """
    for epoch, score in enumerate(known["scores"], 1):
        trial.report(score, epoch)
        if judged and epoch < len(known["scores"]) and trial.should_prune():
            return epoch
    return len(known["scores"])


def print_table(results: dict[str, Any]) -> None:
    print(f"{results['hardware']}; {results['settings']}\n")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [name for name in PRUNERS if name != "none"]
    print(f"| set | sampler | studies | replays | {' | '.join(names)} |")
    print(f"|{'---|' * (4 + len(names))}")
    studies = results["studies"]
    for sampler in SAMPLERS:
        for data in [*dict.fromkeys(study["set"] for study in studies), "**all**"]:
            rows = [s for s in studies if s["sampler"] == sampler and data in (s["set"], "**all**")]
            cells = {
                name: [
                    replay(trials, PRUNERS[name](EPOCHS["high"]))
                    for study in rows
                    for trials in orders(study)
                ]
                for name in names
            }
            if rows:
                count = len(cells[names[0]])
                shown = " | ".join(format_cell(replays) for replays in cells.values())
                print(f"| {data} | {sampler} | {len(rows)} | {count} | {shown} |", flush=True)
    print("\nIn each cell: winner ended, %; seconds saved, %; points lost, mean.")


def format_cell(replays: list[Replay]) -> str:
    ended = 100 * statistics.mean(replay.winner_ended for replay in replays)
    saved = 100 * statistics.mean(replay.saved for replay in replays)
    lost = statistics.mean(replay.lost for replay in replays)
    return f"{ended:.0f}; {saved:.0f}; {lost:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", help="digits, or a folder of images")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="side of the folders' images, pixels")
    parser.add_argument("--limit", type=int, default=300, help="images of each part")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only and not args.data:
        parser.error("name at least one data set, unless --table-only")
    print_table(json.loads(RESULTS.read_text()) if args.table_only else measure_all(args))


if __name__ == "__main__":
    main()
