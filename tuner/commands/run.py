"""`tuner run`: from a space file to a published model."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from tuner import manifest
from tuner.commands.combined_listener import CombinedListener
from tuner.commands.console import Console
from tuner.commands.progress import Progress
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
from tuner.config import database_url
from tuner.config.parsing import with_values
from tuner.config.run import Run
from tuner.config.space import Space
from tuner.config.yaml_document import COMMAND_LINE
from tuner.dashboard.artifacts import ArtifactWriter
from tuner.errors import StorageError
from tuner.files import removal
from tuner.files.atomic import remove_leftovers, require_free_space
from tuner.files.checkpoint_files import CHECKPOINTS_FOLDER, CheckpointRetention
from tuner.jobs import AS_MANY_AS_POSSIBLE
from tuner.manifest import PublishedExport
from tuner.messages import DatasetReport
from tuner.search import history, leases, postgresql, storage
from tuner.search.coordinator import Coordinator
from tuner.search.optuna_internals import study_id_of
from tuner.search.pruners import PRUNERS
from tuner.search.study_identity import defaulted_keys, identity

# bytes that must be free beside what is written, for the database and the cache's small things
RESERVE_BYTES = 100_000_000


def run_study(space: Space, folders: Folders, console: Console) -> Summary:
    """Searches until the budget is spent, finalizes the winner, and returns the summary."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    removal.require_own(folders.study_folder(space))
    removal.require_target(folders.study_folder(space) / "export", INSTEAD)
    with open_session(space, folders, console) as s:
        survey = s.survey_models()
        facts = s.inspect_data()
        folder = folders.study_folder(space)
        place = s.settings.storage
        check_free_space(folders, facts)
        with (
            storage.lock_if_local(place, folder),
            storage.database_errors(storage.display_location(place, folder)),
            contextlib.ExitStack() as stack,
        ):
            remove_leftovers(folder)  # what a killed search left
            coordinator = open_coordinator(s, folder, facts.digest, stack)
            before = coordinator.budget_used
            workers = worker_count(space, survey.gpu_count)
            console.start_search(
                coordinator.space,
                lambda: progress_of(coordinator),
                coordinator.study.get_trials(deepcopy=False),
                facts,
                survey,
                workers,
            )
            try:
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
            return finalize_once(
                s, coordinator, folder, new_trials=coordinator.budget_used > before
            )


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
            session.go_on,
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

    `per_gpu` for each GPU in use, or one on the CPU; on a Ray cluster as many as it has room for.
    """
    engine = space.settings.engine
    if isinstance(engine.workers, int):
        return engine.workers
    return AS_MANY_AS_POSSIBLE if engine.name == "ray" else max(1, gpus * engine.per_gpu)


def open_coordinator(
    session: Session, folder: Path, data_digest: str, stack: contextlib.ExitStack
) -> Coordinator:
    """Makes or continues the study. `stack` closes the database and ends the lease."""
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

    def open_it() -> tuple[optuna.Study, ArtifactWriter]:
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
        return study, artifacts

    study, artifacts = place.run_exclusively(0, open_it) if place else open_it()
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
    keeping = CheckpointRetention((folder / CHECKPOINTS_FOLDER).absolute(), search.keep)
    coordinator = Coordinator(
        study,
        space,
        session.make_assignment,
        CombinedListener(session.console, artifacts),
        session.stopping,
        lease,
        keeping,
    )
    if warning := coordinator.proposer.warning():
        session.console.warn(warning)
    return coordinator


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


def progress_of(coordinator: Coordinator) -> Progress:
    """The coordinator's counts at this moment."""
    return Progress(
        coordinator.budget_used,
        coordinator.proposer.trial_budget(),
        frozenset(coordinator.running),
    )


def run_to_best_epoch(run: Run, epoch: int, fit: str = "train+valid") -> Run:
    """The winner's run up to its best epoch.

    It is retrained on train and validation examples, or, with `fit="train"`, stays as its trial
    was.
    """
    return replace(
        run,
        recipe=run.recipe.model_copy(update={"fit": fit, "stop_epoch": epoch, "patience": None}),
    )


