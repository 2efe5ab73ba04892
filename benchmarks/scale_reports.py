"""A thousand simulated workers on one real coordinator: how many reports a second it answers, and how long an answer takes.

    python benchmarks/scale_reports.py [--workers 1000] [--epoch-seconds 60 20 10] [--seconds 20] [--postgresql]

Workers are asyncio tasks that sleep through epochs of exponential length, 10 a trial, and ask a real coordinator (TPE, median
pruner, notes, files, 6 parameters) over one queue, as an engine does; the coordinator has a thread of its own, and its study lies in
SQLite as shipped (WAL, synchronous=FULL) or in a PostgreSQL server that is started for it (fsync on). One trial in a hundred
loses its worker. First every worker gets a job; then each epoch length is held for `--seconds`, from the longest to the shortest.

Prints one JSON object for each: what was offered and answered, milliseconds until an answer (queueing included), the coordinator's
CPU by its thread (the database's own processes not included), and the process's memory. `carries` is how many workers with
epochs of 10 s the coordinator's CPU would be fully taken by, from what an epoch and a trial cost it here.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pwd
import queue
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from arms import hardware
from coordinator import EPOCHS, FILES, SPACE, score

from tuner.commands import run as running
from tuner.commands.console import Console
from tuner.config import parsing, yaml_document
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.jobs import Job, Outcome
from tuner.messages import Assignment, DatasetReport, Epoch, ModelSurvey, TrialResult
from tuner.search import storage
from tuner.search.coordinator import Coordinator
from tuner.search.pruners import PRUNERS
from tuner.search.study_identity import identity

BINARIES = Path("/usr/lib/postgresql/15/bin")
DYING = 0.01  # of the trials


@dataclass
class Tally:
    """What one window saw."""

    reports: list[float] = field(default_factory=list)  # seconds until each answer
    jobs: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    cpu: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("report", "job", "end"), 0.0)
    )
    busy: float = 0.0


class Server:
    """The coordinator in a thread: takes calls from a queue, one at a time, as an engine's loop hands them on."""

    def __init__(self, make: Callable[[], Coordinator]) -> None:
        self.calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.tally, self.make = Tally(), make
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        coordinator = self.make()
        work = {
            "report": coordinator.report,
            "job": coordinator.next_job,
            "end": coordinator.on_job_end,
        }
        while (call := self.calls.get()) is not None:
            kind, words, loop, answer = call
            wall, cpu = time.monotonic(), time.thread_time()
            try:
                found = work[kind](*words)
            except BaseException as error:
                print(f"the coordinator failed: {error!r}", file=sys.stderr)
                os._exit(1)
            self.tally.cpu[kind] += time.thread_time() - cpu
            self.tally.busy += time.monotonic() - wall
            loop.call_soon_threadsafe(
                lambda answer=answer, found=found: answer.done() or answer.set_result(found)
            )

    async def call(self, kind: str, *words: Any) -> Any:
        answer, start = asyncio.get_running_loop().create_future(), time.monotonic()
        self.calls.put((kind, words, asyncio.get_running_loop(), answer))
        found = await answer
        getattr(self.tally, f"{kind}s").append(time.monotonic() - start)
        return found


class Clock:
    """The mean length of an epoch, seconds; None: nobody goes on yet."""

    def __init__(self) -> None:
        self.mean: float | None = None
        self.ready = 0


async def worker(server: Server, clock: Clock, chance: random.Random) -> None:
    """Trial after trial. The first begins in the middle, so that trials end evenly over time."""
    skip = chance.randrange(EPOCHS)
    while True:
        job: Job = await server.call("job")
        clock.ready += 1
        while clock.mean is None:
            await asyncio.sleep(0.1)
        await server.call("end", job, await trial(server, clock, chance, job, skip))
        skip = 0


async def trial(
    server: Server, clock: Clock, chance: random.Random, job: Job, skip: int
) -> Outcome:
    recipe = job.argument.run.recipe
    dies = chance.randrange(1, EPOCHS + 1) if chance.random() < DYING else None
    epochs: list[Epoch] = []
    for number in range(1, EPOCHS + 1 - skip):
        assert clock.mean is not None
        await asyncio.sleep(chance.expovariate(1 / clock.mean))
        if number == dies:
            return Outcome("lost", reason="worker ended by SIGKILL (out of memory?)")
        value = score(recipe.lr, recipe.freeze_depth, number)
        epochs.append(
            Epoch(
                number,
                1 - value,
                {
                    "accuracy": value,
                    "balanced_accuracy": value,
                    "f1": value,
                    "log_likelihood": value - 1,
                },
                1.0,
            )
        )
        if not await server.call("report", job, epochs[-1]):
            return Outcome("done", TrialResult("stopped", tuple(epochs), number, FILES, 1.0))
    return Outcome("done", TrialResult("complete", tuple(epochs), len(epochs), FILES, 1.0))


