"""A study's folder, its lock and its database.

Also the check that a space file continues the study that is in the database.
"""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy

from tuner.config import database_url, yaml_document
from tuner.config.objective import Direction
from tuner.config.requirements import pip_install
from tuner.config.yaml_document import describe_value
from tuner.errors import SpaceError, StorageError
from tuner.files import mounts
from tuner.files.atomic import claimed, disk_errors
from tuner.files.crash_points import crash_point
from tuner.search import postgresql
from tuner.search.bulk_reads import use_bulk_reads
from tuner.search.optuna_internals import warn_of_missing
from tuner.search.retry_policy import ConnectionLost, one_line_reason
from tuner.search.study_identity import Comparison

OPTUNA_DIRECTIONS: Mapping[Direction, Literal["maximize", "minimize"]] = {
    "maximise": "maximize",
    "minimise": "minimize",
}
SPACE_ATTRIBUTE, DATA_ATTRIBUTE, DEFAULTED = "tuner:space", "tuner:data", "tuner:defaulted"


@contextlib.contextmanager
def lock_study(folder: Path, name: str = "lock") -> Iterator[None]:
    """Lock a study while the block runs. The kernel frees the lock however the process ends.

    Args:
        folder: The study's folder, which is made if need be.
        name: The name of the lock file.

    Raises:
        StorageError: Another process has the lock.
    """
    create_folder(folder)
    quoted = repr(folder.name).replace("{", "{{").replace("}", "}}")
    busy = f"study {quoted} is being run by {{holder}}; wait for it, or use another search.name"
    with claimed(folder / name, busy):
        yield


def create_folder(folder: Path) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def stated(folder: Path) -> str | None:
    """Return the `storage:` of a study's file.

    No other key is read, because the modules that they name may not be on this machine.

    Raises:
        SpaceError: The file cannot be read, or the URL is wrong.
    """
    document = yaml_document.read_document(folder / "space.yaml")
    url = document.content.get("storage")
    problems = database_url.find_url_problems(url) if isinstance(url, str) else []
    if url is not None and not isinstance(url, str):
        problems = [
            f"expected a database URL such as postgresql://host/name, got {describe_value(url)}"
        ]
    if problems:
        raise SpaceError(*(document.format_problem(("storage",), problem) for problem in problems))
    return url


@contextlib.contextmanager
def lock_if_local(url: str | None, folder: Path) -> Iterator[None]:
    """Make a study's folder, and lock the study while the block runs if its database is a file.

    A study on a server is not locked: several coordinators may run it.
    """
    with contextlib.ExitStack() as stack:
        if url is None or not is_postgresql(url):
            stack.enter_context(lock_study(folder))
        if url is not None:
            path = database_url.sqlite_path(database_url.expand_variables(url))
            if path:  # the study of another folder may be in the same file
                stack.enter_context(lock_study(path.parent, f"{path.name}.lock"))
        create_folder(folder)
        yield


def is_postgresql(url: str) -> bool:
    return database_url.expand_variables(url).startswith(("postgresql:", "postgresql+"))


def open_storage(
    url: str | None,
    folder: Path,
    warn: Callable[[str], None] = lambda text: None,
    should_give_up: Callable[[], bool] = lambda: False,
) -> optuna.storages.BaseStorage:
    """Open a study's database.

    Args:
        url: The URL of the file's `storage:`. None: SQLite in WAL mode in the study's folder.
        folder: The study's folder.
        warn: Shows a warning, for example when a server goes away and when it comes back.
        should_give_up: Whether a server that is away is not waited for any more.

    Raises:
        StorageError: The database cannot be opened or used.
    """
    warn_of_missing(warn)
    try:
        real = None if url is None else database_url.expand_variables(url)
        path = folder / "study.db" if real is None else database_url.sqlite_path(real)
        if real is not None and is_postgresql(real):
            return postgresql.open_postgresql(
                real, display_location(url, folder), warn, should_give_up
            )
        if path is not None:
            _refuse_network_file_system(path.parent, warn)
            return _open_sqlite(path)
        assert real is not None
        storage = optuna.storages.RDBStorage(
            database_url.escape_braces(real),
            engine_kwargs={"pool_pre_ping": True, "pool_recycle": 1800},
        )
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        ImportError,
        RuntimeError,
        ConnectionLost,
    ) as error:
        raise disk_full_error(error, display_location(url, folder)) or storage_error(
            "opened", error, url, folder
        ) from None
    warn(
        f"storage: {display_location(url, folder)} is passed on as it is: "
        "tuner is tested with SQLite and PostgreSQL only"
    )
    return storage


def close_storage(database: optuna.storages.BaseStorage) -> None:
    """End the connections to a server."""
    server = postgresql.postgres_storage_of(database)
    if server is not None:
        server.engine.dispose()


def storage_error(participle: str, error: Exception, url: str | None, folder: Path) -> StorageError:
    """Return an error with the database's message, without passwords, and with what to do.

    Args:
        participle: What cannot be done, such as "opened".
        error: The database's error.
        url: The URL of the file's `storage:`.
        folder: The study's folder.
    """
    cause = error.__cause__ or error
    message = postgresql.reason_without_password(cause, url) if url else one_line_reason(cause)
    hint = ""
    if isinstance(cause, ModuleNotFoundError):
        hint = (
            f"; {pip_install('postgres')}"
            if cause.name == "psycopg"
            else "; install its driver, or write postgresql://…"
        )
    elif url and database_url.expand_variables(url).startswith("postgres:"):
        hint = "; the scheme is called postgresql://, not postgres://"
    elif "pooling mode" in message:  # what PgBouncer says with pool_mode = statement
        hint = f"; {postgresql.POOLED}"
    return StorageError(
        f"storage: {display_location(url, folder)} cannot be {participle}: {message}{hint}"
    )


