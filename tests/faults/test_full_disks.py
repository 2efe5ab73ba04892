"""Disks that are full for real, by a limit on the size of files and by a small file system: what is said, what is kept, and that it goes on."""

import contextlib
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL, CommandResult
from tests.helpers.forked_commands import ForkServer, forks
from tuner import manifest

ROOT = Path(__file__).parents[2]
STUDY = (
    SMALL.replace("examples: 60", "examples: 120")
    .replace("trials: 4", "trials: 3")
    .replace("device: cpu}", "device: cpu, cache: always}")
)
Tuner = Callable[..., CommandResult]


def limited(size: int, *words: str) -> None:
    """The command line, in a process that can write no file larger than `size`."""
    from tuner.cli import main

    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, size)
    )  # Python ignores SIGXFSZ, so that EFBIG comes
    sys.argv = ["tuner", *words]
    main()


@pytest.fixture(scope="module")
def forking() -> Iterator[ForkServer]:
    with forks() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(STUDY)
    return tmp_path


def sound(folder: Path) -> list[tuple[Any, ...]]:
    """The trials of a database that is whole; nothing half-written lies beside it."""
    assert [str(path) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old")] == []
    if not (folder / "studies/small/study.db").exists():
        return []
    with contextlib.closing(sqlite3.connect(folder / "studies/small/study.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not database.execute("select 1 from sqlite_master where name = 'trials'").fetchone():
            return []
        return database.execute(
            "select number, state from trials where state in ('COMPLETE', 'PRUNED') order by number"
        ).fetchall()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "ready", "more", "place"),
    [
        (200_000, [], [], "home/images/"),
        (100_000, ["check"], [], "studies/small/study.db"),
        (
            320_000,
            ["run", "search.trials=1", "search.retrain=false"],
            ["recipe.freeze_depth=1", "engine.cache=always"],
            "home/activations/",
        ),
        (1_500_000, [], ["recipe.freeze_depth=0"], "studies/small/checkpoints/"),
        (
            1_500_000,
            [],
            ["recipe.freeze_depth=5"],
            "studies/small/export",
        ),  # a head: its checkpoints are small
    ],
    ids=["images", "database", "activations", "checkpoints", "export"],
)
def test_26_a_file_that_may_not_grow_is_named_nothing_is_lost_and_the_same_command_goes_on(
    size: int, ready: list[str], more: list[str], place: str, forking: ForkServer, folder: Path
) -> None:
    words = ["run", "small.yaml", *more]
    if ready:  # what comes before is there already
        code, said = forking.tuner(folder, ready[0], "small.yaml", *ready[1:], *more)
        assert code == 0, said
    if "activations" in place:
        for path in (folder / "home/activations").iterdir():
            subprocess.run(["rm", "-r", str(path)], check=True)
    before = sound(folder)
    code, said = forking.call_function(folder, "tests.faults.test_full_disks:limited", size, *words)
    errors = [line for line in said.splitlines() if line.startswith("tuner: error: ")]
    assert code == 4 and len(errors) == 1 and "Traceback" not in said, said
    assert errors[0].startswith("tuner: error: disk full while writing ") and place in errors[0], (
        said
    )
    if place.startswith("home"):
        assert " MB needed: File too large)" in errors[0]
    assert sound(folder)[: len(before)] == before
    code, said = forking.tuner(folder, *words)
    assert code == 0, said
    assert (
        len(sound(folder)) == 3
        and manifest.read_export(folder / "studies/small/export") is not None
    )


# -- a small file system


@contextlib.contextmanager
def tmpfs(place: Path, megabytes: int) -> Iterator[tuple[Path, list[str]]]:
    """A file system of its own size, seen by nobody else: its folder, and what begins a command that shall see it at `place`."""
    place.mkdir()
    mount = f"mount -t tmpfs -o size={megabytes}m tuner '{place}' && echo ready && exec sleep 600"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", mount],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != "ready\n":
                pytest.skip("a file system can be mounted by root only")
            inside = [
                "nsenter",
                "-t",
                str(holder.pid),
                "-m",
                "sh",
                "-c",
                'cd "$0" && exec "$@"',
                str(place),
            ]
            yield Path(f"/proc/{holder.pid}/root{place}"), inside
        finally:
            holder.kill()


def test_26_too_little_room_is_said_before_anything_is_begun(tuner: Tuner, small: Path) -> None:
    with tmpfs(small.parent / "disk", 20) as (disk, _):
        said = tuner("run", small, "--studies", disk / "studies")
        assert said.code == 4 and said.err.count("\n") == 1
        assert (
            f"disk: {disk / 'studies'} has 2" in said.err
            and "MB free, but 108 MB are needed (three times the model's size" in said.err
        )
        assert list(disk.iterdir()) == []


def copied(disk: Path, to: Path) -> Path:
    """A small file system's files where SQLite, which resolves /proc/N/root, finds them."""
    return Path(shutil.copytree(disk, to))


@pytest.mark.slow
def test_26_a_disk_that_fills_up_while_a_study_runs(small: Path) -> None:
    with tmpfs(small.parent / "disk", 140) as (disk, enter):
        (disk / "small.yaml").write_text(
            small.read_text().replace("high: 3}", "high: 6}").replace("trials: 4", "trials: 10")
        )
        command = [
            *enter,
            "env",
            f"PYTHONPATH={ROOT}",
            f"TUNER_HOME={small.parent}/disk/home",
            sys.executable,
            "-u",
            "-m",
            "tuner",
            "run",
        ]
        command += ["small.yaml", "search.sampler=random", "search.pruner=none"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("#1 "):
                break
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        _, err = process.communicate(timeout=120)
        assert (
            process.returncode == 4 and err.count("tuner: error: ") == 1 and "Traceback" not in err
        ), err
        assert "disk full while writing" in err, err
        (disk / "filler").unlink()
        assert len(sound(copied(disk, small.parent / "before"))) >= 2
        again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert again.returncode == 0, again.stderr
        after = copied(disk, small.parent / "after")
        assert (
            len(sound(after)) == 10
            and manifest.read_export(after / "studies/small/export") is not None
        )


# -- memory


LEAKY = """
import torch
from torch import nn

kept = []


class Leaky(nn.Flatten):
    def forward(self, x):
        kept.append(torch.ones(500_000))
        return super().forward(x)


def build(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Leaky(), nn.Linear(16, outputs))
"""


def memory(pid: int) -> float:
    """Megabytes that are this process's alone, or its share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss_Anon:"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18_slim", "{name: 'leaky:build'}"])
def test_memory_returns_to_where_it_was_trial_after_trial(model: str, small: Path) -> None:
    (small.parent / "leaky.py").write_text(LEAKY)
    words = [
        f"model={model}",
        "engine.name=local",
        "search.trials=14",
        "recipe.freeze_depth=2",
        "recipe.epochs=2",
        "recipe.optimizer=adamw",
    ]
    words += [
        "recipe.momentum=0.9",
        "search.sampler=random",
        "search.pruner=none",
        "search.retrain=false",
        "--json",
    ]
    environment = f"PYTHONPATH={ROOT}:{small.parent}"
    command = ["env", environment, sys.executable, "-u", "-m", "tuner", "run", str(small), *words]
    found = []
    with subprocess.Popen(command, cwd=small.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"event": "trial"'):
                time.sleep(0.05)
                workers = subprocess.run(
                    ["pgrep", "-P", str(process.pid), "-f", "spawn_main"],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                with contextlib.suppress(
                    OSError, StopIteration
                ):  # after the last trial the worker may be gone
                    found += [memory(int(pid)) for pid in workers.stdout.split()]
    assert process.returncode == 0 and len(found) >= 10, found
    growth = max(found[5:]) - found[4]
    assert growth > 60 if "leak" in model else growth < 20, found
