"""Trackers hear of each trial once, and nothing that they do reaches the search."""

import importlib.util
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.conftest import CommandResult
from tests.helpers import own_trackers
from tests.helpers.instant_engine import carry_out_without_training
from tests.helpers.tracked_search import TrackedSearch
from tuner.api import RunEnd, TrackedRun
from tuner.commands import tracking
from tuner.commands.progress import Progress
from tuner.commands.summary import Summary
from tuner.config import parsing, yaml_document
from tuner.jobs import Job, Outcome
from tuner.manifest import PublishedExport
from tuner.search.coordinator import Coordinator

OWN = "tests.helpers.own_trackers"


@pytest.fixture(autouse=True)
def told() -> list[tuple[Any, ...]]:
    own_trackers.TOLD.clear()
    return own_trackers.TOLD


def test_a_tracker_hears_each_epoch_and_each_end_and_one_that_fails_warns_once(
    tmp_path: Path, told: list[tuple[Any, ...]]
) -> None:
    search = TrackedSearch(tmp_path, f"{OWN}:Failing", f"{OWN}:Recording", trials=6, seed=1)
    search.run()
    trials = search.study.get_trials()
    assert search.console.warnings == [
        f"track: {OWN}:Failing gets nothing more of this search (OSError: the server is on fire)"
    ]
    for trial in trials:
        mine = [
            entry
            for entry in told
            if entry[0] != "study" and entry[1:] and entry[1].number == trial.number
        ]
        run: TrackedRun = mine[0][1]
        assert run.key == f"trial-{trial.number:04d}" and run.params == trial.params
        assert {
            n: v for kind, _, n, v in (e for e in mine if e[0] == "epoch")
        } == trial.intermediate_values
        (end,) = [entry[2] for entry in mine if entry[0] == "end"]
        assert isinstance(end, RunEnd)
        assert end.state == trial.state.name.lower() and end.steps == len(trial.intermediate_values)
        assert end.scores["best/accuracy"] == max(trial.intermediate_values.values())
    (study,) = [entry[1] for entry in told if entry[0] == "study" and entry[1].folder == tmp_path][
        -1:
    ]
    assert study.name == "t" and study.settings["model.name"] == "resnet18_slim"
    assert "recipe.lr" not in study.settings and told[-1] == ("close",)

    alone = TrackedSearch(tmp_path / "alone", trials=6, seed=1)
    (tmp_path / "alone").mkdir()
    alone.run()
    assert [(t.params, t.value) for t in alone.study.get_trials()] == [
        (t.params, t.value) for t in trials
    ]
    assert not alone.study.user_attrs.keys() & {tracking.IDENTIFIER, tracking.TRACKED_WINNER}


def test_a_trial_that_is_tried_again_is_one_run_whose_epochs_come_once(
    tmp_path: Path, told: list[tuple[Any, ...]]
) -> None:
    lost: list[int] = []

    def lose_first(c: Coordinator, job: Job) -> Outcome:
        outcome = carry_out_without_training(c, job)
        if not lost:
            lost.append(job.number)
            return Outcome("lost", reason="killed", loss_cause="died")
        return outcome

    search = TrackedSearch(tmp_path, f"{OWN}:Recording", trials=2)
    search.run(lose_first)
    assert len(search.study.get_trials()) == 3
    epochs = [(entry[1].key, entry[2]) for entry in told if entry[0] == "epoch"]
    ends = [entry[1].key for entry in told if entry[0] == "end"]
    assert len(epochs) == len(set(epochs)) and sorted(ends) == ["trial-0000", "trial-0001"]


def test_a_tracker_that_hangs_neither_slows_a_search_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_AT_END", 0.1)
    search = TrackedSearch(tmp_path, f"{OWN}:hang", trials=3)
    began = time.monotonic()
    search.run()
    assert time.monotonic() - began < 10  # seconds; it would hang for 20
    assert len(search.study.get_trials()) == 3
    assert search.console.warnings == [
        f"track: {OWN}:hang gets nothing more of this search (it was still busy 0 s after the end)"
    ]
    own_trackers.RELEASED.set()


def published_summary(search: TrackedSearch, accuracy: float) -> Summary:
    manifest = {"scores": {"test": {"accuracy": accuracy}}}
    return Summary(
        folder=search.folder,
        metric="accuracy",
        progress=Progress(1, 1),
        winner=optuna.trial.create_trial(value=1.0),
        tied_numbers=[],
        run=search.space.make_run({}),
        published=PublishedExport(search.folder, manifest),
        anything_new=True,
    )


def test_the_winner_is_told_once_for_each_export(
    tmp_path: Path, told: list[tuple[Any, ...]]
) -> None:
    search = TrackedSearch(tmp_path, f"{OWN}:Recording", trials=2)
    for accuracy in (0.5, 0.5, 0.75):
        _, followed = search.open()
        followed.on_winner(published_summary(search, accuracy))
        followed.close()
    ends = [entry[1:] for entry in told if entry[0] == "end"]
    assert [(run.key, end.scores) for run, end in ends] == [
        ("winner", {"test/accuracy": 0.5}),
        ("winner", {"test/accuracy": 0.75}),
    ]


def test_check_names_the_command_that_installs_a_tracker(
    tuner: Any, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "wandb" else find(name, *more),
    )
    small.write_text(small.read_text() + "track: [wandb]\n")
    for command in ("check", "run"):
        said: CommandResult = tuner(command, small)
        assert (
            said.code == 2 and "track.0: wandb needs a package: pip install 'wandb" in said.err
        ), said.err
    assert not (small.parent / "studies").exists()


def test_a_tracker_is_named_alone_or_in_a_list_and_space_yaml_keeps_it() -> None:
    def parse(track: str) -> Any:
        from tests.conftest import SMALL

        return parsing.parse_space(
            yaml_document.parse_document(f"{SMALL}track: {track}\n", "s.yaml")
        )

    assert parse("mlflow").settings.track == ("mlflow",)
    space = parse("[tensorboard, wandb, tensorboard]")
    assert space.settings.track == ("tensorboard", "wandb")
    assert space.to_dict()["track"] == ["tensorboard", "wandb"]
    with pytest.raises(parsing.SpaceError) as error:
        parse("[tensorbord]")
    assert "'tensorbord' is not known" in str(error.value) and "tensorboard" in str(error.value)
    with pytest.raises(parsing.SpaceError) as error:
        parse("{tensorboard: yes}")
    assert "expected a list of trackers (mlflow, tensorboard, trackio, wandb)" in str(error.value)