@contextlib.contextmanager
def database_errors(location: str) -> Iterator[None]:
    """Turn errors of a database that is away, or whose disk is full, into StorageError."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.OperationalError) as error:
        cause = one_line_reason(error.__cause__ or error)
        raise disk_full_error(error, location) or StorageError(
            f"storage: {location} failed while the search ran ({cause}); finished trials are kept: "
            "see to its disk or server and run the same command"
        ) from error


def disk_full_error(error: BaseException, location: str) -> StorageError | None:
    """Return the StorageError for a database's error about a full disk. None: another error."""
    cause: BaseException | None = error
    while cause is not None:
        if (
            "disk is full" in str(cause)
            or "disk I/O error" in str(cause)
            or "No space left" in str(cause)
        ):
            message = str(cause.__cause__ or cause).splitlines()[0]
            return StorageError(
                f"disk full while writing {location} ({message}); finished trials are kept: "
                "free some space and run the same command"
            )
        cause = cause.__cause__
    return None


def display_location(url: str | None, folder: Path) -> str:
    """Return where the study's database is, without the password."""
    if url is None:
        return str(folder / "study.db")
    return database_url.without_password(url)


def _open_sqlite(path: Path) -> optuna.storages.RDBStorage:
    def pragmas(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    url = sqlalchemy.engine.URL.create("sqlite", database=str(path)).render_as_string()
    storage = optuna.storages.RDBStorage(
        database_url.escape_braces(url), engine_kwargs={"connect_args": {"timeout": 60}}
    )
    sqlalchemy.event.listen(storage.engine, "connect", pragmas)
    storage.engine.dispose()  # ends the connections that were made before the listener
    return use_bulk_reads(storage)


def _refuse_network_file_system(folder: Path, warn: Callable[[str], None]) -> None:
    """Raise StorageError on a network file system.

    SQLite's locks and its shared memory are not safe there.
    """
    kind = mounts.kind_of(folder)
    shared = mounts.networked(kind)
    if shared:
        raise StorageError(
            f"storage: {folder} lies on a network file system ({kind}), where SQLite can lose "
            "data; name a folder on a local disk (--studies DIR), or use storage: postgresql://…"
        )
    if kind is not None and shared is None:
        warn(
            f"storage: {folder} lies on a file system of a kind that is not known ({kind}); "
            "if it is shared by several machines, SQLite can lose data there: "
            "use a local disk (--studies DIR), or storage: postgresql://…"
        )


def open_study(
    storage: optuna.storages.BaseStorage,
    name: str,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
    identity: Mapping[str, Any],
    data: str,
    defaulted: Collection[str] = (),
    direction: Direction = "maximise",
) -> optuna.Study:
    """Open the study of this name, or make it.

    Args:
        storage: The database.
        name: The study's name.
        sampler: The sampler, for the study.
        pruner: The pruner, for the study.
        identity: The identity of the space file, see study_identity.py.
        data: The digest of the data.
        defaulted: The dotted keys that the space file leaves at their defaults.
        direction: Whether higher or lower values of its metric are better.

    Raises:
        SpaceError: The study was made from another space or from other data.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
    except KeyError:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction=OPTUNA_DIRECTIONS[direction],
            sampler=sampler,
            pruner=pruner,
        )
        crash_point("study.created")
        return _mark_study(study, identity, data, defaulted)
    created = study.direction.name.lower()
    if created != OPTUNA_DIRECTIONS[direction]:
        raise SpaceError(
            f"study {name!r} was created with direction={created}, this file {direction}s; "
            "use another search.name"
        )
    if SPACE_ATTRIBUTE not in study.user_attrs and not study.get_trials(deepcopy=False):
        # the process that made it was killed, or lost the server, at that moment
        return _mark_study(study, identity, data, defaulted)
    if SPACE_ATTRIBUTE not in study.user_attrs:
        raise SpaceError(f"study {name!r} was not made by tuner; use another search.name")
    compared = _compared(study.user_attrs, identity, defaulted)
    problems = [f"study {name!r} was created {difference}" for difference in compared.problems]
    if not problems and study.user_attrs.get(DATA_ATTRIBUTE) not in (None, data):
        problems = [
            f"study {name!r} was created with other data: "
            "the images, their labels or their split have changed"
        ]
    if problems:
        raise SpaceError(
            *problems,
            f"study {name!r}: put these back, or use another search.name; the study is untouched",
        )
    return study


def earlier_defaults(
    storage: optuna.storages.BaseStorage,
    name: str,
    identity: Mapping[str, Any],
    defaulted: Collection[str],
) -> dict[str, Any]:
    """Return the earlier values of the defaults that have changed since the study was made.

    Returns:
        The values by dotted key. It is empty where there is no study.
    """
    try:
        attrs = storage.get_study_user_attrs(storage.get_study_id_from_name(name))
    except KeyError:
        return {}
    return _compared(attrs, identity, defaulted).earlier if SPACE_ATTRIBUTE in attrs else {}


def _compared(
    attrs: Mapping[str, Any], identity: Mapping[str, Any], defaulted: Collection[str]
) -> Comparison:
    return Comparison(
        json.loads(attrs[SPACE_ATTRIBUTE]), attrs.get(DEFAULTED, ()), identity, defaulted
    )


def _mark_study(
    study: optuna.Study, identity: Mapping[str, Any], data: str, defaulted: Collection[str]
) -> optuna.Study:
    """Write into the study of what space and data it is."""
    study.set_user_attr(DATA_ATTRIBUTE, data)
    study.set_user_attr(DEFAULTED, list(defaulted))
    # this attribute is written last, because it marks the study as tuner's
    study.set_user_attr(SPACE_ATTRIBUTE, json.dumps(identity))
    return study
