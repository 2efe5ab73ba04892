"""Trackers beside the console: each on a thread of its own, so that none can hold up a search."""

import functools
import hashlib
import importlib.util
import json
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.commands.session import Session, study_name
from tuner.commands.summary import Summary
from tuner.config import plugins
from tuner.config.requirements import pip_install
from tuner.config.space import Space
from tuner.errors import SpaceError
from tuner.messages import Epoch, TrialResult
from tuner.search import history
from tuner.search.running_trial import RunningTrial
from tuner.trackers._tracked import WINNER, RunEnd, TrackedRun, TrackedStudy, Tracker

MOST_WAITING = 10_000  # events that a tracker may be behind
SECONDS_AT_END = 30.0  # that the command waits for a tracker which is behind
SECONDS_WHEN_STOPPED = 3.0  # the same, where a signal ends the command
IDENTIFIER = "tuner:tracked_as"  # user attribute of a study: what tells it apart for trackers
TRACKED_WINNER = (
    "tuner:tracked_winner"  # the same: the digest of the manifest that they were told of
)
STATES: dict[TrialState, Literal["complete", "pruned", "failed"]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
Event = Callable[[Tracker], None]


def require_trackers(space: Space) -> None:
    """Raises SpaceError where the package of a tracker is not installed."""
    problems = []
    for i, name in enumerate(space.settings.track):
        if ":" not in name:
            package = plugins.read_constant("tracker", name, "PACKAGE")
            if importlib.util.find_spec(package) is None:
                needed = f"{name} needs a package: {pip_install(name)}"
                problems.append(space.document.format_problem(("track", i), needed))
    if problems:
        raise SpaceError(*problems)


class TrackerThread:
    """One tracker. What it raises, and that it falls behind, ends it with one warning."""

    def __init__(self, name: str, study: TrackedStudy, warn: Callable[[str], None]) -> None:
        self.name, self.study, self.warn = name, study, warn
        self.waiting: queue.Queue[Event | None] = queue.Queue(MOST_WAITING)
        self.has_failed = False
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def put(self, event: Event | None) -> None:
        """Let the tracker have an event when it comes to it; None: there are no more."""
        if self.has_failed:
            return
        try:
            self.waiting.put_nowait(event)
        except queue.Full:
            self._give_up(f"it is {MOST_WAITING:,} events behind")

    def end(self, seconds: float) -> None:
        """Wait so long for the tracker to come to its end."""
        self.put(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._give_up(f"it was still busy {seconds:.0f} s after the end")

    def _work(self) -> None:
        try:
            tracker: Tracker = plugins.load_plugin("tracker", self.name)(self.study)
            while (event := self.waiting.get()) is not None and not self.has_failed:
                event(tracker)
            tracker.close()
        except (Exception, SystemExit) as error:  # whatever a library raises is its own affair
            first = str(error).strip().partition("\n")[0]
            self._give_up(f"{type(error).__name__}: {first}" if first else type(error).__name__)

    def _give_up(self, reason: str) -> None:
        if not self.has_failed:
            self.has_failed = True
            self.warn(f"track: {self.name} gets nothing more of this search ({reason})")


class Tracking:
    """Passes what a coordinator tells its listener to the trackers of the space file."""

    def __init__(self, session: Session, study: optuna.Study, folder: Path) -> None:
        self.study, self.session = study, session
        self.runs: dict[int, TrackedRun] = {}  # trial's number -> its run
        self.sent: dict[str, set[int]] = {}  # run's key -> epochs that trackers know
        names = session.settings.track
        if not names:
            self.threads: list[TrackerThread] = []
            return
        search = session.settings.search
        tracked = TrackedStudy(
            study_name(session.space),
            identifier_of(study),
            folder,
            str(search.metric),
            search.direction or "maximise",
            fixed_settings(session.space),
        )
        self.threads = [TrackerThread(name, tracked, session.console.warn) for name in names]

    def on_epoch(self, running: RunningTrial, epoch: Epoch) -> None:
        """Passes an epoch on, once: an attempt begins with the epochs of the one before."""
        if not self.threads:
            return
        if running.number not in self.runs:
            self.runs[running.number] = tracked_run(running.proposal, running.trial)
        run = self.runs[running.number]
        sent = self.sent.setdefault(run.key, set())
        if epoch.number not in sent:
            sent.add(epoch.number)
            self._put(lambda tracker: tracker.log_epoch(run, epoch))

    def on_trial_end(self, trial: FrozenTrial, result: TrialResult | None) -> None:
        """Passes the end of a trial on. A duplicate was not trained, so it has no run."""
        if not self.threads or history.DUPLICATE_OF in trial.user_attrs:
            return
        run = self.runs.pop(trial.number, None)
        if run is None:
            run = tracked_run(history.proposal_numbers(self.study)[trial.number], trial)
        scores = trial.user_attrs.get(history.SCORES, {})
        read_files = drawn_once(result.artifacts if result else {})

        def end_run(tracker: Tracker) -> None:
            end = RunEnd(
                STATES[trial.state],
                {f"best/{name}": value for name, value in scores.items()},
                str(trial.user_attrs.get(history.REASON, "")),
                read_files(),
                max(trial.intermediate_values, default=0),
            )
            tracker.end_run(run, end)

        self._put(end_run)

    def on_winner(self, summary: Summary) -> None:
        """Passes the winner's test scores on, once for each export."""
        if not self.threads or summary.published is None:
            return
        content = json.dumps(summary.published.manifest, sort_keys=True, default=str)
        told = [hashlib.sha256(content.encode()).hexdigest(), *self.session.settings.track]
        if self.study.user_attrs.get(TRACKED_WINNER) == told:
            return
        winner = summary.winner
        run = TrackedRun(WINNER, winner.number, winner.params)
        test = summary.published.manifest["scores"]["test"]
        scores = {f"test/{name}": float(value) for name, value in test.items()}
        self._put(lambda tracker: tracker.end_run(run, RunEnd("complete", scores)))
        self.study.set_user_attr(TRACKED_WINNER, told)

    def close(self) -> None:
        """Waits a little for trackers that are behind."""
        seconds = SECONDS_WHEN_STOPPED if self.session.stop_signal else SECONDS_AT_END
        for thread in self.threads:
            thread.end(seconds)

    def _put(self, event: Event) -> None:
        for thread in self.threads:
            thread.put(event)


def tracked_run(proposal: int, trial: optuna.Trial | FrozenTrial) -> TrackedRun:
    return TrackedRun(f"trial-{proposal:04d}", trial.number, dict(trial.params))


def identifier_of(study: optuna.Study) -> str:
    """What tells a study apart from every other one, whatever they are called."""
    if IDENTIFIER not in study.user_attrs:
        study.set_user_attr(IDENTIFIER, secrets.token_hex(6))
    return str(study.user_attrs[IDENTIFIER])


def fixed_settings(space: Space) -> dict[str, Any]:
    """The keys with the value that all trials share, by dotted key."""
    searched = {dimension.path for dimension in space.dimensions}
    return {
        ".".join(path): value if isinstance(value, bool | int | float | str) else str(value)
        for path, value in space.values.items()
        if path not in searched and value is not None
    }


def drawn_once(files: Mapping[str, bytes]) -> Callable[[], dict[str, bytes]]:
    """The files of a trial, whose pictures are drawn when a tracker first asks for them."""

    @functools.cache
    def draw() -> dict[str, bytes]:
        from tuner.dashboard.plots import render_figure

        return {name: render_figure(content) for name, content in files.items()}

    return draw