def coordinator(folder: Path, url: str | None) -> Coordinator:
    """As `tuner run` makes it, for trials that nobody carries out."""
    space = parsing.parse_space(
        yaml_document.parse_document(
            SPACE.replace("pruner: median", "pruner: median, retries: 10"), "scale.yaml"
        )
    )
    database, sampler = storage.open_storage(url, folder), optuna.samplers.RandomSampler()
    study = storage.open_study(
        database, "scale", sampler, PRUNERS["median"](EPOCHS), identity(space), "d"
    )
    console = Console("quiet")  # the lines that it prints are measured by coordinator.py
    listener = running.CombinedListener(console, ArtifactWriter(study, folder, "accuracy"))
    made = Coordinator(
        study,
        space,
        lambda run: Assignment(run, "accuracy", space.settings.engine, "home"),
        listener,
        lambda: False,
    )
    facts = DatasetReport(
        "d", ("a", "b"), {"train": 1, "valid": 1, "test": 1}, {"shape": ["batch", 3, 32, 32]}, 1
    )
    console.start_search(made, facts, ModelSurvey({"resnet18_slim": 5}, 0), 1)
    return made


def percentile(values: list[float], share: float) -> float | None:
    """In milliseconds."""
    return (
        round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)
        if values
        else None
    )


def shown(tally: Tally, mean: float, workers: int, seconds: float) -> dict[str, Any]:
    per = {
        kind: tally.cpu[kind] / max(1, len(calls))
        for kind, calls in (("report", tally.reports), ("job", tally.jobs), ("end", tally.ends))
    }
    epochs = len(tally.reports) / max(1, len(tally.ends))  # of a trial, pruned ones included
    epoch = per["report"] + (per["job"] + per["end"]) / max(1.0, epochs)
    return {
        "epoch_seconds": mean,
        "offered_reports_s": round(workers / mean, 1),
        "reports_s": round(len(tally.reports) / seconds, 1),
        "trials_s": round(len(tally.ends) / seconds, 2),
        "report_ms": {
            "p50": percentile(tally.reports, 0.5),
            "p99": percentile(tally.reports, 0.99),
            "max": percentile(tally.reports, 1),
        },
        "job_ms": {"p50": percentile(tally.jobs, 0.5), "p99": percentile(tally.jobs, 0.99)},
        "busy": round(tally.busy / seconds, 3),
        "cpu": round(sum(tally.cpu.values()) / seconds, 3),
        "cpu_ms": {kind: round(1000 * value, 2) for kind, value in per.items()},
        "carries": round(10 / epoch) if epoch else None,
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


async def measure(args: argparse.Namespace, folder: Path, url: str | None) -> None:
    server, clock = Server(lambda: coordinator(folder, url)), Clock()
    start = time.monotonic()
    crew = [
        asyncio.create_task(worker(server, clock, random.Random(number)))
        for number in range(args.workers)
    ]
    while clock.ready < args.workers:
        await asyncio.sleep(0.05)
    took = time.monotonic() - start
    print(
        json.dumps(
            {
                "first_jobs": args.workers,
                "seconds": round(took, 1),
                "cpu_ms": round(1000 * server.tally.cpu["job"] / args.workers, 1),
            }
        )
    )
    for mean in args.epoch_seconds:
        clock.mean = mean
        await asyncio.sleep(min(mean, 10))
        server.tally = tally = Tally()
        await asyncio.sleep(args.seconds)
        print(
            json.dumps(shown(tally, mean, args.workers, args.seconds), sort_keys=False), flush=True
        )
    for task in crew:
        task.cancel()
    server.calls.put(None)
    await asyncio.to_thread(server.thread.join)


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """The URL of an empty database on a server of its own. It refuses to be root's."""
    uid = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as probe:
        os.chown(place, uid, -1)
        port = probe.getsockname()[1]
        probe.close()

        def run(*words: str) -> None:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, user=uid, cwd=place)

        run(str(BINARIES / "initdb"), "-D", f"{place}/data", "-U", "tuner", "-A", "trust")
        options = f"-p {port} -k {place} -c listen_addresses=127.0.0.1"
        control = (str(BINARIES / "pg_ctl"), "-D", f"{place}/data", "-w", "-l", f"{place}/log")
        run(*control, "-o", options, "start")
        try:
            run(
                str(BINARIES / "createdb"),
                "-h",
                "127.0.0.1",
                "-p",
                str(port),
                "-U",
                "tuner",
                "scale",
            )
            yield f"postgresql://tuner@127.0.0.1:{port}/scale"
        finally:
            run(*control, "-m", "fast", "stop")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--epoch-seconds", type=float, nargs="+", default=[60.0, 20.0, 10.0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--postgresql", action="store_true")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    random.seed(0)
    print(
        json.dumps(
            {
                "hardware": hardware(),
                "database": "postgresql" if args.postgresql else "sqlite",
                "workers": args.workers,
            }
        )
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(postgresql()) if args.postgresql else None
        asyncio.run(measure(args, folder, url))


if __name__ == "__main__":
    main()
