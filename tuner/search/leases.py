"""Which coordinators of a study are alive.

Each coordinator renews a lease in the study's database. A running trial whose coordinator has no
lease is an orphan.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from optuna.trial import FrozenTrial

from tuner.search.history import OWNER
from tuner.search.postgresql import PostgresStorage, connect_options
from tuner.search.retry_policy import ConnectionLost

T = TypeVar("T")
LEASE_SECONDS, RENEWAL_SECONDS = 60.0, 10.0
CREATE_TABLE_SQL = """
CREATE TABLE IF NOT EXISTS tuner_leases (
  coordinator text PRIMARY KEY, study integer NOT NULL, host text NOT NULL, pid integer NOT NULL,
  machine text NOT NULL, folder text NOT NULL, since timestamptz NOT NULL DEFAULT now(),
  expires timestamptz NOT NULL, crown text, winner integer)
"""
# By the database's clock. While the server was down no lease could be renewed, so its start extends
# every lease.
IS_ALIVE_SQL = (
    "greatest(expires, pg_postmaster_start_time() + :valid * interval '1 second') > now()"
)
EXPIRES_SQL = "now() + :valid * interval '1 second'"


@dataclass(frozen=True)
class CoordinatorInfo:
    """What the other coordinators know of a coordinator."""

    coordinator: str
    host: str
    pid: int
    machine_id: str
    folder: str
    since: str
    winner_state: str | None

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host}"

    def is_certainly_dead(self) -> bool:
        """Return whether its process has ended. On another machine that is never certain."""
        if self.machine_id != machine_id():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


def machine_id() -> str:
    """Return a text for this boot and process namespace: in it a process id is unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # so only this process recognises itself


