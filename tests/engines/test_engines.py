"""Every engine carries the same jobs to the same ends; the local one outlives its workers."""

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tuner.config import plugins
from tuner.config.run import EngineSettings
from tuner.engines import _process_settings
from tuner.engines import local as local_engine
from tuner.engines._ray_worker import RayWorker
from tuner.engines._watch import Watch
from tuner.jobs import Job, Outcome, RunJobs, Stall, stall_of

ENGINES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "ray" else name
    for name in plugins.list_names("engine")
]
SETTINGS = {"ray": EngineSettings(name="ray", address="local")}


def carry_all(
    carry: RunJobs, jobs: list[Job], answer: bool = True, workers: int = 1
) -> tuple[list[tuple[Job, Outcome]], list[Any]]:
    ended: list[tuple[Job, Outcome]] = []
    heard: list[Any] = []
    queue = iter(jobs)

    def report(job: Job, value: Any) -> bool:
        heard.append(value)
        return answer

    carry(
        lambda: next(queue, None),
        report,
        lambda job, outcome: ended.append((job, outcome)),
        lambda: True,
        workers,
    )
    return ended, heard


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module", params=ENGINES)
def carry(request: pytest.FixtureRequest) -> Iterator[RunJobs]:
    if request.param == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    if request.param == "local":
        yield request.getfixturevalue("local")
        return
    with plugins.load_plugin("engine", request.param)(
        SETTINGS.get(request.param, EngineSettings())
    ) as carry:
        yield carry


@pytest.fixture(scope="module")
def local() -> Iterator[RunJobs]:
    with plugins.load_plugin("engine", "local")() as carry:
        yield carry


def test_an_engine_returns_values_and_carries_reports_and_answers(carry: RunJobs) -> None:
    ended, heard = carry_all(carry, [Job(0, "tests.helpers.jobs:count", 3)])
    assert [o.value for _, o in ended] == [3] and heard == [1, 2, 3]
    ended, heard = carry_all(carry, [Job(0, "tests.helpers.jobs:count", 3)], answer=False)
    assert [o.value for _, o in ended] == [1] and heard == [1]


def test_what_a_job_raises_becomes_an_outcome_and_the_next_job_runs(carry: RunJobs) -> None:
    ended, _ = carry_all(
        carry,
        [
            Job(0, "tests.helpers.jobs:fail", "no such layer"),
            Job(1, "tests.helpers.jobs:refuse", "gone"),
            Job(2, "tests.helpers.jobs:count", 1),
        ],
    )
    (_, failed), (_, refused), (_, done) = ended
    assert (failed.kind, failed.reason) == (
        "failed",
        "ValueError: no such layer",
    ) and "Traceback" in failed.traceback
    assert (refused.kind, refused.reason, refused.problems, refused.exit_code) == (
        "refused",
        "DataError",
        ("gone", "and more"),
        3,
    )
    assert done.value == 1


def test_what_fails_in_the_coordinator_is_not_taken_for_a_failure_of_the_job(
    carry: RunJobs,
) -> None:
    jobs = iter([Job(0, "tests.helpers.jobs:count", 1)])

    def report(job: Job, value: Any) -> bool:
        raise ConnectionError("the database is gone")

    with pytest.raises(ConnectionError, match="the database is gone"):
        carry(
            lambda: next(jobs, None),
            report,
            lambda job, outcome: pytest.fail(outcome.reason),
            lambda: True,
            1,
        )


def test_a_worker_persists_between_jobs_and_calls_and_ends_with_the_engine() -> None:
    with plugins.load_plugin("engine", "local")() as carry:
        first, _ = carry_all(
            carry, [Job(0, "tests.helpers.jobs:pid", None), Job(1, "tests.helpers.jobs:pid", None)]
        )
        second, _ = carry_all(carry, [Job(2, "tests.helpers.jobs:hear_the_terminal", None)])
    (pid,) = {o.value for _, o in first + second}
    assert pid != os.getpid()
    assert gone(pid)


