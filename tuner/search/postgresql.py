"""A study's database on a PostgreSQL server.

Calls are repeated while the server is away (see retry_policy.py). What two coordinators must not
do at the same time is done under a lock.
"""

import contextlib
import secrets
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
from tuner.search.database_proxy import DatabaseProxy
from tuner.search.history import OWNER
from tuner.search.optuna_internals import database_of, require_for_server, table
from tuner.search.retry_policy import (
    ConnectionLost,
    RetryPolicy,
    one_line_reason,
    raise_connection_lost,
)

T = TypeVar("T")
# After so many seconds the server ends a transaction, or a lock, whose owner does nothing.
STALLED_SECONDS = 60
# The first number of tuner's advisory locks. The second number is a study's id, or 0 while tables
# and studies are made.
LOCK_NAMESPACE = 0x74756E65
PROBES = 5
POOLED = (
    "it answers through a connection pooler that hands out the server's sessions by the "
    "transaction, where coordinators cannot lock a study; name the server itself, or a pooler's "
    "port that keeps sessions (PgBouncer: pool_mode = session; Supabase: port 5432)"
)
CONNECT_OPTIONS = {
    "connect_timeout": 8,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}


class PostgresStorage(DatabaseProxy):
    """Stands between Optuna's cache and Optuna's database, and repeats calls until they succeed.

    All calls go over one connection. `run_exclusively` holds the study's lock on this same
    connection. So a coordinator that lost its lock can write nothing: where the connection breaks,
    everything that was begun under the lock is begun again. A trial may be made although its
    coordinator never hears of it. The repeated work finds such a trial: it runs, it has this owner,
    and it is not among the coordinator's running trials.
    """

    def __init__(
        self,
        database: RDBStorage,
        display_url: str,
        warn: Callable[[str], None],
        should_give_up: Callable[[], bool],
    ) -> None:
        self.database = database
        self.engine = database.engine
        self.retry_policy = RetryPolicy(display_url, warn, should_give_up)
        self.owner = uuid.uuid4().hex
        self.locked_connection: Any = None  # the driver's connection that has a lock
        sqlalchemy.event.listen(self.engine, "connect", self._set_idle_timeout)
        sqlalchemy.event.listen(self.engine, "checkout", self._require_locked_connection)
        sqlalchemy.event.listen(self.engine, "handle_error", raise_connection_lost)
        self.engine.dispose()

    # -- calls are repeated while the server is away

    def call_database(self, method: Callable[..., T], *arguments: Any, **named: Any) -> T:
        return self.with_retry(lambda: method(*arguments, **named))

    def with_retry(self, call: Callable[[], T]) -> T:
        """Make a call that may be carried out twice. Raises StorageError, see RetryPolicy."""
        return self.with_retry_flag(lambda is_retry: call())

    def with_retry_flag(self, call: Callable[[bool], T]) -> T:
        """Make a call. Its argument says whether an earlier try may have been carried out.

        Under a lock the call is made once: the whole work under the lock is repeated, see
        `run_exclusively`.
        """
        if self.locked_connection is not None:
            return call(False)
        return self.retry_policy.run(call)

    def _set_idle_timeout(self, connection: Any, _: Any) -> None:
        """Limit how long a coordinator that is stopped in a transaction can block the others."""
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{STALLED_SECONDS}s'")
        connection.commit()

    def _require_locked_connection(self, connection: Any, *_: Any) -> None:
        if self.locked_connection is not None and connection is not self.locked_connection:
            raise ConnectionLost("the connection that held the study's lock is gone")

    # -- one coordinator at a time

    def run_exclusively(self, key: int, work: Callable[[], T]) -> T:
        """Run `work` while no other coordinator runs anything under the same key.

        Args:
            key: The id of a study, or 0 while tables and studies are made.
            work: It is run again from its beginning each time the connection breaks.

        Returns:
            What `work` returns.
        """
        if self.locked_connection is not None:
            return work()

        def run_locked() -> T:
            self._lock(key)
            try:
                return work()
            finally:
                self._unlock(key)

        return self.with_retry(run_locked)

    def _lock(self, key: int) -> None:
        statement = (
            f"SELECT pg_advisory_lock({LOCK_NAMESPACE}, {int(key)}) "
            f"{self._idle_timeout_sql(STALLED_SECONDS)}"
        )
        with self.engine.connect() as connection:
            connection.execute(sqlalchemy.text(statement))
            connection.commit()
            self.locked_connection = connection.connection.dbapi_connection

    def _unlock(self, key: int) -> None:
        statement = (
            f"SELECT pg_advisory_unlock({LOCK_NAMESPACE}, {int(key)}) {self._idle_timeout_sql(0)}"
        )
        try:
            with contextlib.suppress(ConnectionLost), self.engine.connect() as connection:
                connection.execute(sqlalchemy.text(statement))
                connection.commit()
        finally:
            self.locked_connection = None

    def _idle_timeout_sql(self, seconds: int) -> str:
        """Return SQL that limits how long a session with a lock may be idle.

        Servers before version 14 have no such limit.
        """
        known = (self.engine.dialect.server_version_info or (0,)) >= (14,)
        return f", set_config('idle_session_timeout', '{seconds}s', false)" if known else ""

    # -- calls that cannot simply be made twice

    def create_trial(self, study_id: int, template: FrozenTrial | None) -> FrozenTrial:
        """Make a trial. A running trial has its owner from the first moment."""
        if template is None:
            template = create_trial(state=TrialState.RUNNING, user_attrs={OWNER: self.owner})
        return self.call_database(super().create_trial, study_id, template)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set a trial's state and values, as Optuna does.

        Raises:
            UpdateFinishedTrialError: Another process has ended the trial.
        """
        if state == TrialState.RUNNING:
            return self.with_retry(lambda: self._claim_waiting_trial(trial_id))

        def end_trial(is_retry: bool) -> bool:
            try:
                return self.database.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                trial = self.database.get_trial(trial_id)
                ours = (state, list(values) if values else None)
                if is_retry and (trial.state, trial.values) == ours:
                    return True  # an earlier try, of which nothing was heard, had been carried out
                raise

        return self.with_retry_flag(end_trial)

    def _claim_waiting_trial(self, trial_id: int) -> bool:
        """Set a waiting trial to running and to this owner, in one transaction.

        Returns:
            False if the trial does not wait any more.
        """
        trials = table("trials")
        now = datetime.now(UTC).replace(tzinfo=None)  # Optuna's columns are in UTC
        attribute = {"trial_id": trial_id, "key": OWNER, "value_json": f'"{self.owner}"'}
        start = (
            sqlalchemy.update(trials)
            .where(trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING)
            .values(state=TrialState.RUNNING, datetime_start=now)
        )
        set_owner = postgresql.insert(table("trial_user_attributes")).values(attribute)
        set_owner = set_owner.on_conflict_do_update(
            index_elements=["trial_id", "key"], set_={"value_json": set_owner.excluded.value_json}
        )
        with self.engine.begin() as connection:
            was_waiting = connection.execute(start).rowcount == 1
            if was_waiting:
                connection.execute(set_owner)
        return was_waiting

    def insert_rows(self, trial_id: int, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        """Write rows of a running trial, all or none.

        Args:
            trial_id: The trial's id in the database.
            rows: The rows by the name of their table.

        Raises:
            UpdateFinishedTrialError: The trial does not run any more.
        """
        trials = table("trials").c
        state = (
            sqlalchemy.select(trials.state)
            .where(trials.trial_id == trial_id)
            .with_for_update(read=True)
        )

        def write(is_retry: bool) -> None:
            try:
                with self.engine.begin() as connection:
                    if connection.execute(state).scalar_one() != TrialState.RUNNING:
                        raise UpdateFinishedTrialError(
                            f"trial {trial_id} was taken by another coordinator"
                        )
                    for name, values in rows.items():
                        connection.execute(insertion(name, self.engine.dialect.name), values)
            except sqlalchemy.exc.IntegrityError:
                # In a retry the rows are there: the earlier try had been carried out.
                if not is_retry:
                    raise

        self.with_retry_flag(write)


def open_postgresql(
    url: str, display_url: str, warn: Callable[[str], None], should_give_up: Callable[[], bool]
) -> BaseStorage:
    """Open Optuna's storage on a PostgreSQL server.

    Args:
        url: The database's URL with its password.
        display_url: The URL without its password, for messages.
        warn: Is called when the server goes away and when it comes back.
        should_give_up: Whether the server is not waited for any more.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The server cannot be reached now.
        StorageError: A pooler or another version of Optuna cannot be used.
    """
    require_for_server(display_url)
    escaped_url = database_url.escape_braces(url)
    options = connect_options(url)
    if sqlalchemy.engine.make_url(url).get_driver_name() == "psycopg":
        options["prepare_threshold"] = None  # a pooler may not know a prepared statement again
    setup_engine = sqlalchemy.create_engine(
        url, poolclass=sqlalchemy.NullPool, connect_args=options
    )
    _refuse_pooler(setup_engine, display_url)
    # Two coordinators that begin at the same time would both make the tables, so there is a lock.
    with setup_engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({LOCK_NAMESPACE}, 0)"))
        make_tables = RDBStorage(escaped_url, engine_kwargs={"connect_args": connect_options(url)})
        make_tables.engine.dispose()
    setup_engine.dispose()
    pool = {
        "pool_size": 1,
        "max_overflow": 0,
        "pool_pre_ping": True,
        "connect_args": connect_options(url),
    }
    database = use_bulk_reads(
        RDBStorage(
            escaped_url, engine_kwargs=pool, skip_compatibility_check=True, skip_table_creation=True
        )
    )
    storage = get_storage(database)
    PostgresStorage(database, display_url, warn, should_give_up).put_before(storage)
    return storage


def _refuse_pooler(engine: sqlalchemy.Engine, display_url: str) -> None:
    """Raise StorageError where a pooler gives each transaction another session of the server.

    A lock belongs to a session. So one connection takes a lock, and the next transaction of a
    second connection must not have it. A pooler gives that transaction the session that was free
    last, which is the first connection's. Some poolers take turns, so this is tried several times.
    """
    lock_count = sqlalchemy.text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() "
        f"AND classid = {LOCK_NAMESPACE} AND objid = :key"
    )
    lock = sqlalchemy.text(f"SELECT pg_advisory_lock({LOCK_NAMESPACE}, :key)")
    unlock = sqlalchemy.text(f"SELECT pg_advisory_unlock({LOCK_NAMESPACE}, :key)")
    with engine.connect() as first, engine.connect() as second:
        for _ in range(PROBES):
            key = {"key": secrets.randbelow(2**30) + 2**30}  # larger than the id of any study
            first.execute(lock, key)
            first.commit()
            # `second` keeps its session for now, because its transaction stays open
            second_has_lock = second.execute(lock_count, key).scalar_one() > 0
            first_has_lock = first.execute(lock_count, key).scalar_one() > 0
            if second_has_lock or first_has_lock:
                (second if second_has_lock else first).execute(unlock, key)
            first.commit()
            second.commit()
            if second_has_lock or not first_has_lock:
                raise StorageError(f"storage: {display_url} cannot be used: {POOLED}")


def postgres_storage_of(storage: BaseStorage) -> PostgresStorage | None:
    """Return the PostgreSQL server that a storage is on, or None."""
    database = database_of(storage)
    return database if isinstance(database, PostgresStorage) else None


def connect_options(url: str | sqlalchemy.engine.URL) -> dict[str, Any]:
    """Return the driver's options for a connection that the URL does not set itself."""
    parsed = sqlalchemy.engine.make_url(url)
    if parsed.get_driver_name() not in ("psycopg", "psycopg2"):
        return {}
    return {key: value for key, value in CONNECT_OPTIONS.items() if key not in parsed.query}


def reason_without_password(error: BaseException, url: str) -> str:
    return database_url.hide_passwords(one_line_reason(error), url)
