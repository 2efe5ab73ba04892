"""`tuner clean`: what a study no longer needs, what killed runs left, and the caches that nobody is reading."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import typer

from tuner.commands.session import home_folder
from tuner.dashboard.server import find, reader
from tuner.errors import DataError, SpaceError, StorageError
from tuner.files import removal
from tuner.files.atomic import disk_errors, sweep
from tuner.files.cache_entries import evict, size
from tuner.search import postgresql, storage
from tuner.search.leases import leased

CACHES = {
    "activations": "remembered activations",
    "images": "decoded images",
    "tokens": "encoded texts",
    "probes": "probed heads",
    "checkpoints": "checkpoints",
}
DOWNLOADS = {
    "weights": "downloaded weights",
    "hub": "models of the hub",
    "data": "downloaded data",
}  # shown, never removed


@dataclass(frozen=True)
class Item:
    """Something that takes up space, and how it is removed: `remove` says whether it could be."""

    kind: str
    path: Path
    bytes: int
    remove: Callable[[], bool]


@dataclass(frozen=True)
class Cleaned:
    """What was, or would be, removed, and what stayed because somebody uses it."""

    removed: tuple[Item, ...]
    kept: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.removed)


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of a study's folder by kind."""
    kinds = {
        "study.db": "trials",
        "study.db-wal": "trials",
        "study.db-shm": "trials",
        "artifacts": "artifacts",
        "checkpoints": "checkpoints",
    }
    found: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        kind = (
            "leftovers"
            if removal.is_left(path)
            else "exports"
            if removal.files_of_export(path) is not None
            else kinds.get(path.name, "other" if removal.is_of_study(path) else "not tuner's")
        )
        found[kind] = found.get(kind, 0) + size(path)
    return found


def of_study(folder: Path, *, whole: bool) -> list[Item]:
    """What a study that nobody runs can do without: leftovers of killed runs and checkpoints; all of it where `whole`."""
    if whole:
        own = sum(size(path) for path in folder.iterdir() if removal.is_of_study(path))
        return [Item("study", folder, own, lambda: _forget(folder) and remove_study(folder))]
    found = [
        path
        for path in sorted(folder.iterdir())
        if (path.name == "checkpoints" and not to_go_on(folder))
        or (removal.is_left(path) and not _needed(path))
    ]
    return [
        Item(
            "checkpoints" if path.name == "checkpoints" else "leftovers",
            path,
            size(path),
            _remover(removal.remove_of_study, path),
        )
        for path in found
    ]


def to_go_on(folder: Path) -> int:
    """How many of a study's trials were interrupted and will go on from their checkpoints."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        database = reader(storage.stated(folder), folder)
        with contextlib.ExitStack() as ends:
            ends.callback(database.engine.dispose)
            trials = database.get_all_trials(
                database.get_study_id_from_name(folder.resolve().name), deepcopy=False
            )
    except (StorageError, KeyError):  # it was killed before it had a trial
        return 0
    return sum(not trial.state.is_finished() for trial in trials)


def _needed(path: Path) -> bool:
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


def _forget(folder: Path) -> bool:
    """Removes the study from its database, where that is not in its folder. Raises StorageError while others run it."""
    url = storage.stated(folder)
    if url is None:
        return True
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database, name = storage.connect(url, folder), folder.resolve().name
    with (
        contextlib.ExitStack() as ends,
        storage.database_errors(storage.shown(url, folder)),
        contextlib.suppress(KeyError),
    ):
        ends.callback(storage.close, database)
        study = database.get_study_id_from_name(name)  # KeyError: it is gone already
        lease = ends.enter_context(leased(postgresql.of(database), study, folder))
        if others := lease.others():
            raise StorageError(
                f"{name} is being run by {', '.join(map(str, others))}; stop it first"
            )
        optuna.delete_study(study_name=name, storage=database)
    return True


def of_caches(home: Path) -> Iterator[Item]:
    """Every entry of the caches in `home`, and the notes beside them."""
    for name, kind in CACHES.items():
        parent = home / name
        if not parent.is_dir():
            continue
        for path in sorted(parent.glob("[!.]*")):
            if removal.is_entry(path):
                yield Item(kind, path, size(path), _evicter(path))
            elif removal.NOTE.fullmatch(path.name):
                yield Item(kind, path, size(path), _remover(removal.remove_file, path))


def _evicter(path: Path) -> Callable[[], bool]:
    return lambda: evict(path)


def clean(items: list[Item], *, dry: bool) -> Cleaned:
    """Removes what nobody uses; with `dry` nothing."""
    done = {id(item): dry or item.remove() for item in items}
    if not dry:
        for parent in {item.path.parent for item in items}:
            if parent.is_dir() and parent.name in CACHES:
                sweep(parent)
    return Cleaned(
        tuple(item for item in items if done[id(item)]),
        tuple(item for item in items if not done[id(item)]),
    )


def found(studies: Path, name: str) -> Path:
    """A study's folder. Raises DataError with the nearest name; StorageError where it is no folder that may be removed."""
    folder = find(studies, name)
    if folder.is_symlink():
        raise StorageError(f"{folder} is a link; clean what it points to by its own path")
    if not removal.is_study(folder):
        raise DataError(
            f"{folder} holds no study of tuner's: its space.yaml was not written by `tuner run` (it does not begin with "
            f"{removal.HEADERS['space.yaml'].strip()!r}); nothing was removed"
        )
    return folder