def choose_export(
    retrain: bool, run: Run, epoch: int, weights: Path | None
) -> tuple[Run, Path | None]:
    """What is exported of a trial: a run, and the weights if it is not retrained.

    With `retrain` the run is trained again on train and validation examples. Without it, the run is
    as its trial was, and `weights` are those that the trial left.
    """
    return (
        (run_to_best_epoch(run, epoch), None)
        if retrain
        else (run_to_best_epoch(run, epoch, fit="train"), weights)
    )


def best_yaml_content(run: Run, session: Session) -> dict[str, Any]:
    """best.yaml: the same form as a space file, with nothing left to choose."""
    settings = session.settings.search
    search = {
        "name": study_name(session.space),
        "metric": settings.metric,
        "direction": settings.direction,
    }
    return run.to_dict() | {
        "search": search,
        "engine": session.settings.engine.model_dump(),
        "export": list(session.settings.export),
    }


def finalize_once(
    session: Session, coordinator: Coordinator, folder: Path, *, new_trials: bool
) -> Summary:
    """Lets one of several coordinators make the export of the winner.

    The others report which coordinator does it, once it has claimed the winner.
    """
    if not coordinator.coordination.is_shared:
        return finalize_best(session, coordinator, folder, new_trials=new_trials)
    winner, tied = history.best_trial(coordinator.study)
    busy = (
        [
            other
            for other in coordinator.coordination.other_coordinators()
            if other.winner_state is None
        ]
        if coordinator.is_past_timeout()
        else []
    )
    other = busy[0] if busy else coordinator.coordination.claim_winner(winner.number)
    if other is not None:
        run = run_to_best_epoch(
            history.run_of_trial(session.space, coordinator.study, winner),
            winner.user_attrs[history.BEST_EPOCH],
        )
        return Summary(
            folder=folder,
            metric=str(session.settings.search.metric),
            direction=session.settings.search.direction or "maximise",
            progress=progress_of(coordinator),
            winner=winner,
            tied_numbers=tied,
            run=run,
            published=None,
            anything_new=True,
            default_trial=history.default_trial(coordinator.study),
            made_elsewhere=other,
        )
    with storage.lock_study(folder):  # `tuner export` writes here too
        summary = finalize_best(session, coordinator, folder, new_trials=new_trials)
    coordinator.coordination.mark_winner_made()
    return summary


def finalize_best(
    session: Session, coordinator: Coordinator, folder: Path, *, new_trials: bool
) -> Summary:
    winner, tied = history.best_trial(coordinator.study)
    trial_run = history.run_of_trial(session.space, coordinator.study, winner)
    draw = history.proposal_numbers(coordinator.study)[winner.number]
    run = run_to_best_epoch(trial_run, winner.user_attrs[history.BEST_EPOCH])
    write_yaml(
        folder / "best.yaml",
        best_yaml_content(run, session),
        f"trial {winner.number} of study {study_name(session.space)!r}; `tuner train` repeats it",
    )
    summary = Summary(
        folder=folder,
        metric=str(session.settings.search.metric),
        direction=session.settings.search.direction or "maximise",
        progress=progress_of(coordinator),
        winner=winner,
        tied_numbers=tied,
        run=run,
        published=None,
        anything_new=new_trials,
        default_trial=history.default_trial(coordinator.study),
    )
    run, weights = choose_export(
        session.settings.search.retrain,
        trial_run,
        winner.user_attrs[history.BEST_EPOCH],
        coordinator.retention.best_weights_of(draw),
    )
    manifest.recover_export(folder / "export")
    published = manifest.read_export(folder / "export")
    if published is None or is_stale(published, run, session.settings.export):
        if weights is None and not session.settings.search.retrain:
            session.console.note(
                "nothing is exported: search.retrain is false, and no weights of trial "
                f"{winner.number} are kept (search.keep)"
            )
            return summary
        published = session.finalize(
            run,
            folder / "export",
            session.settings.export,
            winner.number,
            winner.user_attrs[history.SCORES],
            weights,
        )
        summary = replace(summary, anything_new=True)
    return replace(summary, published=published)


def is_stale(published: PublishedExport, run: Run, formats: tuple[str, ...]) -> bool:
    """Whether an export is of another run, or lacks a format."""
    return published.manifest["run_digest"] != run.digest() or not set(formats) <= set(
        published.manifest["exports"]
    )
