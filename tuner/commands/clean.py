"""`tuner clean`: removes what a study no longer needs, and what killed runs left.

With --cache it removes the cache entries that nobody reads.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import typer

from tuner.commands.session import home_folder
from tuner.dashboard.server import find_study, open_read_only
from tuner.errors import DataError, SpaceError, StorageError
from tuner.files import removal
from tuner.files.atomic import disk_errors, remove_leftovers
from tuner.files.cache_entries import disk_usage, evict_entry
from tuner.files.tracker_folders import is_tracker_folder
from tuner.search import postgresql, storage
from tuner.search.leases import join_coordination

CACHE_LABELS = {
    "activations": "remembered activations",
    "images": "decoded images",
    "tokens": "encoded texts",
    "probes": "probed heads",
    "unpacked": "unpacked data",
    "checkpoints": "checkpoints",
}
DOWNLOAD_LABELS = {
    "weights": "downloaded weights",
    "hub": "models of the hub",
    "data": "downloaded data",
}  # shown, never removed


@dataclass(frozen=True)
class RemovableItem:
    """Something that takes up space, and how it is removed: `remove` says whether it could be."""

    kind: str
    path: Path
    bytes: int
    remove: Callable[[], bool]


@dataclass(frozen=True)
class CleanResult:
    """What was, or would be, removed, and what stayed because somebody uses it."""

    removed: tuple[RemovableItem, ...]
    kept: tuple[RemovableItem, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.removed)


def sizes_by_kind(folder: Path) -> dict[str, int]:
    """The bytes of a study's folder by kind."""
    kinds = {
        "study.db": "trials",
        "study.db-wal": "trials",
        "study.db-shm": "trials",
        "artifacts": "artifacts",
        "checkpoints": "checkpoints",
    }
    sizes: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        kind = (
            "leftovers"
            if removal.is_left(path)
            else "exports"
            if removal.files_of_export(path) is not None
            else "trackers"
            if is_tracker_folder(path)
            else kinds.get(path.name, "other" if removal.is_of_study(path) else "not tuner's")
        )
        sizes[kind] = sizes.get(kind, 0) + disk_usage(path)
    return sizes


def list_study_items(folder: Path, *, whole_study: bool) -> list[RemovableItem]:
    """What a study that nobody runs can do without.

    Leftovers of killed runs and checkpoints; all of it where `whole`.
    """
    if whole_study:
        own = sum(disk_usage(path) for path in folder.iterdir() if removal.is_of_study(path))
        return [
            RemovableItem(
                "study", folder, own, lambda: _delete_from_database(folder) and remove_study(folder)
            )
        ]
    paths = [
        path
        for path in sorted(folder.iterdir())
        if (path.name == "checkpoints" and not count_interrupted_trials(folder))
        or (removal.is_left(path) and not _is_needed(path))
    ]
    return [
        RemovableItem(
            "checkpoints" if path.name == "checkpoints" else "leftovers",
            path,
            disk_usage(path),
            _remover(removal.remove_of_study, path),
        )
        for path in paths
    ]


def count_interrupted_trials(folder: Path) -> int:
    """How many of a study's trials were interrupted and will go on from their checkpoints."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        database = open_read_only(storage.stated(folder), folder)
        with contextlib.ExitStack() as ends:
            ends.callback(database.engine.dispose)
            trials = database.get_all_trials(
                database.get_study_id_from_name(folder.resolve().name), deepcopy=False
            )
    except (StorageError, KeyError):  # it was killed before it had a trial
        return 0
    return sum(not trial.state.is_finished() for trial in trials)


def _is_needed(path: Path) -> bool:
    """An export that a killed run moved away and has not replaced: the next run puts it back."""
    return path.suffix == ".old" and not path.with_name(path.stem[1:]).exists()


def _remover(remove: Callable[[Path], object], path: Path) -> Callable[[], bool]:
    """What removes `path`, if it has tuner's marks, and says whether it is gone."""

    def gone() -> bool:
        with disk_errors(path):
            remove(path)
        return not path.exists()

    return gone


def remove_study(folder: Path) -> bool:
    with disk_errors(folder):
        removal.remove_study(folder)
    return True


def _delete_from_database(folder: Path) -> bool:
    """Removes the study from its database, where that is not in its folder.

    Raises StorageError while others run it.
    """
    url = storage.stated(folder)
    if url is None:
        return True
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database, name = storage.open_storage(url, folder), folder.resolve().name
    with (
        contextlib.ExitStack() as ends,
        storage.database_errors(storage.display_location(url, folder)),
        contextlib.suppress(KeyError),
    ):
        ends.callback(storage.close_storage, database)
        study = database.get_study_id_from_name(name)  # KeyError: it is gone already
        lease = ends.enter_context(
            join_coordination(postgresql.postgres_storage_of(database), study, folder)
        )
        if others := lease.other_coordinators():
            raise StorageError(
                f"{name} is being run by {', '.join(map(str, others))}; stop it first"
            )
        optuna.delete_study(study_name=name, storage=database)
    return True


