"""Signals reach a session while a worker trains: it answers at once, and ends the work when there is no more time."""

import os
import signal
import time
from pathlib import Path

import pytest

from tuner.commands.console import Console
from tuner.commands.export import load_study_space
from tuner.commands.file_problems import find_depth_problems
from tuner.commands.run import max_epochs, with_study_name
from tuner.commands.session import (
    Folders,
    Session,
    open_session,
    study_name,
    write_yaml,
)
from tuner.commands.signals import StopSignal, handle_signals
from tuner.config import parsing
from tuner.errors import Interrupted
from tuner.jobs import NextJob, OnEnd, OnReport, Outcome, ShouldContinue

LONG = 15.0  # seconds of an epoch that nobody waits for


class Listener(Console):
    """Sends this process a second signal when the first one is answered."""

    def __init__(self, second: signal.Signals | None) -> None:
        super().__init__("normal")
        self.second, self.notes = second, list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self.second is not None:
            os.kill(os.getpid(), self.second)


@pytest.mark.parametrize(
    ("first", "second", "code", "note"),
    [
        (signal.SIGINT, signal.SIGINT, 130, "press Ctrl-C again to stop now"),
        (signal.SIGTERM, None, 143, "it may take 0.3 s (search.grace)"),
        (signal.SIGHUP, None, 129, "it may take 0.3 s (search.grace)"),
    ],
)
def test_a_signal_is_answered_during_the_epoch_and_ends_it_in_time(
    first: signal.Signals, second: signal.Signals | None, code: int, note: str, small: Path
) -> None:
    space = parsing.load_space(small, ["search.grace=0.3s"])
    console = Listener(second)
    begun: list[float] = []

    def report(pid: int) -> None:
        begun.append(time.monotonic())
        os.kill(os.getpid(), first)

    with (
        pytest.raises(Interrupted) as error,
        open_session(space, Folders(small.parent, small.parent), console, engine="local") as s,
    ):
        s.run_job("tests.helpers.jobs:wait", LONG, report, finish_epoch=True)
    assert time.monotonic() - begun[0] < 8  # the grace, if the file had not said 0.3 s
    assert console.notes == [f"stopping after the running epoch; {note}"]
    assert error.value.code == code


def test_without_a_second_signal_ctrl_c_waits_as_long_as_it_takes() -> None:
    for number, waits in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        stop = StopSignal(grace=10.0)
        assert not stop and not stop.is_now
        stop(number, None)
        assert stop and not stop.is_now
        stop.first_signal_at -= 11
        assert stop.is_now is not waits
        stop(signal.SIGINT, None)
        assert stop.is_now and stop.signal == number


def test_a_hang_up_that_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals(1.0) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_winner_whose_worker_a_memory_limit_kills_is_retrained_with_parts_of_its_batches(
    small: Path,
) -> None:
    space = parsing.load_space(small)
    parts: list[int] = []

    def carry(
        jobs: NextJob, report: OnReport, ended: OnEnd, go_on: ShouldContinue, workers: int
    ) -> None:
        while (job := jobs()) is not None:
            parts.append(job.argument.assignment.micro_batches)
            killed = Outcome("lost", reason="worker ended by SIGKILL", loss_cause="memory")
            ended(job, killed if len(parts) < 3 else Outcome("done", value="published"))

    s = Session(
        space, Folders(small.parent, small.parent), Console("normal"), carry, StopSignal(8.0)
    )
    assert (
        s.finalize(space.make_run({}), small.parent / "export", ("safetensors",), 0, {})
        == "published"
    )
    assert parts == [1, 1, 4]


def test_the_largest_value_of_a_stepped_range_is_its_last_step(small: Path) -> None:
    space = parsing.load_space(
        small,
        [
            "recipe.freeze_depth={low: 1, high: 10, step: 4}",
            "recipe.epochs={low: 1, high: 10, step: 4}",
        ],
    )
    assert max_epochs(space) == 9
    assert list(find_depth_problems(space, "net", 9)) == []
    assert list(find_depth_problems(space, "net", 8)) == [
        "command line: recipe.freeze_depth.high: 9, but net allows 0..8"
    ]


def test_a_studys_space_file_has_its_name_also_where_an_earlier_version_wrote_none(
    small: Path,
) -> None:
    space = parsing.load_space(small)
    folder = small.parent / "studies" / "Ünï 1"
    folder.mkdir(parents=True)
    write_yaml(folder / "space.yaml", space.to_dict(), "what study 'Ünï 1' searches")
    assert space.settings.search.name is None
    assert load_study_space(folder).settings.search.name == folder.name

    named = with_study_name(space)
    write_yaml(folder / "space.yaml", named.to_dict(), "what study 'small' searches")
    assert load_study_space(folder).settings.search.name == study_name(space) == "small"
