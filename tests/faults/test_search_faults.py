"""Faults 20 to 23, 26 to 28 and 31 to 34: what the command line says, its exit code, and what is kept."""

import errno
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from tests.conftest import CommandResult
from tuner.search.write_buffer import BufferedStorage
from tuner.training import finalization

Tuner = Callable[..., CommandResult]


def finished(folder: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "study.db") as database:
        found = database.execute("select number, state from trials order by number").fetchall()
    database.close()
    return found


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgres://u:secret@h/db", "postgresql://, not postgres://"),
        ("foo", "storage: foo cannot be opened"),
        ("nodialect://h/db", "cannot be opened"),
    ],
)
def test_20_a_storage_url_that_cannot_be_used(
    url: str, message: str, tuner: Tuner, small: Path
) -> None:
    said = tuner("run", small, f"storage='{url}'")
    assert said.code in (2, 4) and message in said.err and "secret" not in said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe.lr.high=0.5", "recipe.lr.high=0.1, this file has 0.5"),
        ("recipe.batch_size=8", "recipe.batch_size=16, this file has 8"),
        ("search.metric=f1", "search.metric=accuracy, this file has f1"),
        ("search.seed=1", "search.seed=0, this file has 1"),
        ("data.examples=90", "data.examples=60, this file has 90"),
        ("model.weights=none", "model.weights=bundled, this file has none"),
    ],
)
def test_21_a_study_of_another_space_metric_or_data_is_refused_with_the_differing_keys(
    change: str, message: str, tuner: Tuner, small: Path, studied: Path
) -> None:
    before = finished(studied)
    said = tuner("run", small, change)
    assert said.code == 2 and message in said.err and "use another search.name" in said.err
    assert finished(studied) == before


def test_21_a_study_of_another_direction_is_refused(tuner: Tuner, small: Path) -> None:
    folder = small.parent / "studies" / "small"
    folder.mkdir(parents=True)
    optuna.create_study(
        storage=f"sqlite:///{folder}/study.db", study_name="small", direction="minimize"
    )
    said = tuner("run", small)
    assert said.code == 2 and "was created with direction=minimize" in said.err


def test_21_changed_images_are_refused(tuner: Tuner, small: Path) -> None:
    from PIL import Image

    for label in ("a", "b"):
        for i in range(8):
            path = small.parent / "photos" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i * 20, 255 if label == "a" else 0, 0)).save(path)
    once = ("search.trials=1", "search.retrain=false")
    words = ("run", small, "data={name: folder, path: photos}", *once)
    assert tuner(*words).code == 0
    (small.parent / "photos").rename(small.parent / "moved")  # as on another machine
    words = ("run", small, "data={name: folder, path: moved}", *once)
    assert tuner(*words).code == 0
    Image.new("RGB", (32, 32), "white").save(small.parent / "moved/a/0.png")
    said = tuner(*words)
    assert said.code == 2 and "other data" in said.err


def test_22_a_study_that_is_being_run_is_not_run_twice(
    tuner: Tuner, small: Path, studied: Path
) -> None:
    with open(studied / "lock") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        said = tuner("run", small, "search.trials=3")
    assert (
        said.code == 4
        and f"study 'small' is being run by pid {os.getpid()} on host" in said.err
        and "since" in said.err
    )
    assert len(finished(studied)) == 2


def test_23_a_studies_folder_that_cannot_be_written(tuner: Tuner, small: Path) -> None:
    (small.parent / "studies").write_text("a file")
    said = tuner("run", small)
    assert said.code == 4 and "studies" in said.err


