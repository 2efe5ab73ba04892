"""Studies whose processes are killed by SIGKILL go on inside the trial: same trials, same winner, and nothing trained twice but one epoch."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tuner as package
from tests.conftest import SMALL
from tests.helpers.forked_commands import ForkServer, forks
from tuner.files import checkpoint_files
from tuner.training import checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(package.__file__).parents[1]
TRIALS, EPOCHS = 3, 4
STUDY = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32}
model: {name: "tests.helpers.counting_model:build_counted_model"}
recipe:
  optimizer: [sgd, adamw]
  lr: {low: 1e-3, high: 1e-1, log: true}
  freeze_depth: [0, 1]
  epochs: 4
  schedule: cosine
  warmup: 0.2
  batch_size: 16
  head: fresh
search: {trials: 3, seed: 0, sampler: random, pruner: none, retries: 9}
engine: {name: local, device: cpu}
export: [safetensors]
"""


class Studies:
    """Studies in a folder of their own, each with a file of lines, one an epoch begun."""

    def __init__(self, folder: Path, forking: ForkServer) -> None:
        self.folder, self.forking = folder, forking
        (folder / "study.yaml").write_text(STUDY)

    def run(self, name: str, *words: str, **environ: str) -> int:
        """The exit code of `tuner run`, minus the signal where it was killed."""
        environ = {"PYTHONPATH": str(ROOT), "COUNTED": str(self.lines(name)), **environ}
        code, self.said = self.forking.tuner(
            self.folder, "run", "study.yaml", f"search.name={name}", *words, **environ
        )
        return code

    def lines(self, name: str) -> Path:
        return self.folder / f"{name}.lines"

    def begun(self, name: str) -> int:
        return len(self.lines(name).read_text().splitlines())

    def place(self, name: str) -> Path:
        return self.folder / "studies" / name

    def trials(self, name: str) -> list[tuple[Any, ...]]:
        """Parameters, state, value, epoch scores and best epoch of those that ended, in the order of their draws."""
        import optuna

        from tuner.search import storage

        study = optuna.load_study(
            study_name=name, storage=storage.open_storage(None, self.place(name))
        )
        assert all(t.state.is_finished() for t in study.trials)
        ended = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
        return [
            (t.params, t.state.name, t.value, t.intermediate_values, t.user_attrs["best_epoch"])
            for t in ended
        ]

    def winner(self, name: str) -> dict[str, Any]:
        manifest = json.loads((self.place(name) / "export" / "manifest.json").read_text())
        return {
            "weights": manifest["files"]["model.safetensors"],
            "scores": manifest["scores"],
            "run": manifest["run_digest"],
        }

    def check(self, name: str, more: int) -> None:
        """It ended as the undisturbed study, with at most `more` epochs begun again."""
        assert self.trials(name) == self.trials("calm") and self.winner(name) == self.winner("calm")
        assert self.begun("calm") <= self.begun(name) <= self.begun("calm") + more
        assert not list(self.folder.rglob("*.tmp"))
        with sqlite3.connect(self.place(name) / "study.db") as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.close()


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studies]:
    with forks() as forking:
        found = Studies(tmp_path_factory.mktemp("resume"), forking)
        assert found.run("calm") == 0, found.said
        assert found.begun("calm") >= TRIALS * EPOCHS + 1
        yield found


@pytest.mark.parametrize(
    ("who", "number"),
    [("worker", 7), ("coordinator", 7), ("both", 14)],
)
def test_27_killed_and_continued_equals_undisturbed_and_one_epoch_is_trained_again(
    who: str, number: int, studies: Studies
) -> None:
    """In the third epoch of the second trial, and while the winner is retrained."""
    name = f"{who}-{number}"
    code = studies.run(name, KILL=f"{who}:{number}")
    if who == "worker":
        assert code == 0, studies.said
    else:
        assert code == -9
        assert studies.run(name) == 0, studies.said
    studies.check(name, 1)
    kept = studies.place(name) / checkpoint_files.CHECKPOINTS_FOLDER
    assert sorted(p.name for p in kept.iterdir()) == ["0", "1", "2"]  # the winner's own are gone
    assert all([q.name.partition("-")[0] for q in p.iterdir()] == ["best"] for p in kept.iterdir())


