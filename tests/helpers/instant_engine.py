"""A coordinator against an engine that answers at once, and the worker in its place."""

from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import Run
from tuner.config.space import Space
from tuner.jobs import Job, Outcome
from tuner.messages import Assignment, Epoch, Result
from tuner.search.coordinator import Coordinator
from tuner.search.running_trial import RunningTrial
from tuner.search.samplers import PRUNERS


class Silent:
    def __init__(self) -> None:
        self.ends: list[int] = []

    def epoch(self, running: RunningTrial, epoch: Epoch) -> None: ...
    def files(self, trial: optuna.Trial, run: Run, result: Result) -> None: ...
    def ended(self, trial: FrozenTrial, run: Run, result: Result | None) -> None:
        self.ends.append(trial.number)


def space(**search: Any) -> Space:
    words = [f"search.{k}={v}" for k, v in search.items()]
    return parsing.parse(parsing.override(yaml_document.parse(SMALL, "small.yaml"), words))


def coordinator(s: Space, storage: Any = None, listener: Any = None) -> Coordinator:
    search = s.settings.search
    study = optuna.create_study(
        storage=storage,
        study_name="t",
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(),
        pruner=PRUNERS[search.pruner](3),
        load_if_exists=True,
    )
    return Coordinator(
        study,
        s,
        lambda run: Assignment(run, "accuracy", s.settings.engine, "home"),
        listener or Silent(),
        lambda: False,
    )


def quality(run: Run) -> float:
    """A score that a run has by its parameters alone."""
    return 1 / (1 + abs(run.recipe.lr - 0.01) * 50) - 0.02 * run.recipe.freeze_depth


def train(c: Coordinator, job: Job) -> Outcome:
    """What a worker would do, without training."""
    run = job.argument.run
    epochs: list[Epoch] = []
    for number in range(1, run.recipe.epochs + 1):
        epochs.append(
            Epoch(number, 1.0, {"accuracy": quality(run) * number / run.recipe.epochs}, 0.1)
        )
        if not c.report(job, epochs[-1]):
            return Outcome("done", Result("stopped", tuple(epochs), number, {}, 0.1))
    return Outcome("done", Result("complete", tuple(epochs), len(epochs), {}, 0.1))


def drive(
    c: Coordinator, carry: Callable[[Coordinator, Job], Outcome] = train, most: int = 10_000
) -> list[Job]:
    jobs = []
    while len(jobs) < most and (job := c.next_job()) is not None:
        jobs.append(job)
        c.ended(job, carry(c, job))
    return jobs
