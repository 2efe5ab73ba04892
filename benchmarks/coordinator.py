"""CPU time that the coordinator spends on a trial, when 100, 1,000 and 10,000 trials have ended before.

    python benchmarks/coordinator.py [--finished 100 1000 10000] [--trials 20] [--repeats 3]

A real coordinator, with a study on disk, notes, files and a console that is no terminal, is told of trials that nobody trains:
6 parameters, 10 epochs, TPE, median pruner. The plain twin is Optuna's own ask, suggest, report, should_prune and tell with the
default sampler and pruner on the same kind of database. Seconds of this process's CPU, all of its threads; the plain twin asks for
fewer trials where each takes long.
"""

import argparse
import contextlib
import datetime
import io
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from arms import hardware
from optuna.storages._rdb import models

from tuner.commands.console import Console
from tuner.commands.run import CombinedListener
from tuner.config import parsing, yaml_document
from tuner.config.space import Space
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.jobs import Job, Outcome
from tuner.messages import Assignment, DatasetReport, Epoch, ModelSurvey, TrialResult
from tuner.search import optuna_internals, storage
from tuner.search.coordinator import Coordinator
from tuner.search.pruners import PRUNERS

EPOCHS = 10
SPACE = """
task: classification
data: {name: digits}
model: {name: resnet18_slim, weights: bundled}
recipe:
  optimizer: [sgd, adamw]
  lr: {low: 1e-4, high: 1e-1, log: true}
  momentum: {low: 0.8, high: 0.99, when: {optimizer: sgd}}
  weight_decay: {low: 1e-6, high: 1e-2, log: true}
  freeze_depth: {low: 0, high: 5}
  label_smoothing: {low: 0.0, high: 0.2}
  epochs: 10
search: {trials: 1000000, pruner: median}
"""
FILES = {
    "curve.png": b'{"tuner:figure": "curve"}' * 20,
    "confusion.png": b'{"tuner:figure"}' * 60,
    "per_class.csv": b"class,f1\n" * 10,
}


def score(lr: float, depth: int, epoch: int) -> float:
    """A learning curve that depends on the parameters and a little on luck."""
    return (
        1 / (1 + abs(math.log10(lr) + 2)) * (1 - 0.5**epoch) - 0.02 * depth + random.gauss(0, 0.01)
    )


def study_with(folder: Path, space: Space, finished: int) -> optuna.Study:
    """A study on disk with so many trials behind it, each written as rows: Optuna's own way would take many minutes."""
    study = optuna.create_study(
        storage=storage.open_storage(None, folder),
        study_name="bench",
        direction="maximize",
        pruner=PRUNERS["median"](EPOCHS),
    )
    rows: dict[Any, list[dict[str, Any]]] = {}
    now = datetime.datetime.now()
    study_id = optuna_internals.study_id_of(study)
    for number in range(finished):
        drawn = Drawn(random.Random(number))
        recipe = space.sample(drawn).recipe
        values = [score(recipe.lr, recipe.freeze_depth, epoch) for epoch in range(1, EPOCHS + 1)]
        for kind, found in as_rows(number, study_id, drawn, values, now).items():
            rows.setdefault(kind, []).extend(found)
    database = optuna_internals.database_of(optuna_internals.storage_of(study))
    with database.engine.begin() as connection:
        for kind, found in rows.items():
            connection.execute(sqlalchemy.insert(kind), found)
    return optuna.load_study(
        study_name="bench", storage=storage.open_storage(None, folder), pruner=study.pruner
    )


