"""`tuner status`, `tuner stop` and `tuner enqueue` on real studies, also while they run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL, CommandResult
from tests.helpers.instant_engine import make_coordinator
from tuner.commands import running_study, study_view
from tuner.commands.study_view import StudyView
from tuner.config import parsing, yaml_document
from tuner.config.given_params import checked_value
from tuner.config.space import Choice, Dimension, Range
from tuner.errors import SpaceError

Tuner = Callable[..., CommandResult]


def test_status_tells_state_trials_and_best(tuner: Tuner, studied: Path) -> None:
    said = tuner("status", "small")
    assert said.code == 0, said.err
    assert "small: done" in said.out and "2 of 2 ended" in said.out and "best " in said.out
    values = json.loads(tuner("status", "--json").out)
    assert (values["state"], values["trials"], values["running"]) == ("done", 2, [])
    refused = tuner("status", "smal")
    assert refused.code == 3 and "did you mean 'small'?" in refused.err


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (["recipe.lr=[0.01, 0.1]", "recipe.freeze_depth=3", "recipe.epochs=1"], 4),
        (["recipe.lr=0.01", "recipe.freeze_depth=3", "recipe.epochs=1", "recipe.optimizer=sgd"], 1),
        (["recipe.lr=[0.01, 0.1]", "search.sampler=random"], 20),
    ],
)
def test_the_budget_of_a_study_is_the_number_of_trials_that_can_be_made(
    words: list[str], budget: int
) -> None:
    """`search.trials` may be more than a grid has combinations, or than a file without ranges."""
    always = ["search.sampler=grid", "search.trials=20", "recipe.momentum=0.9"]
    document = yaml_document.parse_document(SMALL, "small.yaml")
    space = parsing.parse_space(parsing.apply_overrides(document, always + words))
    study = make_coordinator(space).study
    view = StudyView(Path("t"), space.to_dict(), study, (), None)  # type: ignore[arg-type]
    assert view.budget == budget


def test_stopping_a_study_that_does_not_run_says_so(tuner: Tuner, studied: Path) -> None:
    said = tuner("stop", "small")
    assert said.code == 0 and "is not running" in said.out


def test_no_process_but_tuners_gets_a_signal(tuner: Tuner, studied: Path, tmp_path: Path) -> None:
    """A foreign process holds the study's lock, as one of another container may seem to do."""
    hold = (
        "import fcntl, os, socket, sys, time\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write(f'pid {os.getpid()} on host {socket.gethostname()} since 12:00')\n"
        "file.flush(); print('held', flush=True); time.sleep(60)\n"
    )
    link = tmp_path / "lock"
    link.symlink_to(studied / "lock")
    script = tmp_path / "hold.py"
    script.write_text(hold)
    command = [sys.executable, "hold.py", "lock"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            refused = tuner("stop", "small")
            assert refused.code == 4 and "run `tuner stop` there" in refused.err
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize(("words", "presses"), [([], 1), (["--now"], 2)])
def test_stop_presses_ctrl_c_once_or_twice_and_waits(
    words: list[str],
    presses: int,
    tuner: Tuner,
    studied: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[tuple[int, int]] = []
    holder = f"pid 4242 on host {socket.gethostname()} since 12:00"

    def holder_of(_: Path) -> str | None:
        return holder if len(sent) < presses else None

    monkeypatch.setattr(study_view, "lock_holder", holder_of)
    monkeypatch.setattr(running_study, "_may_be_tuner", lambda _: True)
    monkeypatch.setattr(running_study, "SECOND_SIGNAL_SECONDS", 0.0)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    said = tuner("stop", "small", *words)
    assert said.code == 0 and "has stopped" in said.out, said.err
    assert sent == [(4242, signal.SIGINT)] * presses


def test_an_enqueued_trial_is_the_next_that_is_tried(
    tuner: Tuner, studied: Path, small: Path
) -> None:
    said = tuner("enqueue", "small", "lr=0.002", "freeze_depth=3")
    assert said.code == 0, said.err
    assert "lr 0.002" in said.out and "search.trials=3" in said.out
    assert json.loads(tuner("status", "--json").out)["enqueued"] == 1
    assert tuner("run", small, "search.trials=3").code == 0
    third = json.loads(tuner("show", "small", 2, "--json").out)
    assert third["params"]["lr"] == 0.002 and third["params"]["freeze_depth"] == 3
    assert list(studied.glob("enqueued-*")) == []


def test_what_cannot_be_tried_is_refused(tuner: Tuner, studied: Path) -> None:
    for words, message in (
        (("leraning_rate=1",), "leraning_rate: not searched by this study"),
        (("lr",), "expected KEY=VALUE"),
        (("lr=5",), "lr: 5 is outside the study's range, 0.0001 to 0.1"),
        (("lr=[5",), "lr: not valid YAML"),
        (("lr=",), "lr: expected a number, 0.0001 to 0.1, got nothing"),
        (("freeze_depth=2.5",), "no whole number"),
        (("optimizer=adam",), "none of its choices: sgd, adamw"),
        (("optimizer=adamw", "momentum=0.9"), "momentum: not searched with these values"),
    ):
        said = tuner("enqueue", "small", *words)
        assert (said.code, message in said.err) == (2, True), said.err
    assert list(studied.glob("enqueued-*")) == []


def test_values_are_checked_with_their_types() -> None:
    choice = Dimension(("recipe", "nesterov"), Choice((True, False)))
    assert checked_value(choice, True) is True
    with pytest.raises(SpaceError):
        checked_value(choice, 1)
    whole = Dimension(("recipe", "epochs"), Range(1, 5, integer=True))
    assert checked_value(whole, 3.0) == 3 and isinstance(checked_value(whole, 3.0), int)
    with pytest.raises(SpaceError):
        checked_value(whole, "3")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a crowded machine takes minutes to begin
def test_a_running_study_is_seen_stopped_and_continued_from_another_shell(
    tuner: Tuner, small: Path
) -> None:
    command = [sys.executable, "-m", "tuner", "run", str(small), "search.trials=400"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 600
            while time.monotonic() < deadline:
                seen = tuner("status", "small", "--json")
                if seen.code == 0 and json.loads(seen.out)["trials"] >= 3:
                    break
                time.sleep(0.2)
            values = json.loads(seen.out)
            assert values["state"] == "running" and str(process.pid) in values["coordinators"][0]
            assert tuner("enqueue", "small", "lr=0.0123").code == 0
            while not any(
                "0.0123" in line for line in tuner("trials", "small", "--csv").out.splitlines()
            ):
                assert time.monotonic() < deadline
                time.sleep(0.2)
            stopped = tuner("stop", "small")
            assert stopped.code == 0 and "has stopped" in stopped.out, stopped.err
            assert process.wait(200) == 128 + signal.SIGINT
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
    assert "small: stopped" in tuner("status", "small").out
