"""`search.from`: the earlier studies that a file names are read before anything is made."""

import contextlib
from dataclasses import replace
from typing import Any

from tuner.commands.export import load_study_space
from tuner.commands.session import Session
from tuner.commands.study_view import StudyView, open_folder
from tuner.config.fields import format_value
from tuner.config.run import Run
from tuner.config.space import Space
from tuner.config.yaml_document import Document
from tuner.dashboard.server import find_study
from tuner.errors import DataError, SpaceError
from tuner.messages import DatasetReport
from tuner.search.earlier_trials import EarlierStudy, TakenTrials, read_trials
from tuner.search.storage import DATA_ATTRIBUTE
from tuner.search.study_identity import LOCATIONS

KEY = ("search", "from")


def read_earlier_studies(session: Session, data_digest: str) -> tuple[EarlierStudy, ...]:
    """The studies of `search.from` with their trials.

    Args:
        session: The command's session, which reads the data again where a study prepared them in
            another way, such as in another size.
        data_digest: The digest of this file's data.

    Raises:
        SpaceError: A study does not exist, or has another metric, direction or data.
    """
    document = session.space.document
    own = session.folders.study_folder(session.space).resolve()
    found = []
    for name in session.settings.search.earlier_studies:
        try:
            folder = find_study(session.folders.studies, name)
        except DataError as error:
            raise SpaceError(document.format_problem(KEY, str(error))) from None
        if folder.resolve() == own:
            raise SpaceError(
                document.format_problem(
                    KEY, f"{name!r} is this study; name others, or choose another search.name"
                )
            )
        with contextlib.closing(open_folder(folder)) as view:
            found.append(_read_study(session, view, name, data_digest))
    return tuple(found)


def _read_study(session: Session, view: StudyView, name: str, data_digest: str) -> EarlierStudy:
    document, search = session.space.document, session.settings.search
    _require_same(document, name, "search.metric", view.metric, str(search.metric))
    _require_same(
        document, name, "search.direction", view.direction, search.direction or "maximise"
    )
    earlier_space = load_study_space(view.folder)
    for key, (before, now) in _other_data_keys(earlier_space, session.space).items():
        _require_same(document, name, key, before, now)
    stored = view.study.user_attrs.get(DATA_ATTRIBUTE)
    if stored != data_digest and stored != _digest_as_read_by(session, earlier_space):
        raise SpaceError(
            document.format_problem(
                KEY,
                f"study {name!r} has other data: the examples, their labels or their split are not "
                "those of this file, so its scores do not compare; drop it from the list",
            )
        )
    return read_trials(earlier_space, view.study, name)


def _require_same(document: Document, name: str, key: str, before: Any, now: Any) -> None:
    if before != now:
        shown = [format_value(value) for value in (before, now)]
        raise SpaceError(
            document.format_problem(
                KEY,
                f"study {name!r} has {key}={shown[0]}, this file {shown[1]}, so their trials do "
                f"not compare; write {key}={shown[0]}, or drop the study from the list",
            )
        )


def _other_data_keys(earlier: Space, own: Space) -> dict[str, tuple[Any, Any]]:
    """The values of the keys of task and data that neither space searches, by dotted key."""
    searched = {d.path for d in (*earlier.dimensions, *own.dimensions)}
    keys = {
        ".".join(path): (earlier.values.get(path), own.values.get(path))
        for path in (*earlier.values, *own.values)
        if path[0] in ("task", "data") and path not in searched
    }
    return {key: values for key, values in keys.items() if key not in LOCATIONS}


def _digest_as_read_by(session: Session, earlier_space: Space) -> str | None:
    """The digest of this file's data, prepared as an earlier study prepared its data."""
    *_, run = earlier_space.plugin_combinations()
    own = session.space.make_run({})
    assignment = session.make_assignment(_at_location_of(run, own), allow_downloads=False)
    try:
        report: DatasetReport = session.run_job(
            "tuner.training.worker_jobs:inspect_data", (assignment,)
        )
    except (DataError, SpaceError):
        return None  # the earlier study's keys do not fit this data
    return report.digest


def _at_location_of(run: Run, own: Run) -> Run:
    """A run whose data lie where those of another run do."""
    keys = [location.removeprefix("data.") for location in LOCATIONS]
    options = {**run.data.options} | {k: own.data.options[k] for k in keys if k in own.data.options}
    return replace(run, data=replace(run.data, options=options))


def describe_taken(results: list[TakenTrials]) -> list[str]:
    """A line for each study of which something was taken over, or nothing ever was."""
    return [f"from   {result.describe()}" for result in results if result.taken or not result.known]
