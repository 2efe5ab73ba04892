"""A real PostgreSQL server in a folder of its own, for the tests that need one."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/pgsql/bin",
)
USERS = (
    "postgres",
    "nobody",
)  # whom the server may belong to where the tests are root, which it refuses
CONFIG = "fsync = off\nlisten_addresses = '127.0.0.1'\nmax_connections = 40\nlog_min_duration_statement = -1\n"


def find_server_programs() -> Path | None:
    """The folder with initdb and pg_ctl; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found and shutil.which("pg_ctl"):
        return Path(found).parent
    folders = [
        folder
        for place in PLACES
        for folder in Path("/").glob(place[1:])
        if (folder / "initdb").exists()
    ]
    return max(folders, default=None)


@dataclass
class TestServer:
    """Started by `serving`. Its passwords are really asked for (SCRAM)."""

    bin: Path
    folder: Path
    port: int
    password: str
    user: str = "tuner"

    def url(self, database: str, password: str | None = None) -> str:
        """As a storage: URL; `password` in place of the server's own, such as ${NAME}."""
        return (
            f"postgresql://{self.user}:{password or self.password}@127.0.0.1:{self.port}/{database}"
        )

    def control(self, *words: str) -> None:
        done = _run(
            self.bin / "pg_ctl",
            "-D",
            self.folder / "data",
            "-w",
            "-t",
            "60",
            "-l",
            self.folder / "log",
            *words,
        )
        assert done.returncode == 0, (
            f"{done.stdout}{done.stderr}{(self.folder / 'log').read_text()[-2000:]}"
        )

    def query(self, statement: str, database: str = "postgres") -> list[Any]:
        """What a statement gives; runs outside a transaction."""
        import psycopg

        place = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "dbname": database,
        }
        with psycopg.connect(**place, autocommit=True) as connection:  # type: ignore[arg-type]
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return list(cursor.fetchall()) if cursor.description else []

    def database(self) -> str:
        """A new, empty database's name."""
        name = f"study_{secrets.token_hex(4)}"
        self.query(f"CREATE DATABASE {name}")
        return name


@contextmanager
def run_server(binaries: Path) -> Iterator[TestServer]:
    """Stopped, and its folder removed, at the end."""
    folder = Path(
        tempfile.mkdtemp(prefix="tuner-pg-", dir="/tmp")
    )  # a socket's path may have 107 bytes
    server = TestServer(binaries, folder, _free_port(), f"pw{secrets.token_hex(8)}")
    try:
        (folder / "password").write_text(server.password)
        (folder / "log").touch()
        for path in (folder, folder / "password", folder / "log"):
            if os.geteuid() == 0:
                os.chown(path, *_owner())
        words = (
            "-U",
            server.user,
            "--pwfile",
            folder / "password",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
        )
        made = _run(binaries / "initdb", "-D", folder / "data", *words)
        assert made.returncode == 0, made.stdout + made.stderr
        with open(folder / "data" / "postgresql.conf", "a") as file:
            file.write(f"{CONFIG}port = {server.port}\nunix_socket_directories = '{folder}'\n")
        server.control("start")
        yield server
    finally:
        _run(binaries / "pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@contextmanager
def pooling(server: TestServer, mode: str) -> Iterator[int]:
    """PgBouncer in front of the server: its port. It hands out sessions as `mode` says: session, transaction or statement."""
    folder = server.folder / f"pool-{mode}"
    folder.mkdir()
    port = _free_port()
    (folder / "users").write_text(f'"{server.user}" "{server.password}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\n"
        f"auth_file = {folder / 'users'}\npool_mode = {mode}\n"
    )
    user, group = _owner() if os.geteuid() == 0 else (None, None)
    if user is not None and group is not None:
        for path in (folder, *folder.iterdir()):
            os.chown(path, user, group)
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    with subprocess.Popen(
        [program, "-q", str(folder / "pgbouncer.ini")],
        stderr=subprocess.DEVNULL,
        user=user,
        group=group,
        extra_groups=[] if user else None,
    ) as process:
        try:
            _until_open(port)
            yield port
        finally:
            process.terminate()


def _until_open(port: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")


def _run(program: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    user, group = _owner() if os.geteuid() == 0 else (None, None)
    # the server outlives pg_ctl and would hold a pipe open, so what is said goes through a file
    with tempfile.TemporaryFile("w+") as said:
        command = [str(word) for word in (program, *words)]
        done = subprocess.run(
            command,
            stdout=said,
            stderr=said,
            check=False,
            cwd="/",
            user=user,
            group=group,
            extra_groups=[] if user else None,
        )
        said.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, said.read(), "")


def _owner() -> tuple[int, int]:
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    found = next(known[name] for name in USERS if name in known)
    return found.pw_uid, found.pw_gid


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