@pytest.mark.parametrize(
    ("work", "argument", "reason", "cause"),
    [
        ("die", signal.SIGKILL, "worker ended by SIGKILL (out of memory?)", "memory"),
        pytest.param(
            *("die", signal.SIGSEGV, "worker ended by SIGSEGV", "died"), marks=pytest.mark.slow
        ),
        ("leave", 7, "worker ended with exit code 7", "died"),
    ],
)
def test_a_dead_worker_ends_its_job_as_lost_and_the_next_job_gets_a_new_one(
    local: RunJobs, work: str, argument: int, reason: str, cause: str
) -> None:
    ended, _ = carry_all(
        local,
        [Job(0, f"tests.helpers.jobs:{work}", argument), Job(1, "tests.helpers.jobs:count", 1)],
    )
    assert [(o.kind, o.reason, o.loss_cause) for _, o in ended] == [
        ("lost", reason, cause),
        ("done", "", ""),
    ]


def test_what_a_job_starts_is_as_if_typed_by_hand(local: RunJobs) -> None:
    ((_, outcome),), _ = carry_all(local, [Job(0, "tests.helpers.jobs:python_started", None)])
    assert outcome.value == (None, sys.path[0])


def test_several_workers_carry_jobs_at_once_and_share_the_cores(local: RunJobs) -> None:
    ended, _ = carry_all(
        local, [Job(i, "tests.helpers.jobs:pid", None) for i in range(6)], workers=2
    )
    assert len({o.value for _, o in ended}) == 2
    cores = len(os.sched_getaffinity(0))
    threads = Job(0, "tests.helpers.jobs:threads", None)
    ended = [carry_all(local, [threads], workers=n)[0] for n in (cores, 1)]  # then torch is loaded
    assert [o.value for ((_, o),) in ended] == [1, max(1, int(_process_settings.cores()))]


def test_when_time_is_up_a_busy_worker_ends_at_once_and_cleans_up(tmp_path: Path) -> None:
    held = tmp_path / "download.partial"
    ended: list[Outcome] = []
    heard: list[int] = []
    jobs = iter([Job(0, "tests.helpers.jobs:hang", str(held))])
    with plugins.load_plugin("engine", "local")() as carry:
        start = time.monotonic()
        carry(
            lambda: next(jobs, None),
            lambda job, value: not heard.append(value),
            lambda job, outcome: ended.append(outcome),
            lambda: not heard,
            1,
        )
        assert time.monotonic() - start < 30
    assert [(o.kind, o.loss_cause) for o in ended] == [("lost", "interrupted")]
    assert not held.exists()  # SIGTERM unwinds the worker, so that half a download does not stay
    assert gone(heard[0])


def test_idle_workers_die_for_free_and_leave_when_fewer_are_wanted(local: RunJobs) -> None:
    pids = [Job(i, "tests.helpers.jobs:pid", None) for i in range(4)]
    first, _ = carry_all(local, pids[:2], workers=2)
    both = {o.value for _, o in first}
    os.kill(max(both), signal.SIGKILL)  # idle, between two searches
    second, _ = carry_all(local, pids, workers=2)
    assert [o.kind for _, o in second] == ["done"] * 4
    assert max(both) not in {o.value for _, o in second}
    alone, _ = carry_all(local, pids[:1], workers=1)  # the winner's retraining
    living = {o.value for _, o in first + second if not gone(o.value)}
    assert living == {alone[0][1].value}


def test_a_worker_that_dies_as_it_gets_its_job_costs_it_nothing() -> None:
    pool = local_engine.WorkerPool(local_engine.SILENCE)
    try:
        job, ended = Job(7, "tests.helpers.jobs:count", 1), list[Outcome]()
        worker = pool.start_worker(1)
        worker.watch.alive()  # it has worked before
        os.kill(worker.process.pid or 0, signal.SIGKILL)
        worker.job = job  # given before the death was noticed
        while pool.workers:
            for message in pool.receive():
                pool.handle(*message, lambda job, value: True, lambda job, o: ended.append(o))
        assert (pool.undelivered, ended) == ([job], [])
        pool.run_jobs(
            lambda: None, lambda job, value: True, lambda job, o: ended.append(o), lambda: True, 1
        )
        assert [o.value for o in ended] == [1]
    finally:
        local_engine.stop_workers(pool.workers)


def test_a_value_that_cannot_be_read_here_fails_its_job_alone(local: RunJobs) -> None:
    jobs = [Job(0, "tests.helpers.jobs:unreadable", None), Job(1, "tests.helpers.jobs:count", 1)]
    ended, _ = carry_all(local, jobs)
    assert [(o.kind, o.reason) for _, o in ended] == [
        ("failed", "ImportError: no module named yours"),
        ("done", ""),
    ]


