"""A study as it lies on the disk, read by commands that change nothing in it.

Of space.yaml only plain values are read: the modules that it names may not be on this machine.
"""

import fcntl
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner.config import yaml_document
from tuner.config.objective import Direction
from tuner.config.search_settings import AS_MANY_AS_FIT
from tuner.dashboard.server import find_study, open_read_only
from tuner.errors import DataError, SpaceError
from tuner.files.removal import MANIFEST
from tuner.manifest import PublishedExport, read_export
from tuner.search import history, leases, storage
from tuner.search.optuna_internals import study_id_of

LOCK_HOLDER = re.compile(r"pid (?P<pid>\d+) on host (?P<host>\S+)")


@dataclass(frozen=True)
class StudyView:
    """A study at this moment.

    `content` is what its space.yaml says, with every default. `coordinators`: the processes that
    run it now, in words. `database` is open until `close`, or until the command ends.
    """

    folder: Path
    content: Mapping[str, Any]
    study: optuna.Study
    coordinators: tuple[str, ...]
    database: optuna.storages.RDBStorage

    def close(self) -> None:
        """Ends the connections to the database."""
        self.database.engine.dispose()

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def search(self) -> Mapping[str, Any]:
        """The section `search` of space.yaml."""
        section = self.content.get("search")
        return section if isinstance(section, dict) else {}

    @property
    def metric(self) -> str:
        """The metric; older studies wrote none where it was the task's own."""
        return str(self.search.get("metric") or (self.study.metric_names or ["score"])[0])

    @property
    def direction(self) -> Direction:
        return "minimise" if self.study.direction == StudyDirection.MINIMIZE else "maximise"

    @cached_property
    def trials(self) -> list[FrozenTrial]:
        """The trials by number, without those that only wait for their turn."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state != TrialState.WAITING]

    @property
    def budget(self) -> int:
        """The number of trials that may end; 0 where the time alone is the budget.

        A study of an earlier version has only `search.trials`, which may be above it.
        """
        known = self.study.user_attrs.get(history.BUDGET)
        trials = int(known or self.search.get("trials") or 0)
        return 0 if trials == AS_MANY_AS_FIT else trials

    @cached_property
    def budget_used(self) -> int:
        return len(history.own_proposals(self.study))

    @cached_property
    def ranked(self) -> list[FrozenTrial]:
        """The completed trials, the best first; repeats of known parameters are left out."""
        ranks = {t.number: history.trial_rank(t, self.study.direction) for t in self.trials}
        completed = [t for t in self.trials if ranks[t.number] is not None]
        return sorted(completed, key=lambda t: ranks[t.number] or (0, 0, 0))

    @cached_property
    def published(self) -> PublishedExport | None:
        """The winner's export. Raises DataError where it is damaged."""
        return read_export(self.folder / "export")

    @property
    def state(self) -> str:
        """`running`, `done` or `stopped`; `tuner run` continues a stopped study."""
        if self.coordinators:
            return "running"
        is_done = (self.folder / "export" / MANIFEST).is_file() and not self._has_open_trials
        return "done" if is_done or self.budget_used >= self.budget > 0 else "stopped"

    @property
    def _has_open_trials(self) -> bool:
        return any(t.state == TrialState.RUNNING for t in self.trials)

    def trial(self, number: int) -> FrozenTrial:
        """The trial of this number. Raises DataError."""
        for trial in self.trials:
            if trial.number == number:
                return trial
        last = max((t.number for t in self.trials), default=-1)
        known = f"trials 0 to {last}" if last >= 0 else "no trial yet"
        raise DataError(f"study {self.name!r} has {known}, not {number}")


def open_view(studies: Path, name: str | None) -> StudyView:
    """Opens a study by name or path; without a name, the one that changed last.

    Raises DataError where there is no such study, SpaceError and StorageError where it cannot be
    read.
    """
    return open_folder(find_study(studies, name))


def open_folder(folder: Path) -> StudyView:
    """Opens the study in a folder. Raises DataError, SpaceError, StorageError."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    content = yaml_document.read_document(folder / "space.yaml").content
    if not isinstance(content, dict):
        raise SpaceError(f"{folder / 'space.yaml'}: expected the sections of a space file")
    url = storage.stated(folder)
    database = open_read_only(url, folder)
    try:
        study = optuna.load_study(study_name=folder.resolve().name, storage=database)
    except KeyError:
        raise DataError(
            f"study {folder.name!r} is not in its storage; `tuner run` makes it again"
        ) from None
    if url is not None and storage.is_postgresql(url):
        coordinators = leases.alive_coordinators(database.engine, study_id_of(study))
    else:
        holder = lock_holder(folder / "lock")
        coordinators = [holder] if holder else []
    return StudyView(folder, content, study, tuple(coordinators), database)


def lock_holder(path: Path) -> str | None:
    """The process that holds a lock file, as `pid 42 on host a since 12:30`; None: nobody.

    The lock is tried only where its holder may be alive, so that a process that starts at this
    moment does not find it taken.
    """
    try:
        with path.open() as file:
            holder = file.read().strip()
            match = LOCK_HOLDER.match(holder)
            if match is None or _is_dead(int(match["pid"]), match["host"]):
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder
    except OSError:
        return None
    return None


def _is_dead(pid: int, host: str) -> bool:
    """Whether a process has ended. Of another machine's this is never certain."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def trial_seconds(trial: FrozenTrial) -> float | None:
    """How long a trial ran, in seconds; None while it runs."""
    return trial.duration.total_seconds() if trial.duration is not None else None
