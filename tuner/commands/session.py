"""`tuner run` and its kin from beginning to end: look before leaping, search, crown."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.commands.console import Console
from tuner.commands.signals import Stop, stoppable
from tuner.config import database_url, plugins
from tuner.config.run import Run, seconds
from tuner.config.space import Choice, Range, Space, dump
from tuner.config.yaml_document import Document
from tuner.errors import DataError, Interrupted, SpaceError, TunerError
from tuner.files import checkpoint_files, removal
from tuner.files.atomic import atomic_path, claimed, disk_errors, lock_of_export
from tuner.jobs import Carry, Job, Outcome, refusal, stall_of
from tuner.messages import Assignment, Crown, Facts, Survey

INSTEAD = "move it away, or choose another folder (--out, --studies, search.name)"


@dataclass(frozen=True)
class Places:
    """Where things are kept: studies (outputs) and home (caches, downloaded weights)."""

    studies: Path
    home: Path

    def folder(self, space: Space) -> Path:
        return self.studies / study_name(space)


def study_name(space: Space) -> str:
    return space.settings.search.name or Path(space.document.file).stem


def home_folder(warn: Callable[[str], None]) -> Path:
    """$TUNER_HOME, or tuner's folder in the user's cache; a temporary one, with a warning, where that cannot be written."""
    named = os.environ.get("TUNER_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    home = Path(named) if named else Path(cache) / "tuner"
    there = next(
        p for p in (home, *home.absolute().parents) if p.exists()
    )  # nothing is made before it is needed
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        temporary = removal.scratch_until_exit()
        warn(f"the cache folder {home} cannot be written; using {temporary} for this run only")
        home = temporary
    return home.resolve()


class Session:
    """One command's engine, its stop flag and its console."""

    def __init__(
        self, space: Space, places: Places, console: Console, carry: Carry, stop: Stop
    ) -> None:
        self.space, self.places, self.console, self.carry, self.stop = (
            space,
            places,
            console,
            carry,
            stop,
        )
        self.settings = space.settings
        self.answered = False  # the user knows that a signal was heard

    def assignment(self, run: Run, *, fetch: bool = True) -> Assignment:
        return Assignment(
            run,
            str(self.settings.search.metric),
            self.settings.engine,
            str(self.places.home),
            fetch,
        )

    def call(
        self,
        work: str,
        argument: Any,
        report: Callable[[Any], None] = lambda _: None,
        *,
        finish: bool = False,
        **more: Any,
    ) -> Any:
        """Has a worker carry out one job and returns its value; one whose worker dies is carried out again, as a trial is.

        Raises what the job refused with, and Interrupted.

        `finish`: the first signal lets the job come to its next report; otherwise it ends the job. `more`: what else the Job says.
        """
        begun: list[Job] = []
        found: list[Outcome] = []

        def next_job() -> Job | None:
            if (
                len(begun) > len(found)
                or len(begun) > self.settings.search.retries
                or any(outcome.kind != "lost" for outcome in found)
            ):
                return None
            begun.append(Job(-1, work, argument, **more))
            return begun[-1]

        def heard(job: Job, value: Any) -> bool:
            report(value)
            return not self.stop

        def go_on() -> bool:
            return self.go_on() if finish else not self.stop

        self.carry(next_job, heard, lambda job, outcome: found.append(outcome), go_on, 1)
        if self.stop:
            raise interrupted(self.stop)
        return value_of(found[-1])

    def stopping(self) -> bool:
        """Whether the command was asked to stop; says so when it first notices."""
        if self.stop and not self.answered:
            self.answered = True
            self.console.note(f"stopping after the running epoch; {self.stop.way_out}")
        return self.answered

    def go_on(self) -> bool:
        """What engines ask several times a second: whether the running epochs may still end."""
        return not (self.stopping() and self.stop.now)

    def survey(self) -> Survey:
        """Checks against the models what the file alone cannot tell."""
        corners = [self.assignment(run) for run in self.space.corners()]
        try:
            found: Survey = self.call("tuner.training.worker_jobs:survey", tuple(corners))
        except SpaceError as error:
            raise SpaceError(*placed(self.space.document, error.problems)) from None
        problems = [
            p for name, depth in found.depths.items() for p in too_deep(self.space, name, depth)
        ]
        if problems:
            raise SpaceError(*dict.fromkeys(problems))
        return found

    def inspect(self, *, fetch: bool = True) -> Facts:
        """Reads data and weights on every node before anything is made."""
        corners = tuple(self.assignment(run, fetch=fetch) for run in self.space.corners())
        try:
            facts: Facts = self.call(
                "tuner.training.worker_jobs:inspect",
                corners,
                everywhere=True,
                folders=folders_of(corners),
            )
        except SpaceError as error:
            raise SpaceError(*placed(self.space.document, error.problems)) from None
        for warning in facts.warnings:
            self.console.warn(warning)
        for note in facts.notes:
            self.console.note(f"note   {note}")
        return facts

    def crown(
        self,
        run: Run,
        folder: Path,
        formats: tuple[str, ...],
        trial: int,
        valid: dict[str, float],
        weights: Path | None = None,
    ) -> Any:
        """Retrains, tests and exports in a worker; returns what was published. With `weights` it takes these, of the run's trial.

        A training that is killed is continued by the next crowning for the same folder. Raises StorageError where an export cannot
        be put there, or another process is making one.
        """
        folder = folder.resolve() if folder.is_symlink() else folder
        kept = str(checkpoint_files.place_of(folder).absolute())
        alone = self.settings.engine.model_copy(update={"per_gpu": 1, "workers": 1})
        assignment = replace(self.assignment(run), engine=alone, checkpoints=kept)
        given = str(weights.absolute()) if weights else None
        needed = (
            kept if weights is None else str(weights.parent.absolute()),
            str(folder.absolute()),
        )
        order = Crown(
            assignment,
            formats,
            str(folder),
            study_name(self.space),
            trial,
            tuple(valid.items()),
            given,
        )
        with publishing(folder):
            try:
                heard = self.console.retraining(run) if weights is None else lambda _: None
                published = self.call(
                    "tuner.training.finalization:crown",
                    order,
                    heard,
                    finish=True,
                    keep=needed,
                    whole=needed[1],
                    stall=stall_of(self.settings.engine, paced=False),
                )
            finally:
                self.console.pause()
            checkpoint_files.discard(Path(kept))
        return published


