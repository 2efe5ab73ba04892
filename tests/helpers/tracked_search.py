"""A search without training whose trackers are real."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from tests.helpers.instant_engine import (
    carry_out_without_training,
    make_coordinator,
    make_space,
    run_all_jobs,
)
from tuner.commands.combined_listener import CombinedListener
from tuner.commands.console import Console
from tuner.commands.session import Folders, Session
from tuner.commands.signals import StopSignal
from tuner.commands.tracking import Tracking
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.jobs import Job, Outcome
from tuner.search.coordinator import Coordinator


class Warned(Console):
    def __init__(self) -> None:
        super().__init__("quiet")
        self.warnings = list[str]()

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def on_trial_start(self, *_: Any) -> None: ...
    def on_epoch(self, *_: Any) -> None: ...
    def on_trial_end(self, *_: Any) -> None: ...


class TrackedSearch:
    """One study, searched by one command after another."""

    def __init__(self, folder: Path, *names: str, **search: Any) -> None:
        space = make_space(name="t", **search)
        self.space = replace(space, settings=replace(space.settings, track=names))
        self.folder, self.storage = folder, optuna.storages.InMemoryStorage()
        self.study = optuna.create_study(storage=self.storage, study_name="t", direction="maximize")
        self.console = Warned()

    def open(self) -> tuple[Coordinator, Tracking]:
        session = Session(
            self.space,
            Folders(self.folder, self.folder),
            self.console,
            lambda *_: None,
            StopSignal(1),
        )
        tracking = Tracking(session, self.study, self.folder)
        artifacts = ArtifactWriter(self.study, self.folder, "accuracy")
        listener = CombinedListener(self.console, artifacts, tracking)
        return make_coordinator(self.space, self.storage, listener), tracking

    def run(
        self, run_job: Callable[[Coordinator, Job], Outcome] = carry_out_without_training
    ) -> None:
        coordinator, tracking = self.open()
        run_all_jobs(coordinator, run_job)
        tracking.close()
