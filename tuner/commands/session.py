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
from tuner.commands.file_problems import find_depth_problems, with_line_numbers
from tuner.commands.signals import StopSignal, handle_signals
from tuner.config import database_url, plugins
from tuner.config.run import Run, parse_duration
from tuner.config.space import Space, dump_yaml
from tuner.errors import DataError, Interrupted, SpaceError, TunerError
from tuner.files import checkpoint_files, removal
from tuner.files.atomic import atomic_path, claimed, disk_errors, lock_of_export
from tuner.jobs import Job, Outcome, RunJobs, stall_of, to_tuner_error
from tuner.messages import (
    Assignment,
    DatasetReport,
    DefaultComparison,
    DefaultTestJob,
    FinalizeJob,
    ModelSurvey,
    OutputSettings,
    Soup,
    micro_batch_count,
)

INSTEAD = "move it away, or choose another folder (--out, --studies, search.name)"


@dataclass(frozen=True)
class Folders:
    """Where files are kept: studies (outputs) and home (caches, downloaded weights)."""

    studies: Path
    home: Path

    def study_folder(self, space: Space) -> Path:
        return self.studies / study_name(space)


def study_name(space: Space) -> str:
    return space.settings.search.name or Path(space.document.file).stem


def home_folder(warn: Callable[[str], None]) -> Path:
    """$TUNER_HOME, or tuner's folder in the user's cache.

    Where that cannot be written, it is a temporary folder, with a warning.
    """
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
        self,
        space: Space,
        folders: Folders,
        console: Console,
        carry: RunJobs,
        stop_signal: StopSignal,
    ) -> None:
        self.space, self.folders, self.console = space, folders, console
        self.run_jobs, self.stop_signal = carry, stop_signal
        self.settings = space.settings
        self.answered = False  # the user knows that a signal was heard

    def make_assignment(self, run: Run, *, allow_downloads: bool = True) -> Assignment:
        return Assignment(
            run,
            str(self.settings.search.metric),
            self.settings.engine,
            str(self.folders.home),
            allow_downloads,
            direction=self.settings.search.direction or "maximise",
            limits=limits.values() if (limits := self.settings.search.limits) else {},
        )

    def share_gpus(self, workers: int) -> None:
        """From now on so many workers share a GPU."""
        engine = self.settings.engine.model_copy(update={"per_gpu": workers})
        self.settings = replace(self.settings, engine=engine)

    def run_job(
        self,
        function: str,
        argument: Any,
        report: Callable[[Any], None] = lambda _: None,
        *,
        finish_epoch: bool = False,
        **more: Any,
    ) -> Any:
        """Has a worker carry out one job and returns its value.

        One whose worker dies is carried out again, as a trial is.

        Raises what the job refused with, and Interrupted.

        `finish`: the first signal lets the job come to its next report; otherwise it ends the job.
        `more`: what else the Job says.
        """
        begun: list[Job] = []
        outcomes: list[Outcome] = []

        def next_job() -> Job | None:
            if (
                len(begun) > len(outcomes)
                or len(begun) > self.settings.search.retries
                or any(outcome.kind != "lost" for outcome in outcomes)
            ):
                return None
            killed = sum(outcome.loss_cause == "memory" for outcome in outcomes)
            count = micro_batch_count(len(begun) + 1, killed, self.settings.search.retries)
            begun.append(Job(-1, function, _in_micro_batches(argument, count), **more))
            return begun[-1]

        def heard(job: Job, value: Any) -> bool:
            report(value)
            return not self.stop_signal

        def go_on() -> bool:
            return self.go_on() if finish_epoch else not self.stop_signal

        self.run_jobs(next_job, heard, lambda job, outcome: outcomes.append(outcome), go_on, 1)
        if self.stop_signal:
            raise interrupted_error(self.stop_signal)
        return outcome_value(outcomes[-1])

    def stopping(self) -> bool:
        """Whether the command was asked to stop; the first call that notices it says so."""
        if self.stop_signal and not self.answered:
            self.answered = True
            self.console.note(f"stopping after the running epoch; {self.stop_signal.way_out}")
        return self.answered

    def go_on(self) -> bool:
        """Whether the running epochs may still end. Engines ask this several times a second."""
        return not (self.stopping() and self.stop_signal.is_now)

    def survey_models(self) -> ModelSurvey:
        """Checks against the models what the file alone cannot show."""
        corners = [self.make_assignment(run) for run in self.space.plugin_combinations()]
        try:
            survey: ModelSurvey = self.run_job(
                "tuner.training.worker_jobs:survey_models", tuple(corners)
            )
        except SpaceError as error:
            raise SpaceError(*with_line_numbers(self.space.document, error.problems)) from None
        problems = [
            p
            for name, depth in survey.max_depths.items()
            for p in find_depth_problems(self.space, name, depth)
        ]
        if problems:
            raise SpaceError(*dict.fromkeys(problems))
        return survey

    def inspect_data(self, *, allow_downloads: bool = True) -> DatasetReport:
        """Reads data and weights on every node before the study is made."""
        corners = tuple(
            self.make_assignment(run, allow_downloads=allow_downloads)
            for run in self.space.plugin_combinations()
        )
        try:
            facts: DatasetReport = self.run_job(
                "tuner.training.worker_jobs:inspect_data",
                corners,
                on_every_node=True,
                folders_needed=input_paths(corners),
            )
        except SpaceError as error:
            raise SpaceError(*with_line_numbers(self.space.document, error.problems)) from None
        for warning in facts.warnings:
            self.console.warn(warning)
        for note in facts.notes:
            self.console.note(f"note   {note}")
        return facts

    def finalize(
        self,
        run: Run,
        folder: Path,
        formats: tuple[str, ...],
        trial: int,
        valid: dict[str, float],
        weights: Path | None = None,
        comparison: DefaultComparison | None = None,
        confirmation: dict[str, Any] | None = None,
        soup: Soup | None = None,
        outputs: OutputSettings = OutputSettings(),
    ) -> Any:
        """Retrains, tests and exports in a worker; returns what was published.

        With `weights` it takes these, of the run's trial. With `comparison` the winner is compared
        with the default recipe. `confirmation` is what the manifest says of its repeats. `soup`:
        weights are averaged where the soup has ingredients. `outputs`: what is done with the
        model's outputs.
        A training that is killed is continued by the next crowning for the same folder. Raises
        StorageError where an export cannot be put there, or another process is making one.
        """
        folder = folder.resolve() if folder.is_symlink() else folder
        kept = checkpoint_files.place_of(folder).absolute()
        job = FinalizeJob(
            self.retraining_assignment(run, kept),
            formats,
            str(folder),
            study_name(self.space),
            trial,
            tuple(valid.items()),
            str(weights.absolute()) if weights else None,
            comparison,
            confirmation,
            soup,
            outputs,
        )
        with publishing(folder):
            return self.retrain(job, kept, str(folder.absolute()))

    def run_default_test(
        self, run: Run, kept: Path, weights: Path | None, outputs: OutputSettings
    ) -> bytes:
        """Retrains the default recipe in a worker and scores it on the test examples.

        With `weights` it takes these, of the run's trial. A training that is killed is continued
        from its checkpoints in `kept`. Returns the content of the file with its test.
        """
        given = str(weights.absolute()) if weights else None
        job = DefaultTestJob(self.retraining_assignment(run, kept), given, outputs)
        content: bytes = self.retrain(job, kept)
        return content

    def retraining_assignment(self, run: Run, kept: Path) -> Assignment:
        """A retraining has the machine for itself."""
        alone = self.settings.engine.model_copy(update={"per_gpu": 1, "workers": 1})
        return replace(self.make_assignment(run), engine=alone, checkpoint_folder=str(kept))

    def retrain(self, job: FinalizeJob | DefaultTestJob, kept: Path, whole: str = "") -> Any:
        """Has a worker carry out a job of `training/finalization.py`, and shows its epochs.

        `kept` has its checkpoints, `whole` is the export's folder where there is one.
        """
        is_default = isinstance(job, DefaultTestJob)
        function = "run_default_test" if is_default else "finalize"
        weights_files = files_with_weights(job)
        needed = [str(Path(file).parent) for file in weights_files] or [str(kept)]
        try:
            heard = (
                (lambda _: None)
                if weights_files
                else self.console.show_retraining(job.assignment.run, is_default=is_default)
            )
            value = self.run_job(
                f"tuner.training.finalization:{function}",
                job,
                heard,
                finish_epoch=True,
                folders_to_keep=(*needed, whole) if whole else tuple(needed),
                whole=whole,
                stall=stall_of(self.settings.engine, paced=False),
            )
        finally:
            self.console.close_bars()
        checkpoint_files.remove_training_checkpoints(kept)
        return value