@contextlib.contextmanager
def session(
    space: Space, places: Places, console: Console, engine: str | None = None
) -> Iterator[Session]:
    name = engine or space.settings.engine.name
    with (
        stoppable(seconds(space.settings.search.grace), abrupt=name == "inline") as stop,
        plugins.attribute("engine", name)(space.settings.engine, console.warn) as carry,
    ):
        yield Session(space, places, console, carry, stop)


def folders_of(assignments: tuple[Assignment, ...]) -> tuple[str, ...]:
    """What these runs read that is there under a name of the file: folders and files of data, weights."""
    values = [
        value
        for a in assignments
        for part in (a.run.data, a.run.model)
        for value in part.options.values()
    ]
    paths = [
        v for v in values if isinstance(v, str) and os.path.exists(v)
    ]  # a word such as a split's name is seldom a path
    return tuple(dict.fromkeys(paths))


def value_of(outcome: Outcome) -> Any:
    """What a job returned. Raises the TunerError it refused with; a failure in the user's code or ours with its traceback."""
    if outcome.kind == "done":
        return outcome.value
    if outcome.kind == "refused":
        raise refusal(outcome)
    if outcome.kind == "lost":
        hint = (
            "is there enough memory?"
            if outcome.cause == "memory"
            else "the same command tries again"
        )
        raise DataError(f"a worker was lost: {outcome.reason}; {hint}")
    raise Broken(outcome.reason, outcome.trace)


class Broken(TunerError):
    """Code that a worker ran raised; `trace` is for --debug."""

    def __init__(self, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.trace = trace


def interrupted(stop: Stop) -> Interrupted:
    return Interrupted(
        stop.signal or 2, f"interrupted; `{command(sys.argv[1:])}` continues where it stopped"
    )


def command(words: list[str]) -> str:
    """The command line as it was typed, but for passwords in it."""
    shown = []
    for word in words:
        key, given, value = word.partition("=")
        url = value.strip("'\"")
        shown.append(
            key + given + database_url.kept(url) if database_url.kept(url) != url else word
        )
    return shlex.join(["tuner", *shown])


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Holds the place of an export, which this process alone may then make there. Raises StorageError."""
    instead = "wait for it, or choose another folder"
    removal.require_target(folder, INSTEAD)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    shown = str(folder).replace("{", "{{").replace("}", "}}")
    with claimed(
        lock_of_export(folder), f"{shown} is being written by {{holder}}; {instead}", remove=True
    ):
        removal.require_target(folder, INSTEAD)
        yield


def too_deep(space: Space, model: str, depth: int) -> Iterator[str]:
    """Freeze depths of the file that the model does not have."""
    path = ("recipe", "freeze_depth")
    searched = next((d.leaf for d in space.dimensions if d.path == path), None)
    allows = f"but {model} allows 0..{depth}"
    if isinstance(searched, Range) and searched.high > depth:
        yield space.document.problem((*path, "high"), f"{searched.high:g}, {allows}")
    elif isinstance(searched, Choice) and max(searched.options) > depth:
        yield space.document.problem(path, f"{max(searched.options)}, {allows}")
    elif searched is None and space.values[path] > depth:
        yield space.document.problem(path, f"{space.values[path]}, {allows}")


def placed(document: Document, problems: Any) -> list[str]:
    """Problems that begin with a key, such as `model.weights: …`, with the key's line."""
    found = []
    for problem in problems:
        key = tuple(problem.partition(":")[0].split("."))
        known = key in document.lines or key[:1] in document.lines
        found.append(f"{document.where(key)}: {problem}" if known else problem)
    return found


def write_yaml(path: Path, tree: dict[str, Any], comment: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(f"# {comment}\n{dump(tree)}", encoding="utf-8")
