"""`tuner run`: the whole way from a space to a published model."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from tuner import manifest
from tuner.commands.console import Console
from tuner.commands.session import (
    INSTEAD,
    Places,
    Session,
    interrupted,
    session,
    study_name,
    write_yaml,
)
from tuner.commands.summary import Summary
from tuner.config import database_url
from tuner.config.parsing import with_values
from tuner.config.run import Run
from tuner.config.space import Range, Space
from tuner.config.yaml_document import COMMAND_LINE
from tuner.dashboard.artifacts import Artifacts
from tuner.errors import StorageError
from tuner.files import removal
from tuner.files.atomic import require_space, sweep
from tuner.files.checkpoint_files import FOLDER, Keeping
from tuner.jobs import AS_MANY
from tuner.manifest import Published
from tuner.messages import Facts
from tuner.search import history, leases, postgresql, storage
from tuner.search.coordinator import Coordinator
from tuner.search.optuna_internals import study_id_of
from tuner.search.samplers import PRUNERS
from tuner.search.study_identity import defaulted_keys, identity

RESERVE = 100_000_000  # bytes that must be free beside what is written, for the database and the cache's small things


def run_study(space: Space, places: Places, console: Console) -> Summary:
    """Searches until the budget is spent, crowns the best, and says what came out."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    removal.require_own(places.folder(space))
    removal.require_target(places.folder(space) / "export", INSTEAD)
    with session(space, places, console) as s:
        survey = s.survey()
        facts = s.inspect()
        folder = places.folder(space)
        place = s.settings.storage
        preflight(places, facts)
        with (
            storage.held(place, folder),
            storage.database_errors(storage.shown(place, folder)),
            contextlib.ExitStack() as stack,
        ):
            sweep(folder)  # what a killed search left
            coordinator = open_coordinator(s, folder, facts.digest, stack)
            before = coordinator.closed
            workers = workers_of(space, survey.gpus)
            console.begin(coordinator, facts, survey, workers)
            try:
                search(s, coordinator, workers)
            except StorageError:
                if s.stop:  # the database went away, and who waited for it had enough
                    raise interrupted(s.stop) from None
                raise
            finally:
                console.pause()
            if s.stop:
                raise interrupted(s.stop)
            if coordinator.error is not None:
                raise coordinator.error
            return crown_once(s, coordinator, folder, fresh=coordinator.closed > before)


def search(s: Session, coordinator: Coordinator, workers: int) -> None:
    """Until the budget is spent, also by other coordinators: what these leave behind when they die is taken up."""
    said = False
    while True:
        s.carry(
            coordinator.next_job,
            coordinator.report,
            coordinator.ended,
            s.go_on,
            workers,
        )
        if s.stop or coordinator.error is not None or not coordinator.waits():
            return
        if not said:
            said = True
            s.console.note(
                "the budget is handed out; waiting for the trials that other coordinators run"
            )
        time.sleep(0.2)


def preflight(places: Places, facts: Facts) -> None:
    """Room for the export and for what is written beside it, before anything is begun. Raises StorageError."""
    need = 3 * 4 * facts.parameters + RESERVE
    for place in (places.studies, places.home):
        require_space(
            place, need, f"three times the model's size, and {RESERVE / 1e6:.0f} MB in reserve"
        )


def workers_of(space: Space, gpus: int) -> int:
    """`per_gpu` for each of the GPUs in use, or one on the CPU, unless the file says otherwise; on a Ray cluster as many as it has room for."""
    engine = space.settings.engine
    if isinstance(engine.workers, int):
        return engine.workers
    return AS_MANY if engine.name == "ray" else max(1, gpus * engine.per_gpu)


def open_coordinator(
    s: Session, folder: Path, data_digest: str, stack: contextlib.ExitStack
) -> Coordinator:
    """`stack` is where its lease ends, if it needs one."""
    space, search = s.space, s.settings.search
    database = storage.connect(s.settings.storage, folder, s.console.warn, lambda: s.stop.now)
    stack.callback(storage.close, database)
    place = postgresql.of(database)
    if database_url.written_password(s.settings.storage or ""):
        seen = (
            ", and shows in the list of processes"
            if space.document.where(("storage",)) == COMMAND_LINE
            else ""
        )
        s.console.warn(
            f"storage: the password that is written there is not kept{seen}; `tuner dashboard` and `tuner export` will ask for it: "
            "write ${NAME} in its place, or use PGPASSWORD or ~/.pgpass"
        )

    earlier = storage.earlier_defaults(
        database, study_name(space), identity(space), defaulted_keys(space)
    )
    if earlier:
        data_digest = keep_earlier_defaults(s, earlier, data_digest)
        space = s.space

    def open_it() -> tuple[optuna.Study, Artifacts]:
        sampler = optuna.samplers.RandomSampler()  # each ask brings its own
        pruner = PRUNERS[search.pruner](longest(space))
        study = storage.open_study(
            database,
            study_name(space),
            sampler,
            pruner,
            identity(space),
            data_digest,
            defaulted_keys(space),
        )
        artifacts = Artifacts(study, folder, str(search.metric))
        artifacts.describe(space)
        return study, artifacts

    study, artifacts = place.exclusively(0, open_it) if place else open_it()
    write_yaml(
        folder / "space.yaml",
        space.tree(),
        f"what study {study_name(space)!r} searches, with every default",
    )
    lease = stack.enter_context(leases.leased(place, study_id_of(study), folder))
    for other in lease.others():
        s.console.note(
            f"study {study.study_name!r} is also being run by {other} since {other.since}"
        )
    keeping = Keeping((folder / FOLDER).absolute(), search.keep)
    coordinator = Coordinator(
        study, space, s.assignment, Both(s.console, artifacts), s.stopping, lease, keeping
    )
    if warning := coordinator.asker.warning():
        s.console.warn(warning)
    return coordinator


