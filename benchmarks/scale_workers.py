"""Two workers against one, with trials that sleep, so that the machine is not the limit: the local engine's, or two Ray nodes'.

    python benchmarks/scale_workers.py [--engine local ray] [--trials 60] [--seconds 1.0] [--repeats 1]

A real coordinator (TPE, no pruner, 6 parameters, notes and files, SQLite) hands out a budget of trials of 5 epochs, which sleep
half to one and a half times `--seconds`, the same for the same trial. Ray's cluster is of this machine: a head without cores, two
nodes with one each. Workers are started before the clock is; what that took is `start_seconds`.

Prints one JSON object a measurement. `efficiency` is T1 / (2 x T2); `slept` is the share of the workers' time that trials slept,
so what is missing to 1 is the coordinator, the engine and the last trials, when a worker has nothing left to do.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from arms import hardware
from coordinator import FILES, SPACE

from tuner.commands import run as running
from tuner.commands.console import Console
from tuner.config import parsing, plugins, yaml_document
from tuner.config.run import EngineSettings
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.jobs import Job, Outcome, RunJobs
from tuner.messages import Assignment, DatasetReport, Epoch, ModelSurvey, TrialResult
from tuner.search import storage
from tuner.search.coordinator import Coordinator
from tuner.search.pruners import PRUNERS
from tuner.search.study_identity import identity

EPOCHS = 5


def nap(argument: float, report: Callable[[Any], bool], slot: int) -> int:
    time.sleep(argument)
    return os.getpid()


def sleep(argument: float, report: Callable[[Epoch], bool], slot: int) -> TrialResult:
    """A trial of so many seconds."""
    epochs = []
    for number in range(1, EPOCHS + 1):
        time.sleep(argument / EPOCHS)
        epochs.append(
            Epoch(number, 1.0, {"accuracy": number / 10, "log_likelihood": -1.0}, argument / EPOCHS)
        )
        report(epochs[-1])
    return TrialResult("complete", tuple(epochs), EPOCHS, FILES, argument)


def length(job: Job, mean: float) -> float:
    return mean * random.Random(job.number).uniform(0.5, 1.5)


def study(folder: Path, trials: int) -> Coordinator:
    """As `tuner run` makes it."""
    space = parsing.parse_space(
        yaml_document.parse_document(
            SPACE.replace("trials: 1000000, pruner: median", f"trials: {trials}, pruner: none"),
            "scale.yaml",
        )
    )
    database, sampler = storage.open_storage(None, folder), optuna.samplers.RandomSampler()
    made = storage.open_study(
        database, "scale", sampler, PRUNERS["none"](EPOCHS), identity(space), "d"
    )
    console = Console("quiet")
    listener = running.CombinedListener(console, ArtifactWriter(made, folder, "accuracy"))
    found = Coordinator(
        made,
        space,
        lambda run: Assignment(run, "accuracy", space.settings.engine, "home"),
        listener,
        lambda: False,
    )
    facts = DatasetReport(
        "d", ("a", "b"), {"train": 1, "valid": 1, "test": 1}, {"shape": ["batch", 3, 32, 32]}, 1
    )
    console.start_search(found, facts, ModelSurvey({"resnet18_slim": 5}, 0), 1)
    return found


def start(carry: RunJobs, workers: int) -> float:
    """Seconds until so many workers carry out jobs; longer jobs until they do, since a fast worker would take them all."""
    begun = time.monotonic()
    for seconds in (2.0, 10.0, 30.0, 60.0):
        pids: list[int] = []
        jobs = iter([Job(-1 - i, "scale_workers:nap", seconds) for i in range(workers)])
        carry(
            lambda jobs=jobs: next(jobs, None),
            lambda *_: True,
            lambda _, o, pids=pids: pids.append(o.value),
            lambda: True,
            workers,
        )
        if len(set(pids)) == workers:
            return time.monotonic() - begun - seconds
    raise SystemExit(f"there are never {workers} workers at once: {pids}")


def timed(carry: RunJobs, workers: int, trials: int, mean: float) -> dict[str, float]:
    started, slept = start(carry, workers), 0.0
    with tempfile.TemporaryDirectory() as folder:
        coordinator = study(Path(folder), trials)

        def jobs() -> Job | None:
            nonlocal slept
            job = coordinator.next_job()
            if job is None:
                return None
            slept += length(job, mean)
            return replace(job, work="scale_workers:sleep", argument=length(job, mean), keep=None)

        def ended(job: Job, outcome: Outcome) -> None:
            assert outcome.kind == "done", outcome
            coordinator.on_job_end(job, outcome)

        begun, cpu = time.monotonic(), time.process_time()
        carry(jobs, coordinator.report, ended, lambda: True, workers)
        took = time.monotonic() - begun
        return {
            "seconds": took,
            "slept": slept / workers / took,
            "start_seconds": started,
            "cpu": (time.process_time() - cpu) / took,
        }


@contextlib.contextmanager
def local() -> Iterator[RunJobs]:
    with plugins.load_plugin("engine", "local")() as carry:
        yield carry


@contextlib.contextmanager
def ray() -> Iterator[RunJobs]:
    """Two nodes of one core on this machine."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # a process has one for good
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )  # of the nodes
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 80 * 2**20,
        },
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        with plugins.load_plugin("engine", "ray")(
            EngineSettings.model_validate({"name": "ray", "address": cluster.address})
        ) as carry:
            yield carry
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", nargs="+", default=["local"], choices=["local", "ray"])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(json.dumps({"hardware": hardware()}))
    for name in args.engine:
        found: list[float] = []
        for repeat in range(args.repeats):
            took = {}
            for workers in (1, 2):
                with {"local": local, "ray": ray}[name]() as carry:
                    said = timed(carry, workers, args.trials, args.seconds)
                took[workers] = said["seconds"]
                shown = {key: round(value, 3) for key, value in said.items()}
                print(
                    json.dumps(
                        {
                            "engine": name,
                            "repeat": repeat,
                            "workers": workers,
                            "trials": args.trials,
                            **shown,
                        }
                    ),
                    flush=True,
                )
            found.append(took[1] / (2 * took[2]))
        print(
            json.dumps(
                {
                    "engine": name,
                    "efficiency": round(statistics.median(found), 3),
                    "all": [round(e, 3) for e in found],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
