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
from tuner.messages import Assignment, Epoch, TrialResult
from tuner.search.coordinator import Coordinator
from tuner.search.pruners import PRUNERS
from tuner.search.running_trial import RunningTrial
from tuner.search.storage import OPTUNA_DIRECTIONS


class RecordingListener:
    def __init__(self) -> None:
        self.ends: list[int] = []

    def on_trial_start(self, running: RunningTrial) -> None: ...
    def on_epoch(self, running: RunningTrial, epoch: Epoch) -> None: ...
    def save_artifacts(self, trial: optuna.Trial, run: Run, result: TrialResult) -> None: ...
    def on_trial_end(self, trial: FrozenTrial, run: Run, result: TrialResult | None) -> None:
        self.ends.append(trial.number)


def make_space(**search: Any) -> Space:
    words = [f"search.{k}={v}" for k, v in search.items()]
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SMALL, "small.yaml"), words)
    )


def make_coordinator(s: Space, storage: Any = None, listener: Any = None) -> Coordinator:
    search = s.settings.search
    study = optuna.create_study(
        storage=storage,
        study_name="t",
        direction=OPTUNA_DIRECTIONS[search.direction or "maximise"],
        sampler=optuna.samplers.RandomSampler(),
        pruner=PRUNERS[search.pruner](3),
        load_if_exists=True,
    )
    return Coordinator(
        study,
        s,
        lambda run: Assignment(run, "accuracy", s.settings.engine, "home"),
        listener or RecordingListener(),
        lambda: False,
    )


def score_of_run(run: Run) -> float:
    """A score that a run has by its parameters alone."""
    return 1 / (1 + abs(run.recipe.lr - 0.01) * 50) - 0.02 * run.recipe.freeze_depth


def carry_out_without_training(c: Coordinator, job: Job) -> Outcome:
    """What a worker would do, without training."""
    run = job.argument.run
    epochs: list[Epoch] = []
    for number in range(1, run.recipe.epochs + 1):
        epochs.append(
            Epoch(number, 1.0, {"accuracy": score_of_run(run) * number / run.recipe.epochs}, 0.1)
        )
        if not c.report(job, epochs[-1]):
            return Outcome("done", TrialResult("stopped", tuple(epochs), number, {}, 0.1))
    return Outcome("done", TrialResult("complete", tuple(epochs), len(epochs), {}, 0.1))


def run_all_jobs(
    c: Coordinator,
    run_job: Callable[[Coordinator, Job], Outcome] = carry_out_without_training,
    most: int = 10_000,
) -> list[Job]:
    jobs = []
    while len(jobs) < most and (job := c.next_job()) is not None:
        jobs.append(job)
        c.on_job_end(job, run_job(c, job))
    return jobs
