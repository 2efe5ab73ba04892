"""A study's database on a PostgreSQL server: calls wait for it when it goes away, and what coordinators must not do at once has a lock."""

import contextlib
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.dialects import postgresql

from tuner.config import database_url
from tuner.errors import StorageError
from tuner.search.bulk_reads import insertion, use_bulk_reads
from tuner.search.history import OWNER
from tuner.search.optuna_internals import DatabaseProxy, database_of, require_for_server, table

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT, TOTAL_WAIT = (
    0.5,
    30.0,
    600.0,
)  # seconds: the first wait, the longest, all of them together
STALLED_SECONDS = 60  # seconds after which the server ends a transaction, or a lock, whose holder has stopped moving
LOCK_NAMESPACE = 0x74756E65  # the space of tuner's advisory locks; within it a study's id, and 0 for the making of tables and studies
PROBES = 5
POOLED = (
    "it answers through a connection pooler that hands out the server's sessions by the transaction, where coordinators cannot lock "
    "a study; name the server itself, or a pooler's port that keeps sessions (PgBouncer: pool_mode = session; Supabase: port 5432)"
)
CONNECT_OPTIONS = {
    "connect_timeout": 8,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
TRANSIENT_SQLSTATES = {
    "40001",
    "40P01",
    "53300",
    "57P01",
    "57P02",
    "57P03",
    "57P05",
    "25P03",
}  # deadlocks, shutdown, starting up, idle too long
PERMANENT_ERRORS = (
    "authentication failed",
    "does not exist",
    "no password supplied",
    "pg_hba.conf",
    "permission denied",
    "not permitted",
)


class ConnectionLost(Exception):
    """The server went away in the middle of a call: whether that was carried out is not known."""


class PostgresStorage(DatabaseProxy):
    """Takes Optuna's database's place behind Optuna's cache. Calls are tried again until the server answers, for ten minutes.

    All go over one connection. `exclusively` holds the study's lock on that very connection, so nothing can be written by whom the
    lock was taken from; where the connection breaks, all that was begun under the lock is begun again. So a trial that was made
    although nobody heard of it is found by who repeats: it runs, it has this owner, and nobody holds it.
    """

    def __init__(
        self,
        database: RDBStorage,
        display_url: str,
        warn: Callable[[str], None],
        should_give_up: Callable[[], bool],
    ) -> None:
        self.database, self.engine, self.display_url, self.warn, self.should_give_up = (
            database,
            database.engine,
            display_url,
            warn,
            should_give_up,
        )
        self.owner = uuid.uuid4().hex
        self.locked_connection: Any = None  # the connection that holds a lock
        self.last_warning = float("-inf")
        sqlalchemy.event.listen(self.engine, "connect", self._set_idle_timeout)
        sqlalchemy.event.listen(self.engine, "checkout", self._require_locked_connection)
        sqlalchemy.event.listen(self.engine, "handle_error", raise_connection_lost)
        self.engine.dispose()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.database, name)
        if not callable(found):
            return found
        return lambda *words, **named: self.with_retry(lambda again: found(*words, **named))

    # -- the server that goes away

    def with_retry(self, call: Callable[[bool], T]) -> T:
        """What `call` returns. It is told whether an earlier try may have been carried out. Raises StorageError when patience ends."""
        if self.locked_connection is not None:
            return call(False)  # what holds the lock is repeated as a whole
        wait, began, again = FIRST_WAIT, time.monotonic(), False
        while True:
            try:
                found = call(again)
            except ConnectionLost as cause:
                began = began if again else time.monotonic()
                again = True
                if self.should_give_up() or time.monotonic() - began + wait > TOTAL_WAIT:
                    raise StorageError(
                        f"storage: {self.display_url} does not answer ({cause}); finished trials are kept: see to it and run the same command"
                    ) from None
                if time.monotonic() - self.last_warning > 60:
                    self.warn(
                        f"the database does not answer ({cause}); trying again for {TOTAL_WAIT / 60:g} minutes"
                    )
                    self.last_warning = time.monotonic()
                self._sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                if again and self.last_warning >= began:
                    self.warn("the database answers again")
                return found

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.should_give_up():
            time.sleep(0.1)

    def _set_idle_timeout(self, connection: Any, _: Any) -> None:
        """A coordinator that is stopped in a transaction must not hold up the others."""
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{STALLED_SECONDS}s'")
        connection.commit()

    def _require_locked_connection(self, connection: Any, *_: Any) -> None:
        if self.locked_connection is not None and connection is not self.locked_connection:
            raise ConnectionLost("the connection that held the study's lock is gone")

    # -- one at a time

    def run_exclusively(self, key: int, work: Callable[[], T]) -> T:
        """What `work` returns, done while no other coordinator does anything under the same key. It may be done several times over."""
        if self.locked_connection is not None:
            return work()

        def held(_: bool) -> T:
            self._lock(key)
            try:
                return work()
            finally:
                self._unlock(key)

        return self.with_retry(held)

    def _lock(self, key: int) -> None:
        with self.engine.connect() as connection:
            connection.execute(
                sqlalchemy.text(
                    f"SELECT pg_advisory_lock({LOCK_NAMESPACE}, {int(key)}) {self._idle_timeout_sql(STALLED_SECONDS)}"
                )
            )
            connection.commit()
            self.locked_connection = connection.connection.dbapi_connection

    def _unlock(self, key: int) -> None:
        try:
            with contextlib.suppress(ConnectionLost), self.engine.connect() as connection:
                connection.execute(
                    sqlalchemy.text(
                        f"SELECT pg_advisory_unlock({LOCK_NAMESPACE}, {int(key)}) {self._idle_timeout_sql(0)}"
                    )
                )
                connection.commit()
        finally:
            self.locked_connection = None

    def _idle_timeout_sql(self, seconds: int) -> str:
        """Sets how long who holds the lock may be silent; servers before 14 cannot."""
        known = (self.engine.dialect.server_version_info or (0,)) >= (14,)
        return f", set_config('idle_session_timeout', '{seconds}s', false)" if known else ""

    # -- what is not safe to repeat as it is

    def create_trial(self, study_id: int, template: FrozenTrial | None) -> FrozenTrial:
        """A trial that runs has its owner from the first moment."""
        owned = template or create_trial(state=TrialState.RUNNING, user_attrs={OWNER: self.owner})
        make = super().create_trial
        return self.with_retry(lambda again: make(study_id, owned))

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """As Optuna's. Raises UpdateFinishedTrialError when the trial was ended by somebody else."""
        if state == TrialState.RUNNING:
            return self.with_retry(lambda again: self._claim_waiting_trial(trial_id))

        def end(again: bool) -> bool:
            try:
                return self.database.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                found = self.database.get_trial(trial_id)
                if not again or (found.state, found.values) != (
                    state,
                    list(values) if values else None,
                ):
                    raise
                return True  # the try that was not heard of had been carried out

        return self.with_retry(end)

    def _claim_waiting_trial(self, trial_id: int) -> bool:
        """From waiting to running, with its owner, in one transaction."""
        # Optuna's columns are in UTC, by the clock of this machine
        trials, now = table("trials"), datetime.now(UTC).replace(tzinfo=None)
        attribute = {"trial_id": trial_id, "key": OWNER, "value_json": f'"{self.owner}"'}
        waits = sqlalchemy.update(trials).where(
            trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING
        )
        marks = postgresql.insert(table("trial_user_attributes")).values(attribute)
        marks = marks.on_conflict_do_update(
            index_elements=["trial_id", "key"], set_={"value_json": marks.excluded.value_json}
        )
        with self.engine.begin() as connection:
            taken = (
                connection.execute(
                    waits.values(state=TrialState.RUNNING, datetime_start=now)
                ).rowcount
                == 1
            )
            if taken:
                connection.execute(marks)
        return taken

    def insert_rows(self, trial_id: int, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        """A running trial's rows, all or none. Raises UpdateFinishedTrialError when it does not run any more."""
        trials = table("trials").c
        state = (
            sqlalchemy.select(trials.state)
            .where(trials.trial_id == trial_id)
            .with_for_update(read=True)
        )

        def write(again: bool) -> None:
            try:
                with self.engine.begin() as connection:
                    if connection.execute(state).scalar_one() != TrialState.RUNNING:
                        raise UpdateFinishedTrialError(
                            f"trial {trial_id} was taken by another coordinator"
                        )
                    for name, values in rows.items():
                        connection.execute(insertion(name, self.engine.dialect.name), values)
            except sqlalchemy.exc.IntegrityError:
                if not again:
                    raise  # else the try that was not heard of had been carried out

        self.with_retry(write)


def open_postgresql(
    url: str, display_url: str, warn: Callable[[str], None], should_give_up: Callable[[], bool]
) -> BaseStorage:
    """Optuna's storage over a server. Raises what the driver raises when it cannot be reached now."""
    require_for_server(display_url)
    doubled = database_url.escape_braces(url)
    words = connect_options(url)
    if sqlalchemy.engine.make_url(url).get_driver_name() == "psycopg":
        words["prepare_threshold"] = None  # a pooler may not know a prepared statement again
    gate = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=words)
    _refuse_pooler(gate, display_url)
    with gate.connect() as connection:  # two that begin at once would both make the tables
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({LOCK_NAMESPACE}, 0)"))
        RDBStorage(doubled, engine_kwargs={"connect_args": connect_options(url)}).engine.dispose()
    gate.dispose()
    pool = {
        "pool_size": 1,
        "max_overflow": 0,
        "pool_pre_ping": True,
        "connect_args": connect_options(url),
    }
    database = use_bulk_reads(
        RDBStorage(
            doubled, engine_kwargs=pool, skip_compatibility_check=True, skip_table_creation=True
        )
    )
    storage = get_storage(database)
    PostgresStorage(database, display_url, warn, should_give_up).put_before(storage)
    return storage