class Drawn:
    """Parameters by chance, with their distributions."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.params: dict[str, tuple[Any, optuna.distributions.BaseDistribution]] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        value = (
            math.exp(self.chance.uniform(math.log(low), math.log(high)))
            if log
            else self.chance.uniform(low, high)
        )
        self.params[name] = (
            value,
            optuna.distributions.FloatDistribution(low, high, log=log, step=step),
        )
        return value

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        value = self.chance.randint(low, high)
        self.params[name] = (
            value,
            optuna.distributions.IntDistribution(low, high, log=log, step=step),
        )
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self.chance.choice(choices)
        self.params[name] = value, optuna.distributions.CategoricalDistribution(choices)
        return value


def as_rows(
    number: int, study: int, drawn: Drawn, values: list[float], now: datetime.datetime
) -> dict[Any, list[dict[str, Any]]]:
    """A completed trial as Optuna's tables have it."""
    trial = number + 1
    base = {
        "trial_id": trial,
        "number": number,
        "study_id": study,
        "datetime_start": now,
        "datetime_complete": now,
    }
    finite = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
    attrs = {"seconds": 1.0, "best_epoch": EPOCHS, "scores": {"accuracy": values[-1]}}
    params = drawn.params.items()
    return {
        models.TrialModel: [{**base, "state": optuna.trial.TrialState.COMPLETE}],
        models.TrialValueModel: [
            {
                "trial_id": trial,
                "objective": 0,
                "value": max(values),
                "value_type": models.TrialValueModel.TrialValueType.FINITE,
            }
        ],
        models.TrialParamModel: [
            {
                "trial_id": trial,
                "param_name": name,
                "param_value": distribution.to_internal_repr(value),
                "distribution_json": optuna.distributions.distribution_to_json(distribution),
            }
            for name, (value, distribution) in params
        ],
        models.TrialIntermediateValueModel: [
            {
                "trial_id": trial,
                "step": step,
                "intermediate_value": value,
                "intermediate_value_type": finite,
            }
            for step, value in enumerate(values, 1)
        ],
        models.TrialUserAttributeModel: [
            {"trial_id": trial, "key": key, "value_json": json.dumps(value)}
            for key, value in attrs.items()
        ],
    }


def ours(folder: Path, space: Space, finished: int, trials: int) -> list[float]:
    """CPU seconds of each trial under tuner's coordinator."""
    study = study_with(folder, space, finished)
    console = Console("normal")
    listener = CombinedListener(console, ArtifactWriter(study, folder, "accuracy"))
    order = lambda run: Assignment(run, "accuracy", space.settings.engine, "home")  # noqa: E731
    coordinator = Coordinator(study, space, order, listener, lambda: False)
    facts = DatasetReport(
        "d", ("a", "b"), {"train": 1, "valid": 1, "test": 1}, {"shape": ["batch", 3, 32, 32]}, 1
    )
    console.start_search(coordinator, facts, ModelSurvey({"resnet18_slim": 5}, 0), 1)
    seconds = []
    for _ in range(trials + 2):
        start = time.process_time()
        job = coordinator.next_job()
        assert job is not None
        coordinator.on_job_end(job, Outcome("done", trained(coordinator, job)))
        seconds.append(time.process_time() - start)
    return seconds[2:]  # the first import what is imported late


def trained(coordinator: Coordinator, job: Job) -> TrialResult:
    recipe = job.argument.run.recipe
    epochs: list[Epoch] = []
    for number in range(1, EPOCHS + 1):
        value = score(recipe.lr, recipe.freeze_depth, number)
        scores = {
            "accuracy": value,
            "balanced_accuracy": value,
            "f1": value,
            "log_likelihood": value - 1,
        }
        epochs.append(Epoch(number, 1 - value, scores, 0.1))
        if not coordinator.report(job, epochs[-1]):
            return TrialResult("stopped", tuple(epochs), number, FILES, 1.0)
    return TrialResult("complete", tuple(epochs), EPOCHS, FILES, 1.0)


def plain(folder: Path, space: Space, finished: int, trials: int) -> list[float]:
    """CPU seconds of each trial in the loop that a script would have."""
    made = study_with(folder, space, finished)
    study = optuna.load_study(study_name="bench", storage=optuna_internals.storage_of(made))
    seconds = []
    for _ in range(trials):
        start = time.process_time()
        trial = study.ask()
        recipe = space.sample(trial).recipe
        state, best = optuna.trial.TrialState.COMPLETE, -1.0
        for number in range(1, EPOCHS + 1):
            value = score(recipe.lr, recipe.freeze_depth, number)
            best = max(best, value)
            trial.report(value, number)
            if trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        study.tell(trial, best if state == optuna.trial.TrialState.COMPLETE else None, state)
        seconds.append(time.process_time() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--finished", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = parsing.parse_space(yaml_document.parse_document(SPACE, "coordinator.yaml"))
    print(hardware())
    print("| finished trials | tuner, ms a trial | plain Optuna, ms a trial |\n|---|---|---|")
    for finished in args.finished:
        cells = []
        for arm, count in ((ours, args.trials), (plain, args.trials if finished < 5000 else 3)):
            medians = []
            for repeat in range(args.repeats):
                random.seed(repeat)
                with (
                    tempfile.TemporaryDirectory() as folder,
                    contextlib.redirect_stdout(io.StringIO()),
                ):
                    medians.append(
                        1000 * statistics.median(arm(Path(folder), space, finished, count))
                    )
            cells.append(
                f"{statistics.median(medians):.0f} ({min(medians):.0f} to {max(medians):.0f})"
            )
        print(f"| {finished:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
