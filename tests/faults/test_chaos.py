"""Seeded blows, SIGKILL or SIGSTOP, to coordinator and workers of real searches: nothing is lost, doubled or left behind."""

import contextlib
import fcntl
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.conftest import SMALL
from tests.helpers.study_contents import ended_trials
from tuner.dashboard import server
from tuner.search import history

BUDGET = 6
ROUNDS = 5  # of each case
PATIENCE = 240.0  # seconds for whatever is waited for
DEAD_WORKER = (
    3  # the exit code when a worker dies while data and weights are read, or the winner is made
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed study named calm."""
    place = tmp_path_factory.mktemp("chaos")
    text = (
        SMALL.replace("inline, device: cpu", "local, device: cpu, cache: always")
        .replace("examples: 60", "examples: 300")
        .replace("low: 1, high: 3", "low: 3, high: 6")
        .replace("trials: 4", f"trials: {BUDGET}, retries: 10")
    )
    (place / "chaos.yaml").write_text(text)
    with Search(place, "calm", 1) as calm:
        calm.start()
        assert calm.process.wait(PATIENCE) == 0
    return place


class Search:
    """One study, and the commands that are given for it, one after another until it is done."""

    def __init__(self, place: Path, name: str, workers: int) -> None:
        self.place, self.name, self.workers = place, name, workers
        self.folder = place / "studies" / name
        self.outputs: list[Path] = []
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        """A test that fails leaves nothing running either."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def start(self) -> None:
        words = [f"search.name={self.name}", f"engine.workers={self.workers}", "--json"]
        self.outputs.append(self.place / f"{self.name}.{len(self.outputs)}.jsonl")
        environ = os.environ | {
            "TUNER_HOME": str(self.place / f"home-{self.name}"),
            "OMP_NUM_THREADS": "1",
        }
        with open(self.outputs[-1], "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tuner", "run", "chaos.yaml", *words],
                cwd=self.place,
                env=environ,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def events(self, kind: str, output: Path) -> list[dict[str, Any]]:
        found = []
        for line in output.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of who was killed
                event = json.loads(line)
                found += [event] if event["event"] == kind else []
        return found

    def reaches(self, epochs: int) -> bool:
        """Waits until the running command has told of so many epochs; False: it ended before."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            if len(self.events("epoch", self.outputs[-1])) >= epochs:
                return True
            time.sleep(0.02)
        assert self.process.poll() is not None, "nothing happens any more"
        return False

    def crew(self) -> list[int]:
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "spawn_main"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        return [int(pid) for pid in found]

    def left(self) -> list[int]:
        """The processes of the last command."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                session = path.read_text().rpartition(")")[2].split()[3]
                alive = (
                    path.with_name("cmdline").read_bytes() != b""
                )  # a dying process has no memory left
                found += (
                    [int(path.parent.name)] if int(session) == self.process.pid and alive else []
                )
        return found

    def over(self) -> None:
        """Waits for the end of the last command and of all it started."""
        end = time.monotonic() + 20
        self.process.wait(PATIENCE)
        while self.left() and time.monotonic() < end:
            time.sleep(0.05)
        assert self.left() == [], "a process outlives its coordinator"


def blow(search: Search, chance: random.Random) -> str | None:
    """One blow at a moment by chance; None: the search had ended. Says what was done."""
    epochs = chance.choice([0, 1, 2, 3, 5, 8])
    wait = chance.uniform(0.0, 0.5 if epochs else 5.0)
    who = chance.choice(
        [("coordinator",), ("worker",), ("worker", "coordinator"), ("coordinator", "worker")]
    )
    signals = [chance.choice([signal.SIGKILL, signal.SIGSTOP]) for _ in who]
    pause, pick = chance.uniform(0.1, 2.0), chance.random()
    if not search.reaches(epochs):
        return None
    time.sleep(wait)
    crew = search.crew()
    while "worker" in who and not crew and search.process.poll() is None:
        time.sleep(0.02)
        crew = search.crew()
    if search.process.poll() is not None:
        return None
    worker = crew[int(pick * len(crew))] if crew else 0
    pids = [search.process.pid if name == "coordinator" else worker for name in who]
    for pid, number in zip(pids, signals, strict=True):
        with contextlib.suppress(ProcessLookupError):  # its coordinator has just been killed
            os.kill(pid, number)
    time.sleep(pause)
    for pid, number in zip(pids, signals, strict=True):
        if number == signal.SIGSTOP:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return ", ".join(f"{number.name} to {name}" for name, number in zip(who, signals, strict=True))


def check(search: Search) -> None:
    """What must hold at any moment."""
    if not (search.folder / "space.yaml").exists():
        return  # killed before there was a study
    with contextlib.closing(
        sqlite3.connect(f"file:{search.folder}/study.db?mode=ro", uri=True)
    ) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    study = optuna.load_study(
        study_name=search.name, storage=server.open_read_only(None, search.folder)
    )
    draws = history.proposal_numbers(study)
    counted = Counter(draws[t.number] for t in study.trials if counts(t))
    assert max(counted.values(), default=0) <= 1, "a draw was counted twice"
    assert counted.total() <= BUDGET
    assert sum(t.state == optuna.trial.TrialState.RUNNING for t in study.trials) <= search.workers
    told = Counter(
        event["number"] for output in search.outputs for event in search.events("trial", output)
    )
    assert max(told.values(), default=0) <= 1, "a trial was told twice"


def counts(trial: optuna.trial.FrozenTrial) -> bool:
    return (
        trial.state.name in ("COMPLETE", "PRUNED") or history.FAILED_PERMANENTLY in trial.user_attrs
    )


def done(search: Search) -> None:
    """What must hold at the end."""
    check(search)
    study = optuna.load_study(
        study_name=search.name, storage=server.open_read_only(None, search.folder)
    )
    draws = history.proposal_numbers(study)
    assert all(t.state.is_finished() for t in study.trials)
    assert sorted(draws[t.number] for t in study.trials if counts(t)) == list(range(BUDGET))
    assert not list(search.folder.rglob("*.tmp"))
    with open(search.folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if search.workers == 1:
        assert ended_trials(search.place, search.name) == ended_trials(search.place, "calm")
        assert winner(search.folder) == winner(search.place / "studies/calm")


def winner(folder: Path) -> tuple[Any, ...]:
    """Scores and weights of what was published, the weights by their digest."""
    manifest = json.loads((folder / "export/manifest.json").read_text())
    return manifest["scores"], manifest["files"]["model.safetensors"]


def carry_through(search: Search, chance: random.Random, most: int) -> int:
    """One study to its end, under so many blows at most; how many fell."""
    fell = 0
    search.start()
    while True:
        struck = blow(search, chance) if fell < most else None
        if struck is not None:
            fell += 1
            if "SIGKILL to coordinator" in struck:
                search.over()
            check(search)
            if search.process.poll() is not None and search.process.returncode < 0:
                search.start()
            continue
        search.over()
        said = search.outputs[-1].read_text()
        if search.process.returncode == 0:
            return fell
        assert search.process.returncode == DEAD_WORKER and "a worker died" in said, said
        search.start()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "workers"), [(0, 1), (2, 2)])
def test_no_blow_loses_doubles_or_leaves_anything(seed: int, workers: int, place: Path) -> None:
    chance = random.Random(seed)
    left, number = ROUNDS, 0
    while left:
        with Search(place, f"chaos-{seed}-{number}", workers) as search:
            left -= carry_through(search, chance, left)
            done(search)
        number += 1