def files_with_weights(job: FinalizeJob | DefaultTestJob) -> list[str]:
    """The files whose weights a job takes; empty where it trains."""
    if isinstance(job, FinalizeJob) and job.soup is not None and job.soup.ingredients:
        return [ingredient.weights_file for ingredient in job.soup.ingredients]
    return [] if job.weights_file is None else [job.weights_file]


def _in_micro_batches(argument: Any, count: int) -> Any:
    """A job's argument, whose training takes a batch in so many micro-batches."""
    if count > 1 and isinstance(argument, Assignment):
        return replace(argument, micro_batches=count)
    if count == 1 or not isinstance(argument, FinalizeJob | DefaultTestJob):
        return argument
    return replace(argument, assignment=replace(argument.assignment, micro_batches=count))


@contextlib.contextmanager
def open_session(
    space: Space, folders: Folders, console: Console, engine: str | None = None
) -> Iterator[Session]:
    name = engine or space.settings.engine.name
    with (
        handle_signals(
            parse_duration(space.settings.search.grace), interrupts_at_once=name == "inline"
        ) as stop,
        plugins.load_plugin("engine", name)(space.settings.engine, console.warn) as carry,
    ):
        yield Session(space, folders, console, carry, stop)


def input_paths(assignments: tuple[Assignment, ...]) -> tuple[str, ...]:
    """The values of `data` and `model` that are paths of existing files or folders."""
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