def list_cache_items(home: Path) -> Iterator[RemovableItem]:
    """Every entry of the caches in `home`, and the notes beside them."""
    for name, kind in CACHE_LABELS.items():
        parent = home / name
        if not parent.is_dir():
            continue
        for path in sorted(parent.glob("[!.]*")):
            if removal.is_entry(path):
                yield RemovableItem(kind, path, disk_usage(path), _evicter(path))
            elif removal.NOTE.fullmatch(path.name):
                yield RemovableItem(
                    kind, path, disk_usage(path), _remover(removal.remove_file, path)
                )


def _evicter(path: Path) -> Callable[[], bool]:
    return lambda: evict_entry(path)


def remove_items(items: list[RemovableItem], *, dry_run: bool) -> CleanResult:
    """Removes what nobody uses; with `dry` nothing."""
    done = {id(item): dry_run or item.remove() for item in items}
    if not dry_run:
        for parent in {item.path.parent for item in items}:
            if parent.is_dir() and parent.name in CACHE_LABELS:
                remove_leftovers(parent)
    return CleanResult(
        tuple(item for item in items if done[id(item)]),
        tuple(item for item in items if not done[id(item)]),
    )


def find_removable_study(studies: Path, name: str) -> Path:
    """A study's folder.

    Raises DataError with the nearest name; StorageError where it is no folder that may be removed.
    """
    folder = find_study(studies, name)
    if folder.is_symlink():
        raise StorageError(f"{folder} is a link; clean what it points to by its own path")
    if not removal.is_study(folder):
        raise DataError(
            f"{folder} holds no study of tuner's: its space.yaml was not written by `tuner run` "
            "(it does not begin with "
            f"{removal.HEADERS['space.yaml'].strip()!r}); nothing was removed"
        )
    return folder


def strangers(folder: Path, *, dry: bool) -> list[str]:
    """What lies in a study's folder, or in its exports, and is not tuner's.

    All that is left of it, unless `dry`.
    """
    inside = [
        f"{path.name}/{name}"
        for path in sorted(folder.iterdir())
        if removal.files_of_export(path) is not None
        for name in removal.strangers(path)
    ]
    beside = (p.name for p in folder.iterdir() if not removal.is_of_study(p) or not dry)
    return inside + sorted(beside)


def format_megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def run_clean(
    studies: Path,
    study: str | None,
    *,
    whole_study: bool,
    cache: bool,
    dry_run: bool,
    assume_yes: bool,
) -> None:
    """The command, saying line by line what is there and what was done.

    Raises StorageError while the study is being run.
    """
    if study is None and not cache:
        raise SpaceError("clean: name a study, or say --cache")
    if study is not None:
        folder = find_removable_study(studies, study)
        with storage.lock_study(folder):
            there = sizes_by_kind(folder)
            typer.echo(
                f"study {folder.name}: "
                + ", ".join(f"{kind} {format_megabytes(count)}" for kind, count in there.items())
            )
            if (
                whole_study
                and not dry_run
                and not assume_yes
                and not typer.confirm(
                    f"remove {folder} with {format_megabytes(sum(there.values()))}?"
                )
            ):
                typer.echo("nothing was removed")
                return
            if (waiting := count_interrupted_trials(folder)) and not whole_study:
                typer.echo(
                    f"{waiting} trials were interrupted and will go on, so checkpoints are kept; "
                    "finish them with `tuner run`"
                )
            print_result(
                remove_items(list_study_items(folder, whole_study=whole_study), dry_run=dry_run),
                dry_run=dry_run,
            )
            if whole_study and folder.is_dir() and (others := strangers(folder, dry=dry_run)):
                verb = "would keep" if dry_run else "kept"
                typer.echo(f"{verb} what tuner did not make: {', '.join(others)}")
    if cache:
        home = home_folder(lambda _: None)
        for name, kind in DOWNLOAD_LABELS.items():
            if (home / name).is_dir():
                typer.echo(
                    f"{home / name}: {kind}, {format_megabytes(disk_usage(home / name))}, are kept"
                )
        print_result(remove_items(list(list_cache_items(home)), dry_run=dry_run), dry_run=dry_run)


def print_result(cleaned: CleanResult, *, dry_run: bool) -> None:
    """A line for each kind, and one for what stayed."""
    verb = "would remove" if dry_run else "removed"
    for kind in dict.fromkeys(item.kind for item in cleaned.removed):
        items = [item for item in cleaned.removed if item.kind == kind]
        where = items[0].path if len(items) == 1 else items[0].path.parent
        typer.echo(f"{verb} {kind}: {where}, {format_megabytes(sum(item.bytes for item in items))}")
    if cleaned.kept:
        typer.echo(
            f"kept {len(cleaned.kept)} entries that are being used, "
            f"{format_megabytes(sum(item.bytes for item in cleaned.kept))}"
        )
    typer.echo(
        f"{verb} {format_megabytes(cleaned.bytes)} in all"
        if cleaned.removed
        else "nothing to remove"
    )