def keep_earlier_defaults(s: Session, earlier: dict[str, Any], data_digest: str) -> str:
    """Gives the session's space the defaults that its study was made with. Returns the digest of the data that they name."""
    values = {tuple(key.split(".")): value for key, value in earlier.items()}
    listed = ", ".join(f"{key}={value}" for key, value in earlier.items())
    s.console.note(
        f"study {study_name(s.space)!r} goes on with the defaults that it was created with: {listed}"
    )
    s.space = with_values(s.space.document, values)
    if all(path[0] == "recipe" for path in values):
        return data_digest
    return s.inspect().digest


def longest(space: Space) -> int:
    """The most epochs that a trial of this space can have."""
    leaf = next((d.leaf for d in space.dimensions if d.path == ("recipe", "epochs")), None)
    if leaf is None:
        return int(space.values["recipe", "epochs"])
    return int(leaf.high if isinstance(leaf, Range) else max(leaf.options))


class Both:
    """The console and the dashboard's artifacts as one listener."""

    def __init__(self, console: Console, artifacts: Artifacts) -> None:
        self.epoch, self.ended, self.files = console.epoch, console.ended, artifacts.files


def best_run(run: Run, epoch: int, fit: str = "train+valid") -> Run:
    """The winner's run up to its best epoch: to be retrained on train and validation, or, with fit: train, as its trial went."""
    return replace(
        run,
        recipe=run.recipe.model_copy(update={"fit": fit, "stop_epoch": epoch, "patience": None}),
    )


def to_publish(
    retrain: bool, run: Run, epoch: int, weights: Path | None
) -> tuple[Run, Path | None]:
    """What is exported of a trial's run: it, retrained on train and validation; or, without retraining, as it went, with the weights it left."""
    return (best_run(run, epoch), None) if retrain else (best_run(run, epoch, fit="train"), weights)


def run_tree(run: Run, s: Session) -> dict[str, Any]:
    """best.yaml: the same form as a space file, with nothing left to choose."""
    search = {"name": study_name(s.space), "metric": s.settings.search.metric}
    return run.tree() | {
        "search": search,
        "engine": s.settings.engine.model_dump(),
        "export": list(s.settings.export),
    }


def crown_once(s: Session, coordinator: Coordinator, folder: Path, *, fresh: bool) -> Summary:
    """Of several coordinators one makes the winner; the others say which, once it has been claimed."""
    if not coordinator.leases.shared:
        return crown_best(s, coordinator, folder, fresh=fresh)
    winner, tied = history.best(coordinator.study)
    busy = (
        [other for other in coordinator.leases.others() if other.crown is None]
        if coordinator.late()
        else []
    )
    other = busy[0] if busy else coordinator.leases.crown(winner.number)
    if other is not None:
        run = best_run(
            history.run_of(s.space, coordinator.study, winner),
            winner.user_attrs[history.BEST_EPOCH],
        )
        return Summary(
            folder,
            coordinator,
            winner,
            tied,
            run,
            None,
            True,
            history.default(coordinator.study),
            other,
        )
    with storage.lock(folder):  # `tuner export` writes here too
        found = crown_best(s, coordinator, folder, fresh=fresh)
    coordinator.leases.crowned()
    return found


def crown_best(s: Session, coordinator: Coordinator, folder: Path, *, fresh: bool) -> Summary:
    winner, tied = history.best(coordinator.study)
    found = history.run_of(s.space, coordinator.study, winner)
    draw = history.roots(coordinator.study)[winner.number]
    run = best_run(found, winner.user_attrs[history.BEST_EPOCH])
    write_yaml(
        folder / "best.yaml",
        run_tree(run, s),
        f"trial {winner.number} of study {study_name(s.space)!r}; `tuner train` repeats it",
    )
    summary = Summary(
        folder, coordinator, winner, tied, run, None, fresh, history.default(coordinator.study)
    )
    run, weights = to_publish(
        s.settings.search.retrain,
        found,
        winner.user_attrs[history.BEST_EPOCH],
        coordinator.keeping.weights(draw),
    )
    manifest.recover(folder / "export")
    published = manifest.read(folder / "export")
    if published is None or stale(published, run, s.settings.export):
        if weights is None and not s.settings.search.retrain:
            s.console.note(
                f"nothing is exported: search.retrain is false, and no weights of trial {winner.number} are kept (search.keep)"
            )
            return summary
        published = s.crown(
            run,
            folder / "export",
            s.settings.export,
            winner.number,
            winner.user_attrs[history.SCORES],
            weights,
        )
        summary = replace(summary, fresh=True)
    return replace(summary, published=published)


def stale(published: Published, run: Run, formats: tuple[str, ...]) -> bool:
    """Whether an export is of another run, or lacks a format."""
    return published.manifest["run_digest"] != run.digest() or not set(formats) <= set(
        published.manifest["exports"]
    )