@pytest.mark.parametrize(
    "place",
    [
        "tuner.preprocessing.image_store._decode_all",
        "tuner.preprocessing.tensor_files.TensorWriter.append",
        "tuner.training.publishing.save_and_verify_all",
    ],
)
def test_26_a_full_disk_is_named_and_with_space_again_it_finishes(
    place: str, tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_HOME", str(small.parent / "home"))
    words = ("run", small, "recipe.freeze_depth=3", "recipe.epochs=1", "search.trials=1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        said = tuner(*words)
    assert said.code == 4 and "disk full while writing" in said.err
    assert not list(small.parent.rglob("*.tmp"))
    assert tuner(*words).code == 0


def test_26_a_database_that_cannot_be_written_ends_in_order_and_continues(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real = BufferedStorage.flush

        def full(self: BufferedStorage) -> None:
            if any(
                row.get("trial_id") == 2 and "step" in row
                for rows in self.pending_rows.values()
                for row in rows
            ):
                cause = sqlite3.OperationalError("database or disk is full")
                raise sqlalchemy.exc.OperationalError("INSERT", {}, cause) from cause
            real(self)

        patch.setattr(BufferedStorage, "flush", full)
        said = tuner("run", small, "search.trials=2", "search.retrain=false")
    assert (
        said.code == 4
        and "disk full while writing studies/small/study.db (database or disk is full)" in said.err
    )
    assert finished(small.parent / "studies/small")[0] == (0, "COMPLETE")
    assert tuner("run", small, "search.trials=2", "search.retrain=false").code == 0


def test_27_an_export_killed_between_its_renames_comes_back(tmp_path: Path) -> None:
    folder, old = tmp_path / "export", tmp_path / ".export.old"
    folder.mkdir()
    text = '{"tuner": "0.1", "run_digest": "", "files": {}}'
    (folder / "manifest.json").write_text(text)
    folder.rename(old)  # killed here: the old export is moved away, the new one not yet in place
    (tmp_path / ".export-abcdefgh.tmp").mkdir()
    finalization.recover_export(folder)
    assert (folder / "manifest.json").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_28_when_every_trial_fails_alike_the_cause_is_named_and_nothing_exported(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.parent / "broken.py").write_text(
        "from torch import nn\n\n\nclass Broken(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(1, 1)\n\n"
        "    def forward(self, x):\n        raise ValueError('no such layer')\n\n\ndef build(outputs):\n    return Broken()\n"
    )
    monkeypatch.syspath_prepend(str(small.parent))
    said = tuner(
        "run", small, "model={name: 'broken:build'}", "recipe.freeze_depth=0", "search.trials=9"
    )
    assert (
        said.code == 5 and "the last 3 trials failed alike: ValueError: no such layer" in said.err
    )
    assert len(finished(small.parent / "studies/small")) == 3
    assert not (small.parent / "studies/small/export").exists()


def test_28_when_every_trial_diverges_the_search_stops_with_the_count(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.training.training_loop.train_one_epoch", lambda *_: float("nan"))
    said = tuner("run", small, "search.trials=40")
    assert (
        said.code == 5
        and "10 trials failed and none completed; first: diverged: loss nan in epoch 1" in said.err
    )


def test_28_a_winner_that_diverges_when_trained_again_is_named_and_not_exported(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.training import training_loop

    real = training_loop.train_one_epoch
    monkeypatch.setattr(
        training_loop,
        "train_one_epoch",
        lambda bench, recipe, *rest: (
            real(bench, recipe, *rest) if recipe.fit == "train" else float("nan")
        ),
    )
    said = tuner("run", small, "search.trials=1")
    assert said.code == 5 and "training diverged (loss nan in epoch 1); lower recipe.lr" in said.err
    assert (
        not (small.parent / "studies/small/export").exists()
        and (small.parent / "studies/small/best.yaml").exists()
    )


def test_31_a_gpu_that_is_not_there_is_named_before_anything_is_made(
    tuner: Tuner, small: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = tuner("run", small, "engine.device=cuda:3")
    assert (
        said.code == 4
        and "engine.device: cuda:3" in said.err
        and not (small.parent / "studies").exists()
    )


LONGER = ("data.examples=600", "recipe.epochs.low=2")  # trials that last until a signal comes


def local(small: Path, trials: int = 3) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-u",
        "-m",
        "tuner",
        "run",
        str(small),
        "engine.name=local",
        *LONGER,
        f"search.trials={trials}",
    ]
    return subprocess.Popen(
        command,
        cwd=small.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(process: "subprocess.Popen[str]", begin: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(begin):
            return
    raise AssertionError(f"never printed {begin!r}: {process.communicate()}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_32_a_signal_stops_in_order_and_the_same_command_continues(
    number: signal.Signals, code: int, tuner: Tuner, small: Path
) -> None:
    process = local(small)
    until(process, "#0")
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(
        number
    )  # a terminal sends Ctrl-C to the group
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == code
        and "continues where it stopped" in err
        and "Traceback" not in err
    )
    states = dict(finished(small.parent / "studies/small"))
    assert "RUNNING" not in states.values() and states[0] in ("COMPLETE", "PRUNED")
    again = tuner("run", small, *LONGER, "search.trials=3")  # by the engine of the file
    assert again.code == 0, again.err
    assert "1 of 3 trials done" in again.out and "\n#0 " not in again.out


def test_32_a_signal_is_heard_at_the_next_epoch_inline_too(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.commands.console import Console

    real = Console.on_epoch

    def epoch(self: Console, *words: Any) -> None:
        real(self, *words)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Console, "on_epoch", epoch)
    words = ("run", small, "recipe.epochs=2", "search.trials=2")
    said = tuner(*words, "--studies", "my studies")
    typed = f"`tuner {' '.join(map(str, words))} --studies 'my studies'`"
    assert said.code == 130 and f"{typed} continues where it stopped" in said.err
    (small.parent / "my studies").rename(small.parent / "studies")
    assert finished(small.parent / "studies/small") == [(0, "FAIL"), (1, "WAITING")]
    assert max(_steps(small.parent / "studies/small")) == 1  # not a second epoch


def _steps(folder: Path) -> list[int]:
    with sqlite3.connect(folder / "study.db") as database:
        found = [step for (step,) in database.execute("select step from trial_intermediate_values")]
    database.close()
    return found


@pytest.mark.slow
def test_32_a_second_signal_stops_now(small: Path) -> None:
    process = local(small)
    until(process, "#0")
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - start < 8
    assert "RUNNING" not in dict(finished(small.parent / "studies/small")).values()


@pytest.mark.slow
def test_27_32_ctrl_c_while_the_winner_is_made_leaves_an_export_that_is_whole_or_absent(
    tuner: Tuner, small: Path
) -> None:
    """At a moment by chance; test_crash_points.py kills at each point of it in turn."""
    process = local(small, trials=1)
    until(process, "training on train and valid")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, 0)
    study = small.parent / "studies" / "small"
    if (study / "export").exists():
        assert (study / "export" / "manifest.json").exists()
    again = tuner("run", small, *LONGER, "search.trials=1")
    assert again.code == 0, again.err
    assert (
        not list(study.glob(".export*"))
        and json.loads((study / "export/manifest.json").read_text())["trial"] >= 0
    )


def test_33_a_tie_is_decided_by_rule_and_said(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.tasks.classification import Classification

    monkeypatch.setattr(
        Classification,
        "score",
        lambda self, pairs: {
            "accuracy": 0.5,
            "balanced_accuracy": 0.5,
            "f1": 0.5,
            "log_likelihood": -1.0,
        },
    )
    once = ("recipe.epochs=1", "search.trials=2", "search.retrain=false")
    said = tuner("run", small, "search.pruner=none", *once)
    assert (
        said.code == 0
        and "best" in said.out
        and "tied with #" in said.out
        and "fewer epochs, then the lower number" in said.out
    )


def test_33_only_pruned_trials_leave_no_winner(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.training.training_loop.train_one_epoch", lambda *_: float("nan"))
    said = tuner("run", small, "search.trials=3")
    assert said.code == 5 and "no trial completed (3 pruned)" in said.err
    assert not (small.parent / "studies/small/export").exists()


@pytest.mark.usefixtures("quick_program")
def test_34_an_export_that_disagrees_is_not_published_and_the_earlier_one_stays(
    tuner: Tuner, studied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = studied / "export"
    before = {p.name: p.read_bytes() for p in export.iterdir()}
    from tuner.export import torch_export

    real = torch_export.load
    monkeypatch.setattr(
        torch_export, "load", lambda path, blank: lambda x: real(path, blank)(x) + 0.5
    )
    said = tuner("export", "small", "--format", "torch_export")
    assert (
        said.code == 1
        and "export torch_export: read back, it differs from the model by 0." in said.err
        and "nothing was published" in said.err
    )
    assert {p.name: p.read_bytes() for p in export.iterdir()} == before
    assert [p.name for p in export.parent.glob(".export*")] == []


def test_an_export_whose_file_was_changed_is_refused(tuner: Tuner, studied: Path) -> None:
    path = studied / "export" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = tuner("predict", "small", "x.png")
    assert said.code == 3 and "model.safetensors: changed since it was exported" in said.err
