"""Which coordinators of a study are alive: each renews a lease in the study's database, and the running trials of the others are orphans."""

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
LEASE_SECONDS, RENEWAL_SECONDS = 60.0, 10.0  # seconds
CREATE_TABLE_SQL = """
CREATE TABLE IF NOT EXISTS tuner_leases (
  coordinator text PRIMARY KEY, study integer NOT NULL, host text NOT NULL, pid integer NOT NULL, machine text NOT NULL, folder text NOT NULL,
  since timestamptz NOT NULL DEFAULT now(), expires timestamptz NOT NULL, crown text, winner integer)
"""
# by the database's clock; while the server was down nobody could renew, so its start gives everybody another term
IS_ALIVE_SQL = (
    "greatest(expires, pg_postmaster_start_time() + :valid * interval '1 second') > now()"
)
EXPIRES_SQL = "now() + :valid * interval '1 second'"


@dataclass(frozen=True)
class CoordinatorInfo:
    """A coordinator, as the others see it."""

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
        """Whether it certainly is; nobody knows of other machines."""
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
    """Where process ids mean the same: this boot, this namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # only this process then knows itself


class SingleCoordinator:
    """A study that nobody else can run: its folder is locked. Whatever runs without us is an orphan."""

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
    """This coordinator's lease, and what it knows of the others'. Its owner's name marks its trials."""

    is_shared = True
    orphan_reason = "orphaned: its coordinator is gone, or did not hear that it was made"

    def __init__(self, server: PostgresStorage, study: int, folder: Path) -> None:
        self.server, self.study = server, study
        place = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine_id(),
            "folder": str(folder.resolve()),
        }
        self.row = {"me": server.owner, "study": study, "valid": LEASE_SECONDS, **place}
        self.stop_event = threading.Event()

    def run_exclusively(self, work: Callable[[], T]) -> T:
        return self.server.run_exclusively(self.study, work)

    def find_orphans(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those of `running`, none of which we hold, that nobody alive holds."""
        if not running:
            return []
        alive = {holder.coordinator for holder in self.other_coordinators()}
        return [t for t in running if t.user_attrs.get(OWNER) not in alive]

    def other_coordinators(self) -> list[CoordinatorInfo]:
        """The other coordinators that are alive."""
        return [
            holder for holder in self._read_leases(IS_ALIVE_SQL) if not holder.is_certainly_dead()
        ]

    # -- the winner is made once

    def claim_winner(self, winner: int) -> CoordinatorInfo | None:
        """None: making the winner is ours. Otherwise who makes it, or has made it since we began."""

        def claim() -> CoordinatorInfo | None:
            for holder in self._read_leases(
                "crown IS NOT NULL AND winner = :winner", winner=winner
            ):
                if holder.winner_state == "made" or holder in self.other_coordinators():
                    return holder
            self._execute(
                "UPDATE tuner_leases SET crown = 'making', winner = :winner WHERE coordinator = :me",
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
            f"DELETE FROM tuner_leases WHERE study = :study AND NOT {IS_ALIVE_SQL} AND expires < now() - interval '1 day'"
        )
        self._execute(
            "INSERT INTO tuner_leases (coordinator, study, host, pid, machine, folder, expires) "
            f"VALUES (:me, :study, :host, :pid, :machine, :folder, {EXPIRES_SQL}) ON CONFLICT DO NOTHING"
        )

    def release_lease(self) -> None:
        """What is left behind is that the winner was made, for those who are still at it."""
        with contextlib.suppress(
            ConnectionLost, sqlalchemy.exc.SQLAlchemyError
        ):  # where the server is away, the lease ends by itself
            self._execute_once(
                "DELETE FROM tuner_leases WHERE coordinator = :me AND crown IS DISTINCT FROM 'made'",
                self.row,
            )

    def keep_renewing(self) -> None:
        """Runs beside the search, over a connection of its own; a server that is away is asked again at the next turn."""
        url = self.server.engine.url
        engine = sqlalchemy.create_engine(
            url, pool_size=1, pool_pre_ping=True, connect_args=connect_options(url)
        )
        renewal = sqlalchemy.text(
            f"UPDATE tuner_leases SET expires = {EXPIRES_SQL} WHERE coordinator = :me AND crown IS DISTINCT FROM 'made'"
        )
        while not self.stop_event.wait(RENEWAL_SECONDS):
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), engine.begin() as connection:
                connection.execute(renewal, {"me": self.row["me"], "valid": LEASE_SECONDS})
        engine.dispose()

    def _read_leases(self, condition: str, **words: Any) -> list[CoordinatorInfo]:
        """The other coordinators' leases. One that had made the winner before we began says nothing."""
        statement = (
            "SELECT coordinator, host, pid, machine, folder, to_char(since, 'HH24:MI'), crown FROM tuner_leases WHERE study = :study "
            f"AND coordinator <> :me AND ({condition}) AND (crown IS DISTINCT FROM 'made' "
            "OR expires >= (SELECT since FROM tuner_leases WHERE coordinator = :me))"
        )
        return [CoordinatorInfo(*row) for row in self._execute(statement, **words)]

    def _execute(self, statement: str, **words: Any) -> list[Any]:
        return self.server.with_retry(lambda: self._execute_once(statement, self.row | words))

    def _execute_once(self, statement: str, words: dict[str, Any]) -> list[Any]:
        with self.server.engine.begin() as connection:
            found = connection.execute(sqlalchemy.text(statement), words)
            return list(found) if found.returns_rows else []


@contextlib.contextmanager
def join_coordination(
    server: PostgresStorage | None, study: int, folder: Path
) -> Iterator[SingleCoordinator | SharedCoordination]:
    """A place among a study's coordinators for the length of the block."""
    if server is None:
        yield SingleCoordinator()
        return
    leases = SharedCoordination(server, study, folder)
    server.run_exclusively(0, leases.take_lease)  # two that begin at once would both make the table
    renewal = threading.Thread(target=leases.keep_renewing, name="tuner-lease", daemon=True)
    renewal.start()
    try:
        yield leases
    finally:
        leases.stop_event.set()
        renewal.join(1)
        leases.release_lease()