class SingleCoordinator:
    """The coordination of a study with one coordinator: its folder is locked.

    Every running trial that is not this coordinator's is an orphan.
    """

    is_shared = False
    orphan_reason = "orphaned: the search was killed"

    def run_exclusively(self, work: Callable[[], T]) -> T:
        return work()

    def find_orphans(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        return running

    def other_coordinators(self) -> list[CoordinatorInfo]:
        return []

    def claim_winner(self, winner: int) -> CoordinatorInfo | None:
        return None

    def mark_winner_made(self) -> None: ...


class SharedCoordination:
    """The coordination of a study with several coordinators, by leases.

    Each trial has its coordinator's name as an attribute.
    """

    is_shared = True
    orphan_reason = "orphaned: its coordinator is gone, or did not hear that it was made"

    def __init__(self, server: PostgresStorage, study: int, folder: Path) -> None:
        self.server, self.study = server, study
        # the parameters of the SQL statements below
        self.parameters = {
            "me": server.owner,
            "study": study,
            "valid": LEASE_SECONDS,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine_id(),
            "folder": str(folder.resolve()),
        }
        self.stop_event = threading.Event()

    def run_exclusively(self, work: Callable[[], T]) -> T:
        return self.server.run_exclusively(self.study, work)

    def find_orphans(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the orphans among running trials that are not this coordinator's."""
        if not running:
            return []
        alive = {info.coordinator for info in self.other_coordinators()}
        return [t for t in running if t.user_attrs.get(OWNER) not in alive]

    def other_coordinators(self) -> list[CoordinatorInfo]:
        """Return the other coordinators that are alive."""
        leases = self._read_leases(IS_ALIVE_SQL)
        return [info for info in leases if not info.is_certainly_dead()]

    # -- the winner is finalized once

    def claim_winner(self, winner: int) -> CoordinatorInfo | None:
        """Claim to finalize the winner.

        Args:
            winner: The number of the winner's trial.

        Returns:
            None if this coordinator finalizes it. Otherwise the coordinator that finalizes it, or
            that finalized it after this coordinator began.
        """

        def claim() -> CoordinatorInfo | None:
            claims = self._read_leases("crown IS NOT NULL AND winner = :winner", winner=winner)
            for info in claims:
                if info.winner_state == "made" or info in self.other_coordinators():
                    return info
            self._execute(
                "UPDATE tuner_leases SET crown = 'making', winner = :winner "
                "WHERE coordinator = :me",
                winner=winner,
            )
            return None

        return self.run_exclusively(claim)

    def mark_winner_made(self) -> None:
        self._execute(
            "UPDATE tuner_leases SET crown = 'made', expires = now() WHERE coordinator = :me"
        )

    # -- the lease

    def take_lease(self) -> None:
        self._execute(CREATE_TABLE_SQL)
        self._execute(
            f"DELETE FROM tuner_leases WHERE study = :study AND NOT {IS_ALIVE_SQL} "
            "AND expires < now() - interval '1 day'"
        )
        self._execute(
            "INSERT INTO tuner_leases (coordinator, study, host, pid, machine, folder, expires) "
            f"VALUES (:me, :study, :host, :pid, :machine, :folder, {EXPIRES_SQL}) "
            "ON CONFLICT DO NOTHING"
        )

    def release_lease(self) -> None:
        """End the lease, once.

        The row stays where it says that the winner was finalized, for coordinators that still
        run. Where the server is away, the lease ends by itself.
        """
        with contextlib.suppress(ConnectionLost, sqlalchemy.exc.SQLAlchemyError):
            self._execute_once(
                "DELETE FROM tuner_leases WHERE coordinator = :me "
                "AND crown IS DISTINCT FROM 'made'",
                self.parameters,
            )

    def keep_renewing(self) -> None:
        """Renew the lease until `stop_event` is set. This runs in a thread beside the search.

        It has a connection of its own. Where the server is away, it tries again at the next turn.
        """
        url = self.server.engine.url
        engine = sqlalchemy.create_engine(
            url, pool_size=1, pool_pre_ping=True, connect_args=connect_options(url)
        )
        renewal = sqlalchemy.text(
            f"UPDATE tuner_leases SET expires = {EXPIRES_SQL} WHERE coordinator = :me "
            "AND crown IS DISTINCT FROM 'made'"
        )
        while not self.stop_event.wait(RENEWAL_SECONDS):
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), engine.begin() as connection:
                connection.execute(renewal, {"me": self.parameters["me"], "valid": LEASE_SECONDS})
        engine.dispose()

    def _read_leases(self, condition: str, **parameters: Any) -> list[CoordinatorInfo]:
        """Return the other coordinators whose leases meet an SQL condition.

        Those that finalized the winner before this coordinator began are left out.
        """
        statement = (
            "SELECT coordinator, host, pid, machine, folder, to_char(since, 'HH24:MI'), crown "
            "FROM tuner_leases WHERE study = :study "
            f"AND coordinator <> :me AND ({condition}) AND (crown IS DISTINCT FROM 'made' "
            "OR expires >= (SELECT since FROM tuner_leases WHERE coordinator = :me))"
        )
        return [CoordinatorInfo(*row) for row in self._execute(statement, **parameters)]

    def _execute(self, statement: str, **parameters: Any) -> list[Any]:
        return self.server.with_retry(
            lambda: self._execute_once(statement, self.parameters | parameters)
        )

    def _execute_once(self, statement: str, parameters: dict[str, Any]) -> list[Any]:
        with self.server.engine.begin() as connection:
            result = connection.execute(sqlalchemy.text(statement), parameters)
            return list(result) if result.returns_rows else []


def alive_coordinators(engine: sqlalchemy.Engine, study: int) -> list[str]:
    """Return the coordinators of a study that are alive, in words; nothing is written.

    Args:
        engine: The connection to the PostgreSQL server.
        study: The study's id in the database.
    """
    if not sqlalchemy.inspect(engine).has_table("tuner_leases"):
        return []
    statement = sqlalchemy.text(
        "SELECT coordinator, host, pid, machine, folder, to_char(since, 'HH24:MI'), crown "
        f"FROM tuner_leases WHERE study = :study AND ({IS_ALIVE_SQL}) "
        "AND crown IS DISTINCT FROM 'made'"
    )
    with engine.connect() as connection:
        rows = list(connection.execute(statement, {"study": study, "valid": LEASE_SECONDS}))
    found = [CoordinatorInfo(*row) for row in rows]
    return [f"{info} since {info.since}" for info in found if not info.is_certainly_dead()]


@contextlib.contextmanager
def join_coordination(
    server: PostgresStorage | None, study: int, folder: Path
) -> Iterator[SingleCoordinator | SharedCoordination]:
    """Join the coordinators of a study while the block runs.

    Args:
        server: The PostgreSQL server that the study is on, or None: there is one coordinator.
        study: The study's id in the database.
        folder: The study's folder.
    """
    if server is None:
        yield SingleCoordinator()
        return
    coordination = SharedCoordination(server, study, folder)
    # two coordinators that begin at the same time would both make the table
    server.run_exclusively(0, coordination.take_lease)
    renewal = threading.Thread(target=coordination.keep_renewing, name="tuner-lease", daemon=True)
    renewal.start()
    try:
        yield coordination
    finally:
        coordination.stop_event.set()
        renewal.join(1)
        coordination.release_lease()