def test_27_killed_again_and_again(studies: Studies) -> None:
    for number in (3, 8, 9):
        assert studies.run("again", KILL=f"both:{number}") == -9, studies.said
    assert studies.run("again") == 0, studies.said
    studies.check("again", 3)


@pytest.mark.parametrize("how", ["torn", "absent"])
def test_a_machine_that_dies_loses_what_was_not_synced(how: str, studies: Studies) -> None:
    assert studies.run(how, KILL="both:8") == -9
    (folder,) = [
        p
        for p in (studies.place(how) / checkpoint_files.CHECKPOINTS_FOLDER).iterdir()
        if checkpoint_files.list_checkpoints(p)
    ]
    newest, before = checkpoint_files.list_checkpoints(folder)
    for path in folder.glob(".*.tmp"):
        path.unlink()
    content = newest.read_bytes()
    if how == "absent":
        newest.unlink()
    else:
        newest.write_bytes(content[: len(content) // 2])
    assert studies.run(how) == 0, studies.said
    lost = (
        3
        - len(
            checkpoints.read_header(before.read_bytes() if before.exists() else content)["epochs"]
        )
        if before.exists()
        else 3
    )
    assert (
        "damaged (its SHA-256 is not that of its name); left aside; going on from epoch"
        in studies.said
    ) == (how != "absent")
    studies.check(how, 1 + lost)


@pytest.mark.parametrize("point", ["written", "renamed"])
def test_27_killed_while_a_checkpoint_is_written(point: str, studies: Studies) -> None:
    """Each worker dies when it writes for the ninth time: in the second trial, and in what is left, if that much is."""
    assert studies.run(point, TUNER_CRASH_AT=f"checkpoint.{point}:9") == 0, studies.said
    studies.check(point, 2)
    with sqlite3.connect(studies.place(point) / "study.db") as database:
        reasons = database.execute(
            "select value_json from trial_user_attributes where key = 'tuner:reason'"
        ).fetchall()
    database.close()
    assert ('"worker ended with exit code 137"',) in reasons


def test_folds_continue_too(studies: Studies) -> None:
    assert studies.run("folds-calm", "data.folds=2", "search.trials=1") == 0, studies.said
    assert studies.run("folds", "data.folds=2", "search.trials=1", KILL="both:6") == -9
    assert studies.run("folds", "data.folds=2", "search.trials=1") == 0, studies.said
    assert studies.trials("folds") == studies.trials("folds-calm") and studies.winner(
        "folds"
    ) == studies.winner("folds-calm")
    assert studies.begun("folds-calm") < studies.begun("folds") <= studies.begun("folds-calm") + 1


def test_26_a_full_disk_in_a_checkpoint_ends_with_4_and_with_space_again_it_finishes(
    studies: Studies,
) -> None:
    narrow = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, 2_500_000)); sys.argv[0] = 'tuner'; "
    narrow += "runpy.run_module('tuner', run_name='__main__')"
    text = (
        SMALL.replace("inline", "local")
        .replace("{low: 0, high: 5}", "0")
        .replace("{low: 1, high: 3}", "2")
    )
    (studies.folder / "small.yaml").write_text(text)
    words = [
        "run",
        "small.yaml",
        "data.examples=300",
        "search.trials=1",
        "engine.cache=never",
        "recipe.head=fresh",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", narrow, *words],
        cwd=studies.folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 4, said.stdout + said.stderr
    assert (
        "tuner: error: disk full while writing" in said.stderr
        and "checkpoints/0/" in said.stderr
        and "MB needed" in said.stderr
    )
    assert not list(studies.place("small").rglob("*.tmp"))
    again = subprocess.run(
        [sys.executable, "-m", "tuner", *words],
        cwd=studies.folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
