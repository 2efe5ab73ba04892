"""`tuner run`: from a space file to a published model."""

import contextlib
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from tuner.commands.combined_listener import CombinedListener
from tuner.commands.console import Console
from tuner.commands.earlier_studies import describe_taken, read_earlier_studies
from tuner.commands.ended_search import EndedSearch
from tuner.commands.finishing_times import FinishingClock, FinishingTimes
from tuner.commands.gpu_sharing import measure_first_trials
from tuner.commands.plan_notes import PlanNotes
from tuner.commands.session import (
    INSTEAD,
    Folders,
    Session,
    interrupted_error,
    open_session,
    study_name,
    write_yaml,
)
from tuner.commands.summary import Summary
from tuner.commands.tracking import Tracking, require_trackers
from tuner.commands.winner import finalize_once, progress_of
from tuner.config import database_url
from tuner.config.fields import format_value
from tuner.config.parsing import with_values
from tuner.config.run import ConfirmSettings, SearchSettings, parse_duration
from tuner.config.space import Space, key_of_parameter
from tuner.config.yaml_document import COMMAND_LINE
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.errors import StorageError, count_words
from tuner.files import removal
from tuner.files.atomic import remove_leftovers, require_free_space
from tuner.files.checkpoint_files import CHECKPOINTS_FOLDER, CheckpointRetention
from tuner.jobs import AS_MANY_AS_POSSIBLE
from tuner.messages import DatasetReport
from tuner.search import history, leases, postgresql, storage
from tuner.search.coordinator import Coordinator
from tuner.search.earlier_trials import EarlierStudy, TakenTrials, take_over
from tuner.search.optuna_internals import study_id_of
from tuner.search.pruners import PRUNERS
from tuner.search.study_identity import defaulted_keys, identity
from tuner.search.time_left import TimeLeft
from tuner.search.time_limit import TimeLimit

# bytes that must be free beside what is written, for the database and the cache's small things
RESERVE_BYTES = 100_000_000


def run_study(
    space: Space, folders: Folders, console: Console, began: float | None = None
) -> Summary:
    """Searches until the budget is spent, makes the winner and the report, returns the summary.

    `began`: when the command began, by `time.monotonic()`; None: now.
    """
    began = time.monotonic() if began is None else began
    summary, finishing = search_and_finalize(space, folders, console, began)
    if summary.made_elsewhere is None:
        from tuner.commands.report import write_report_of

        write_report_of(summary.folder, console)
    finishing.end()
    return summary


