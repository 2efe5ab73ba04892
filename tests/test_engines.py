"""Every engine carries the same jobs to the same ends; the local one outlives its workers."""

import contextlib
import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner import plugins
from tuner.jobs import Carry, Job, Outcome
from tuner.run import Engine

ENGINES = [pytest.param(name, marks=pytest.mark.slow) if name == "ray" else name for name in plugins.names("engine")]
SETTINGS = {"ray": Engine(name="ray", address="local")}


def carry_all(carry: Carry, jobs: list[Job], answer: bool = True, workers: int = 1) -> tuple[list[tuple[Job, Outcome]], list[Any]]:
    ended: list[tuple[Job, Outcome]] = []
    heard: list[Any] = []
    queue = iter(jobs)

    def report(job: Job, value: Any) -> bool:
        heard.append(value)
        return answer

    carry(lambda: next(queue, None), report, lambda job, outcome: ended.append((job, outcome)), lambda: True, workers)
    return ended, heard


@pytest.fixture(scope="module", params=ENGINES)
def carry(request: pytest.FixtureRequest) -> Iterator[Carry]:
    if request.param == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with plugins.attribute("engine", request.param)(SETTINGS.get(request.param, Engine())) as carry:
        yield carry


@pytest.fixture(scope="module")
def local() -> Iterator[Carry]:
    with plugins.attribute("engine", "local")() as carry:
        yield carry


def test_an_engine_returns_values_and_carries_reports_and_answers(carry: Carry) -> None:
    ended, heard = carry_all(carry, [Job(0, "tests.works:count", 3)])
    assert [o.value for _, o in ended] == [3] and heard == [1, 2, 3]
    ended, heard = carry_all(carry, [Job(0, "tests.works:count", 3)], answer=False)
    assert [o.value for _, o in ended] == [1] and heard == [1]


def test_what_a_job_raises_becomes_an_outcome_and_the_next_job_runs(carry: Carry) -> None:
    ended, _ = carry_all(
        carry, [Job(0, "tests.works:fail", "no such layer"), Job(1, "tests.works:refuse", "gone"), Job(2, "tests.works:count", 1)]
    )
    (_, failed), (_, refused), (_, done) = ended
    assert (failed.kind, failed.reason) == ("failed", "ValueError: no such layer") and "Traceback" in failed.trace
    assert (refused.kind, refused.reason, refused.problems, refused.code) == ("refused", "DataError", ("gone", "and more"), 3)
    assert done.value == 1


def test_what_fails_in_the_coordinator_is_not_taken_for_a_failure_of_the_job(carry: Carry) -> None:
    jobs = iter([Job(0, "tests.works:count", 1)])

    def report(job: Job, value: Any) -> bool:
        raise ConnectionError("the database is gone")

    with pytest.raises(ConnectionError, match="the database is gone"):
        carry(lambda: next(jobs, None), report, lambda job, outcome: pytest.fail(outcome.reason), lambda: True, 1)


def test_a_worker_persists_between_jobs_and_calls(local: Carry) -> None:
    first, _ = carry_all(local, [Job(0, "tests.works:pid", None), Job(1, "tests.works:pid", None)])
    second, _ = carry_all(local, [Job(2, "tests.works:pid", None)])
    pids = {o.value for _, o in first + second}
    assert len(pids) == 1 and os.getpid() not in pids


@pytest.mark.parametrize(
    ("work", "argument", "reason"),
    [
        ("die", signal.SIGKILL, "worker ended by SIGKILL (out of memory?)"),
        ("die", signal.SIGSEGV, "worker ended by SIGSEGV"),
        ("leave", 7, "worker ended with exit code 7"),
    ],
)
def test_a_dead_worker_ends_its_job_as_lost_and_the_next_job_gets_a_new_one(local: Carry, work: str, argument: int, reason: str) -> None:
    ended, _ = carry_all(local, [Job(0, f"tests.works:{work}", argument), Job(1, "tests.works:count", 1)])
    assert [(o.kind, o.reason) for _, o in ended] == [("lost", reason), ("done", "")]


def test_several_workers_carry_jobs_at_once_and_share_the_cores(local: Carry) -> None:
    ended, _ = carry_all(local, [Job(i, "tests.works:pid", None) for i in range(6)], workers=2)
    assert len({o.value for _, o in ended}) == 2
    ended, _ = carry_all(local, [Job(0, "tests.works:torch_loaded", None)], workers=len(os.sched_getaffinity(0)))
    assert ended[0][1].value == (True, 1)


def test_when_time_is_up_a_busy_worker_ends_at_once_and_cleans_up(tmp_path: Path) -> None:
    held = tmp_path / "download.partial"
    ended: list[Outcome] = []
    heard: list[int] = []
    jobs = iter([Job(0, "tests.works:hang", str(held))])
    with plugins.attribute("engine", "local")() as carry:
        start = time.monotonic()
        carry(
            lambda: next(jobs, None),
            lambda job, value: not heard.append(value),
            lambda job, outcome: ended.append(outcome),
            lambda: not heard,
            1,
        )
        assert time.monotonic() - start < 30
    assert [(o.kind, o.reason) for o in ended] == [("lost", "interrupted")]
    assert not held.exists()  # SIGTERM unwinds the worker, so that half a download does not stay
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)


def test_leaving_the_engine_leaves_no_process() -> None:
    with plugins.attribute("engine", "local")() as carry:
        ended, _ = carry_all(carry, [Job(0, "tests.works:pid", None)])
    with pytest.raises(ProcessLookupError), contextlib.suppress(PermissionError):
        os.kill(ended[0][1].value, 0)