def test_workers_are_ended_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that do not listen to SIGTERM."""
    monkeypatch.setattr(local_engine, "STOP_TIMEOUT", 0.7)
    pool = local_engine.WorkerPool(local_engine.SILENCE)
    jobs = iter([Job(i, "tests.helpers.jobs:deaf", None) for i in range(3)])
    heard: list[int] = []

    def report(job: Job, value: int) -> bool:
        heard.append(value)
        return True

    def go_on() -> bool:
        stopped.append(time.monotonic())
        return len(heard) < 3

    stopped: list[float] = []
    pool.run_jobs(lambda: next(jobs, None), report, lambda job, o: None, go_on, 3)
    assert len(heard) == 3 and all(gone(pid) for pid in heard)
    assert time.monotonic() - stopped[-1] < 2 * 0.7


# -- workers that fall silent


@pytest.fixture(scope="module")
def strict() -> Iterator[RunJobs]:
    """The local engine, whose workers may be silent for a second."""
    with plugins.load_plugin("engine", "local")(silence=1.0) as carry:
        yield carry


def test_workers_that_stop_also_amid_a_message_or_hang_are_given_up_and_never_come_back(
    strict: RunJobs,
) -> None:
    jobs = [
        Job(0, "tests.helpers.jobs:stop", 5),
        Job(1, "tests.helpers.jobs:stop_amid_a_message", None),
        Job(2, "tests.helpers.jobs:wait", None, stall=0.5),
    ]
    more = [
        Job(3, "tests.helpers.jobs:count", 2),
        Job(4, "tests.helpers.jobs:wait", 1.2),
    ]  # stall: None
    ended, heard = carry_all(strict, jobs + more, workers=3)
    assert {job.number: (o.kind, o.loss_cause, o.reason, o.value) for job, o in ended} == {
        0: ("lost", "silent", "worker silent for 1 s", None),
        1: ("lost", "silent", "worker silent for 1 s", None),
        2: ("lost", "stalled", "no progress for 0.5 s (engine.stall)", None),
        3: ("done", "", "", 2),
        4: ("done", "", "", None),
    }
    pids = [value for value in heard if value > 2]
    assert len(pids) == 4 and len(heard) == 6  # nothing from those that were given up
    assert sum(gone(pid) for pid in pids) == 3


def test_a_worker_that_loads_a_large_module_is_not_taken_for_a_silent_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While torch is loaded, no other thread of a worker runs: here a call that keeps the GIL."""
    (tmp_path / "large_module.py").write_text(
        "import ctypes, time\ntime.sleep(0.2)\nctypes.PyDLL(None).usleep(2_000_000)\ndef job(*_): return 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with local_engine.run(silence=1.0) as carry:
        ((_, outcome),), _ = carry_all(carry, [Job(0, "large_module:job", None)])
    assert outcome == Outcome("done", 7)


def test_how_long_a_job_may_report_nothing() -> None:
    @dataclass
    class Epoch:
        seconds: float

    def limit(stall: Stall, *events: float | Epoch) -> float | None:
        """How long a job waits for its next report before it is given up, after these waits and reports."""
        watch = Watch("worker", math.inf, stall)
        for event in events:
            if isinstance(event, Epoch):
                watch.reported(event)
            else:
                assert watch.passed(event) is None
        timeout = watch.report_timeout()
        if timeout is not None:
            assert watch.passed(timeout - watch.waiting) is None
            assert getattr(watch.passed(1.0), "loss_cause", "") == "stalled"
        return timeout

    hour = 3600.0
    assert limit(None, 1e9) is None
    assert limit("auto", 1e9) is None  # a first epoch, a cache that is filled
    assert limit("auto", 60.0, Epoch(1.0), 1.0, Epoch(1.0)) == hour
    assert limit("auto", 900.0, Epoch(1.0), 2.0) == 2.5 * hour  # the first takes longest
    assert limit("auto", 1.0, Epoch(2 * hour)) == 20 * hour  # of an earlier attempt, told again
    assert limit(30.0, 29.0) == 30.0 and limit(30.0, 29.0, Epoch(500.0), 29.0) == 30.0
    silent = Watch("worker", 10.0, None, starting=True)
    assert silent.passed(99.0) is None  # it may be reading torch from a slow disk
    silent.alive()
    assert getattr(silent.passed(11.0), "loss_cause", "") == "silent"


def test_what_engine_stall_says() -> None:
    """The winner's training ends with the export, of which nobody knows how long it takes."""
    said = {
        stall: [stall_of(EngineSettings(stall=stall), paced=paced) for paced in (True, False)]
        for stall in ("auto", "never", "30m")
    }
    assert said == {"auto": ["auto", None], "never": [None, None], "30m": [1800.0, 1800.0]}
    with pytest.raises(ValueError, match="or auto, or never"):
        EngineSettings(stall="soon")


def test_the_inline_engine_says_that_it_cannot_give_up_a_training() -> None:
    warnings: list[str] = []
    for stall in ("auto", "never", "30m"):
        with plugins.load_plugin("engine", "inline")(EngineSettings(stall=stall), warnings.append):
            pass
    assert warnings == [
        "engine.stall: 30m has no effect with engine.name: inline, which cannot end a training that hangs"
    ]


@pytest.mark.slow
def test_a_worker_that_computes_without_a_word_is_not_taken_for_a_silent_one(
    strict: RunJobs,
) -> None:
    ended, _ = carry_all(
        strict,
        [
            Job(0, "tests.helpers.jobs:pid", None),
            Job(1, "tests.helpers.jobs:sleep", 2.5),
            Job(2, "tests.helpers.jobs:pid", None),
        ],
    )
    assert [o.kind for _, o in ended] == ["done"] * 3 and len({o.value for _, o in ended}) == 1


@pytest.mark.slow
def test_a_coordinator_that_was_busy_for_long_takes_nobody_for_silent(strict: RunJobs) -> None:
    def report(job: Job, value: Any) -> bool:
        heard.append(value)
        if len(heard) == 1:
            time.sleep(2.5)  # no look in this time
        return True

    jobs, heard = iter([Job(0, "tests.helpers.jobs:ticks", 4)]), list[Any]()
    ended: list[Outcome] = []
    strict(
        lambda: next(jobs, None),
        report,
        lambda job, outcome: ended.append(outcome),
        lambda: True,
        1,
    )
    assert [o.kind for o in ended] == ["done"] and len(heard) == 4


@pytest.mark.slow
def test_a_zombie_whose_pipe_is_closed_stops_itself() -> None:
    worker = local_engine.start_worker(0, 1.0)
    worker.pipe.send((Job(0, "tests.helpers.jobs:ticks", 1000), 1))
    while worker.pipe.recv()[0] != "report":
        pass
    os.kill(worker.process.pid or 0, signal.SIGSTOP)
    worker.pipe.close()  # its job has gone to another
    os.kill(worker.process.pid or 0, signal.SIGCONT)
    worker.process.join(20)
    assert worker.process.exitcode == 0


COORDINATOR = """
from tuner.config import plugins
from tuner.jobs import Job
if __name__ == "__main__":
    def report(job, value):
        print(value[0], flush=True)
        return True
    jobs, ended = iter([Job(0, "tests.helpers.jobs:ticks", 15)]), []
    with plugins.load_plugin("engine", "local")(silence=2.0) as carry:
        carry(lambda: next(jobs, None), report, lambda job, outcome: ended.append(outcome.kind), lambda: True, 1)
    print(*ended)
"""


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_a_coordinator_that_was_stopped_finds_its_workers_waiting(
    both: bool, tmp_path: Path
) -> None:
    """Stopped for longer than a worker may be silent; `both`: the worker too, and it goes on a little later."""
    (tmp_path / "coordinator.py").write_text(COORDINATOR)
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "coordinator.py"],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        stopped = [process.pid, worker] if both else [process.pid]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
        *said, end = process.stdout.read().splitlines()
    assert (
        end == "done" and said == [str(worker)] * 14
    )  # each report once, all from the same worker


@pytest.mark.slow
def test_a_stopped_worker_does_not_outlive_its_coordinator(tmp_path: Path) -> None:
    (tmp_path / "coordinator.py").write_text(COORDINATOR)
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "coordinator.py"],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        os.kill(worker, signal.SIGSTOP)
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while not gone(worker) and time.monotonic() < end:
            time.sleep(0.1)
        assert gone(worker)


def test_what_is_called_on_an_actor_is_there() -> None:
    """mypy does not see through Ray's handles, and the tests that start a cluster are slow."""
    source = "".join(p.read_text() for p in Path(local_engine.__file__).parent.glob("*.py"))
    called = set(re.findall(r"actor\.(\w+)\.(?:remote|options)\(", source))
    assert len(called) > 5 and called <= set(dir(RayWorker))