def strangers(folder: Path, *, dry: bool) -> list[str]:
    """What lies in a study's folder, or in its exports, and is not tuner's: all that is left of it, unless `dry`."""
    inside = [
        f"{path.name}/{name}"
        for path in sorted(folder.iterdir())
        if removal.files_of_export(path) is not None
        for name in removal.strangers(path)
    ]
    beside = (p.name for p in folder.iterdir() if not removal.is_of_study(p) or not dry)
    return inside + sorted(beside)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def carry_out(
    studies: Path, study: str | None, *, all_: bool, cache: bool, dry: bool, sure: bool
) -> None:
    """The command, saying line by line what is there and what was done. Raises StorageError while the study is being run."""
    if study is None and not cache:
        raise SpaceError("clean: name a study, or say --cache")
    if study is not None:
        folder = found(studies, study)
        with storage.lock(folder):
            there = sizes(folder)
            typer.echo(
                f"study {folder.name}: "
                + ", ".join(f"{kind} {megabytes(count)}" for kind, count in there.items())
            )
            if (
                all_
                and not dry
                and not sure
                and not typer.confirm(f"remove {folder} with {megabytes(sum(there.values()))}?")
            ):
                typer.echo("nothing was removed")
                return
            if (waiting := to_go_on(folder)) and not all_:
                typer.echo(
                    f"{waiting} trials were interrupted and will go on, so checkpoints are kept; finish them with `tuner run`"
                )
            told(clean(of_study(folder, whole=all_), dry=dry), dry=dry)
            if all_ and folder.is_dir() and (others := strangers(folder, dry=dry)):
                verb = "would keep" if dry else "kept"
                typer.echo(f"{verb} what tuner did not make: {', '.join(others)}")
    if cache:
        home = home_folder(lambda _: None)
        for name, kind in DOWNLOADS.items():
            if (home / name).is_dir():
                typer.echo(f"{home / name}: {kind}, {megabytes(size(home / name))}, are kept")
        told(clean(list(of_caches(home)), dry=dry), dry=dry)


def told(cleaned: Cleaned, *, dry: bool) -> None:
    """A line for each kind, and one for what stayed."""
    verb = "would remove" if dry else "removed"
    for kind in dict.fromkeys(item.kind for item in cleaned.removed):
        items = [item for item in cleaned.removed if item.kind == kind]
        where = items[0].path if len(items) == 1 else items[0].path.parent
        typer.echo(f"{verb} {kind}: {where}, {megabytes(sum(item.bytes for item in items))}")
    if cleaned.kept:
        typer.echo(
            f"kept {len(cleaned.kept)} entries that are being used, {megabytes(sum(item.bytes for item in cleaned.kept))}"
        )
    typer.echo(
        f"{verb} {megabytes(cleaned.bytes)} in all" if cleaned.removed else "nothing to remove"
    )
