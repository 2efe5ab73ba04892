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
from tuner.search.postgresql import Lost, Server, options

T = TypeVar("T")
VALID, RENEWAL = 60.0, 10.0  # seconds
TABLE = """
CREATE TABLE IF NOT EXISTS tuner_leases (
  coordinator text PRIMARY KEY, study integer NOT NULL, host text NOT NULL, pid integer NOT NULL, machine text NOT NULL, folder text NOT NULL,
  since timestamptz NOT NULL DEFAULT now(), expires timestamptz NOT NULL, crown text, winner integer)
"""
# by the database's clock; while the server was down nobody could renew, so its start gives everybody another term
ALIVE = "greatest(expires, pg_postmaster_start_time() + :valid * interval '1 second') > now()"
EXPIRES = "now() + :valid * interval '1 second'"


@dataclass(frozen=True)
class Holder:
    """A coordinator, as the others see it."""

    coordinator: str
    host: str
    pid: int
    machine: str
    folder: str
    since: str
    crown: str | None

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host}"

    def dead(self) -> bool:
        """Whether it certainly is; nobody knows of other machines."""
        if self.machine != machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


def machine() -> str:
    """Where process ids mean the same: this boot, this namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # only this process then knows itself


class Alone:
    """A study that nobody else can run: its folder is locked. Whatever runs without us is an orphan."""

    shared = False
    orphaned = "orphaned: the search was killed"

    def exclusively(self, work: Callable[[], T]) -> T:
        return work()

    def orphans(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        return running

    def others(self) -> list[Holder]:
        return []

    def crown(self, winner: int) -> Holder | None:
        return None

    def crowned(self) -> None: ...


class Leases:
    """This coordinator's lease, and what it knows of the others'. Its owner's name marks its trials."""

    shared = True
    orphaned = "orphaned: its coordinator is gone, or did not hear that it was made"

    def __init__(self, server: Server, study: int, folder: Path) -> None:
        self.server, self.study = server, study
        place = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine(),
            "folder": str(folder.resolve()),
        }
        self.row = {"me": server.owner, "study": study, "valid": VALID, **place}
        self.ended = threading.Event()

    def exclusively(self, work: Callable[[], T]) -> T:
        return self.server.exclusively(self.study, work)

    def orphans(self, running: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those of `running`, none of which we hold, that nobody alive holds."""
        if not running:
            return []
        alive = {holder.coordinator for holder in self.others()}
        return [t for t in running if t.user_attrs.get(OWNER) not in alive]

    def others(self) -> list[Holder]:
        """The other coordinators that are alive."""
        return [holder for holder in self._read(ALIVE) if not holder.dead()]

    # -- the winner is made once

    def crown(self, winner: int) -> Holder | None:
        """None: making the winner is ours. Otherwise who makes it, or has made it since we began."""

        def claim() -> Holder | None:
            for holder in self._read("crown IS NOT NULL AND winner = :winner", winner=winner):
                if holder.crown == "made" or holder in self.others():
                    return holder
            self._do(
                "UPDATE tuner_leases SET crown = 'making', winner = :winner WHERE coordinator = :me",
                winner=winner,
            )
            return None

        return self.exclusively(claim)

    def crowned(self) -> None:
        self._do("UPDATE tuner_leases SET crown = 'made', expires = now() WHERE coordinator = :me")

    # -- the lease

    def take(self) -> None:
        self._do(TABLE)
        self._do(
            f"DELETE FROM tuner_leases WHERE study = :study AND NOT {ALIVE} AND expires < now() - interval '1 day'"
        )
        self._do(
            "INSERT INTO tuner_leases (coordinator, study, host, pid, machine, folder, expires) "
            f"VALUES (:me, :study, :host, :pid, :machine, :folder, {EXPIRES}) ON CONFLICT DO NOTHING"
        )

    def leave(self) -> None:
        """What is left behind is that the winner was made, for those who are still at it."""
        with contextlib.suppress(
            Lost, sqlalchemy.exc.SQLAlchemyError
        ):  # where the server is away, the lease ends by itself
            self._once(
                "DELETE FROM tuner_leases WHERE coordinator = :me AND crown IS DISTINCT FROM 'made'",
                self.row,
            )

    def renew(self) -> None:
        """Runs beside the search, over a connection of its own; a server that is away is asked again at the next turn."""
        url = self.server.engine.url
        engine = sqlalchemy.create_engine(
            url, pool_size=1, pool_pre_ping=True, connect_args=options(url)
        )
        renewal = sqlalchemy.text(
            f"UPDATE tuner_leases SET expires = {EXPIRES} WHERE coordinator = :me AND crown IS DISTINCT FROM 'made'"
        )
        while not self.ended.wait(RENEWAL):
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), engine.begin() as connection:
                connection.execute(renewal, {"me": self.row["me"], "valid": VALID})
        engine.dispose()

    def _read(self, condition: str, **words: Any) -> list[Holder]:
        """The other coordinators' leases. One that had made the winner before we began says nothing."""
        statement = (
            "SELECT coordinator, host, pid, machine, folder, to_char(since, 'HH24:MI'), crown FROM tuner_leases WHERE study = :study "
            f"AND coordinator <> :me AND ({condition}) AND (crown IS DISTINCT FROM 'made' "
            "OR expires >= (SELECT since FROM tuner_leases WHERE coordinator = :me))"
        )
        return [Holder(*row) for row in self._do(statement, **words)]

    def _do(self, statement: str, **words: Any) -> list[Any]:
        return self.server.patiently(lambda again: self._once(statement, self.row | words))

    def _once(self, statement: str, words: dict[str, Any]) -> list[Any]:
        with self.server.engine.begin() as connection:
            found = connection.execute(sqlalchemy.text(statement), words)
            return list(found) if found.returns_rows else []


@contextlib.contextmanager
def leased(server: Server | None, study: int, folder: Path) -> Iterator[Alone | Leases]:
    """A place among a study's coordinators for the length of the block."""
    if server is None:
        yield Alone()
        return
    leases = Leases(server, study, folder)
    server.exclusively(0, leases.take)  # two that begin at once would both make the table
    renewal = threading.Thread(target=leases.renew, name="tuner-lease", daemon=True)
    renewal.start()
    try:
        yield leases
    finally:
        leases.ended.set()
        renewal.join(1)
        leases.leave()