def _refuse_pooler(gate: sqlalchemy.Engine, shown: str) -> None:
    """Raises StorageError where a pooler gives each transaction another session of the server.

    A lock belongs to a session. So one connection takes a lock, and the next transaction of another one, which a pooler gives the
    session that was free last, must not hold it. Some poolers take turns, so this is done several times.
    """
    held = sqlalchemy.text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() "
        f"AND classid = {LOCK_NAMESPACE} AND objid = :key"
    )
    with gate.connect() as holder, gate.connect() as other:
        for _ in range(PROBES):
            key = {"key": secrets.randbelow(2**30) + 2**30}  # no study's id
            holder.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({LOCK_NAMESPACE}, :key)"), key)
            holder.commit()
            # `other` keeps its session, as its transaction stays open
            shared = other.execute(held, key).scalar_one() > 0
            lasts = holder.execute(held, key).scalar_one() > 0
            if shared or lasts:
                unlock = sqlalchemy.text(f"SELECT pg_advisory_unlock({LOCK_NAMESPACE}, :key)")
                (other if shared else holder).execute(unlock, key)
            holder.commit()
            other.commit()
            if shared or not lasts:
                raise StorageError(f"storage: {shown} cannot be used: {POOLED}")


def postgres_storage_of(storage: BaseStorage) -> PostgresStorage | None:
    """The server that a storage is on."""
    database = database_of(storage)
    return database if isinstance(database, PostgresStorage) else None


def connect_options(url: str | sqlalchemy.engine.URL) -> dict[str, Any]:
    """How to connect, as far as the URL leaves it open."""
    written = sqlalchemy.engine.make_url(url)
    usual = CONNECT_OPTIONS if written.get_driver_name() in ("psycopg", "psycopg2") else {}
    return {key: value for key, value in usual.items() if key not in written.query}


def raise_connection_lost(context: sqlalchemy.engine.ExceptionContext) -> None:
    """Turns the driver's words for a server that went away into Lost; what will not pass stays as it is."""
    error = context.original_exception
    connecting = context.connection is None and isinstance(
        error, context.dialect.loaded_dbapi.OperationalError
    )
    lasting = connecting and any(word in str(error) for word in PERMANENT_ERRORS)
    if context.is_pre_ping or lasting:
        return
    if (
        context.is_disconnect
        or connecting
        or getattr(error, "sqlstate", None) in TRANSIENT_SQLSTATES
    ):
        raise ConnectionLost(one_line_reason(error)) from None


def one_line_reason(error: BaseException) -> str:
    """The driver's words on one line; several addresses make several."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


def reason_without_password(error: BaseException, url: str) -> str:
    return database_url.hide_passwords(one_line_reason(error), url)