def outcome_value(outcome: Outcome) -> Any:
    """What a job returned.

    Raises the TunerError with which it was refused, or WorkerError with its traceback.
    """
    if outcome.kind == "done":
        return outcome.value
    if outcome.kind == "refused":
        raise to_tuner_error(outcome)
    if outcome.kind == "lost":
        hint = (
            "is there enough memory?"
            if outcome.loss_cause == "memory"
            else "the same command tries again"
        )
        raise DataError(f"a worker was lost: {outcome.reason}; {hint}")
    raise WorkerError(outcome.reason, outcome.traceback)


class WorkerError(TunerError):
    """Code that a worker ran raised an exception; `traceback` is for --debug."""

    def __init__(self, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.traceback = trace


def interrupted_error(stop_signal: StopSignal) -> Interrupted:
    return Interrupted(
        stop_signal.signal or 2,
        f"interrupted; `{command(sys.argv[1:])}` continues where it stopped",
    )


def command(words: list[str]) -> str:
    """The command line as it was typed, without the passwords in it."""
    shown = []
    for word in words:
        key, given, value = word.partition("=")
        url = value.strip("'\"")
        shown.append(
            key + given + database_url.without_password(url)
            if database_url.without_password(url) != url
            else word
        )
    return shlex.join(["tuner", *shown])


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Holds the lock of an export's folder, so that only this process makes the export.

    Raises StorageError.
    """
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


def write_yaml(path: Path, tree: dict[str, Any], comment: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(f"# {comment}\n{dump_yaml(tree)}", encoding="utf-8")