def search_and_finalize(
    space: Space, folders: Folders, console: Console, began: float
) -> tuple[Summary, FinishingClock]:
    """The summary, and the clock that measures what follows the search."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    require_trackers(space)
    removal.require_own(folders.study_folder(space))
    removal.require_target(folders.study_folder(space) / "export", INSTEAD)
    with open_session(space, folders, console) as s:
        survey = s.survey_models()
        facts = s.inspect_data()
        earlier_studies = read_earlier_studies(s, facts.digest)
        folder = folders.study_folder(space)
        place = s.settings.storage
        check_free_space(folders, facts)
        with (
            storage.lock_if_local(place, folder),
            storage.database_errors(storage.display_location(place, folder)),
            contextlib.ExitStack() as stack,
        ):
            remove_leftovers(folder)  # what a killed search left
            workers = worker_count(space, survey.gpu_count)
            times = FinishingTimes(folders.home, space, survey, facts)
            limit = make_time_limit(s.settings.search, began, times, workers)
            profiles = PlanNotes(folders.home, space, survey, facts).read()
            time_left = TimeLeft(space, survey.max_depths, workers, profiles)
            coordinator, tracking = open_coordinator(
                s, folder, facts.digest, stack, time_left, limit, earlier_studies
            )
            sizes = facts.split_sizes["train"], facts.split_sizes["valid"]
            history.keep_split_sizes(coordinator.study, *sizes, facts.macro_count)
            before = coordinator.budget_used
            console.start_search(
                coordinator.space,
                lambda: progress_of(coordinator, time_left),
                coordinator.study.get_trials(deepcopy=False),
                facts,
                survey,
                workers,
            )
            try:
                if s.settings.engine.per_gpu == "auto" and survey.gpu_count:
                    workers = measure_first_trials(s, coordinator, survey.gpu_count)
                search_until_done(s, coordinator, workers)
            except StorageError:
                if s.stop_signal:  # the database went away, and who waited for it had enough
                    raise interrupted_error(s.stop_signal) from None
                raise
            finally:
                console.close_bars()
            if s.stop_signal:
                raise interrupted_error(s.stop_signal)
            if coordinator.fatal_error is not None:
                raise coordinator.fatal_error
            if coordinator.end_reason is not None:
                console.note(f"the search ends: {coordinator.end_reason}")
            is_new = coordinator.budget_used > before
            clock = FinishingClock(times, limit)
            ended = EndedSearch(s, coordinator, folder, sizes, workers, is_new, clock)
            summary = finalize_once(ended)
            tracking.on_winner(summary)
            return summary, clock


def make_time_limit(
    search: SearchSettings, began: float, times: FinishingTimes, workers: int
) -> TimeLimit | None:
    """The limit that `search.time` states."""
    if search.time is None:
        return None
    finishing = times.read(time.monotonic() - began)
    return TimeLimit(parse_duration(search.time), began, finishing, workers)


def search_until_done(session: Session, coordinator: Coordinator, workers: int) -> None:
    """Searches until the budget is spent, also where other coordinators spend a part of it.

    It waits for the trials of the other coordinators, and takes up what they leave when they die.
    """
    noted = False
    while True:
        session.run_jobs(
            coordinator.next_job,
            coordinator.report,
            coordinator.on_job_end,
            lambda: session.go_on() and not coordinator.must_end_now(),
            workers,
        )
        if (
            session.stop_signal
            or coordinator.fatal_error is not None
            or not coordinator.waits_for_others()
        ):
            return
        if not noted:
            noted = True
            session.console.note(
                "the budget is handed out; waiting for the trials that other coordinators run"
            )
        time.sleep(0.2)


def check_free_space(folders: Folders, facts: DatasetReport) -> None:
    """Checks, before anything begins, that the disk has space for the export and what is beside it.

    Raises StorageError.
    """
    need = 3 * 4 * facts.parameter_count + RESERVE_BYTES
    for place in (folders.studies, folders.home):
        require_free_space(
            place,
            need,
            f"three times the model's size, and {RESERVE_BYTES / 1e6:.0f} MB in reserve",
        )


def worker_count(space: Space, gpus: int) -> int:
    """How many workers carry out trials, unless the file says it.

    `per_gpu` for each GPU in use, one for each `gpus_per_trial` of them, or one on the CPU; on a
    Ray cluster as many as it has room for.
    """
    engine = space.settings.engine
    if isinstance(engine.workers, int):
        return engine.workers
    if engine.name == "ray":
        return AS_MANY_AS_POSSIBLE
    return max(1, gpus * engine.gpu_sharing // engine.rank_count)


def open_coordinator(
    session: Session,
    folder: Path,
    data_digest: str,
    stack: contextlib.ExitStack,
    time_left: TimeLeft,
    time_limit: TimeLimit | None = None,
    earlier_studies: tuple[EarlierStudy, ...] = (),
) -> tuple[Coordinator, Tracking]:
    """Makes or continues the study, and takes over the fitting trials of earlier ones.

    `stack` lets the trackers come to their end, closes the database and ends the lease.
    """
    space, search = session.space, session.settings.search
    database = storage.open_storage(
        session.settings.storage, folder, session.console.warn, lambda: session.stop_signal.is_now
    )
    stack.callback(storage.close_storage, database)
    place = postgresql.postgres_storage_of(database)
    if database_url.literal_password(session.settings.storage or ""):
        seen = (
            ", and shows in the list of processes"
            if space.document.location(("storage",)) == COMMAND_LINE
            else ""
        )
        session.console.warn(
            f"storage: the password that is written there is not kept{seen}; `tuner dashboard` "
            "and `tuner export` will ask for it: "
            "write ${NAME} in its place, or use PGPASSWORD or ~/.pgpass"
        )

    earlier = storage.earlier_defaults(
        database, study_name(space), identity(space), defaulted_keys(space)
    )
    if earlier:
        data_digest = keep_earlier_defaults(session, earlier, data_digest)
        space = session.space

    def open_it() -> tuple[optuna.Study, ArtifactWriter, list[TakenTrials]]:
        sampler = optuna.samplers.RandomSampler()  # each ask brings its own
        pruner = PRUNERS[search.pruner](max_epochs(space))
        study = storage.open_study(
            database,
            study_name(space),
            sampler,
            pruner,
            identity(space),
            data_digest,
            defaulted_keys(space),
            search.direction or "maximise",
        )
        artifacts = ArtifactWriter(study, folder, str(search.metric))
        artifacts.write_study_note(space)
        return study, artifacts, take_over(study, space, earlier_studies)

    study, artifacts, taken_trials = place.run_exclusively(0, open_it) if place else open_it()
    for line in describe_taken(taken_trials):
        session.console.note(line)
    write_yaml(
        folder / "space.yaml",
        with_study_name(space).to_dict(),
        f"what study {study_name(space)!r} searches, with every default",
    )
    lease = stack.enter_context(leases.join_coordination(place, study_id_of(study), folder))
    for other in lease.other_coordinators():
        session.console.note(
            f"study {study.study_name!r} is also being run by {other} since {other.since}"
        )
    keeping = CheckpointRetention((folder / CHECKPOINTS_FOLDER).absolute(), kept_count(search))
    tracking = Tracking(session, study, folder)
    stack.callback(tracking.close)
    coordinator = Coordinator(
        study,
        space,
        session.make_assignment,
        CombinedListener(session.console, artifacts, tracking, time_left),
        session.stopping,
        lease,
        keeping,
        folder,
        time_limit,
    )
    if warning := coordinator.proposer.warning():
        session.console.warn(warning)
    late = coordinator.proposer.late_guesses(coordinator.ledger.proposal_count)
    if late and search.sampler != "grid":
        session.console.warn(late_guess_warning(folder, late))
    return coordinator, tracking


def late_guess_warning(folder: Path, guesses: list[dict[str, Any]]) -> str:
    """What becomes of recipes that a file says to try first when the search has begun."""
    name = folder.name if folder.parent == Path("studies") else str(folder)
    settings = [f"{key_of_parameter(k)}={format_value(v)}" for k, v in guesses[0].items()]
    return (
        f"try: {count_words(len(guesses), 'recipe was', 'recipes were')} added after the search "
        "had begun, and will not be tried by itself; have each tried next, such as with "
        f"`tuner enqueue {shlex.join([name, *settings])}`"
    )


def kept_count(search: SearchSettings) -> int:
    """Of how many trials the weights are kept: `search.keep`, and those of every trial that may
    win where the winner is not retrained, or where others are averaged with it.
    """
    if (
        search.needs_no_weights
        or search.keep == 0
        or not isinstance(search.confirm, ConfirmSettings)
    ):
        return search.keep
    return max(search.keep, search.confirm.top)


def with_study_name(space: Space) -> Space:
    """The space with its study's name, which its file may have left to the name of the file."""
    search = space.settings.search.model_copy(update={"name": study_name(space)})
    return replace(space, settings=replace(space.settings, search=search))


def keep_earlier_defaults(s: Session, earlier: dict[str, Any], data_digest: str) -> str:
    """Gives the session's space the defaults with which its study was made.

    Returns the digest of the data that they describe.
    """
    values = {tuple(key.split(".")): value for key, value in earlier.items()}
    listed = ", ".join(f"{key}={value}" for key, value in earlier.items())
    s.console.note(
        f"study {study_name(s.space)!r} goes on with the defaults that it was created with: "
        f"{listed}"
    )
    s.space = with_values(s.space.document, values)
    if all(path[0] == "recipe" for path in values):
        return data_digest
    return s.inspect_data().digest


def max_epochs(space: Space) -> int:
    """The most epochs that a trial of this space can have."""
    return int(space.highest(("recipe", "epochs")))
