"""optuna-dashboard on this machine only, and read-only: it has no login, so neither others nor other pages may reach it."""

import contextlib
import io
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
import warnings
import wsgiref.simple_server
import wsgiref.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage, RDBStorage

from tuner.config import database_url
from tuner.dashboard.study_json import Detail, script
from tuner.errors import DataError, StorageError, nearest
from tuner.search import storage
from tuner.search.bulk_reads import quick
from tuner.search.postgresql import options

Environment = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environment, StartResponse], Iterable[bytes]]
HOST = re.compile(
    r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE
)  # any port: an SSH tunnel may end on another one
STUDY = re.compile(r"GET /api/studies/(\d{1,9})/?\?after=(\d{1,9})")
REFRESH = 10.0  # seconds


def app(database: optuna.storages.BaseStorage, artifacts: Path, *, write: bool = False) -> App:
    """The dashboard as a WSGI application behind `guarded`."""
    import optuna_dashboard

    # get_storage adds the cache without which every poll reads the whole study again
    cached = optuna.storages.get_storage(database)
    inner: App = optuna_dashboard.wsgi(cached, artifact_store=Drawing(artifacts))
    if not write and isinstance(database, RDBStorage):
        inner = quickly(inner, database, cached)
    return guarded(inner, write=write)


def quickly(inner: App, database: RDBStorage, cached: BaseStorage) -> App:
    """Answers with `Detail` for studies that tuner made, and with a script that draws less; Optuna's dashboard answers all else."""
    details: dict[int, Detail] = {}

    def send(
        start_response: StartResponse, kind: str, body: bytes, *headers: tuple[str, str]
    ) -> list[bytes]:
        start_response(
            "200 OK", [("Content-Type", kind), ("Content-Length", str(len(body))), *headers]
        )
        return [body]

    def outer(environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        line = f"{environ.get('REQUEST_METHOD')} {environ.get('PATH_INFO')}"
        if line == "GET /static/bundle.js":
            return send(
                start_response,
                "text/javascript; charset=utf-8",
                script(),
                ("Cache-Control", "max-age=600"),
            )
        asked = STUDY.fullmatch(f"{line}?{environ.get('QUERY_STRING', '')}")
        if asked is None:
            return inner(environ, start_response)
        study, after = int(asked[1]), int(asked[2])
        try:
            if study not in details and storage.SPACE in cached.get_study_user_attrs(study):
                details[study] = Detail(database, cached, study)
            body = details[study].answer(after)
        except KeyError:  # there is no such study, or it is somebody else's
            return inner(environ, start_response)
        return send(start_response, "application/json", body)

    return outer


def warm(application: App, study: int) -> None:
    """Asks for what the study's page asks for, so that whoever opens it need not wait for the study to be read."""
    for path in (f"/api/studies/{study}", f"/api/studies/{study}/param_importances"):
        environ: Environment = {
            "PATH_INFO": path,
            "QUERY_STRING": "after=999999999",
            "HTTP_HOST": "localhost",
        }
        wsgiref.util.setup_testing_defaults(environ)
        # a database that does not answer is for who opens the page to see
        with (
            warnings.catch_warnings(),
            contextlib.suppress(
                sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError
            ),
        ):
            warnings.simplefilter("ignore")  # Optuna's, of importances that rest on few trials
            list(application(environ, lambda *_: None))


def keep_warm(application: App, study: int, over: threading.Event) -> None:
    """Reads what has been added, every ten seconds or so, for two per cent of one core at most, until it is `over`."""
    took = 0.0
    while not over.wait(max(REFRESH, 50 * took)):
        begun = time.monotonic()
        warm(application, study)
        took = time.monotonic() - begun


class Drawing(FileSystemArtifactStore):
    """A study's artifacts, whose pictures are drawn when they are asked for."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        from tuner.dashboard import plots

        with super().open_reader(artifact_id) as file:
            return io.BytesIO(plots.drawn(file.read()))


def guarded(inner: App, *, write: bool) -> App:
    """Refuses foreign Host and Origin headers (DNS rebinding, other pages) and, unless `write`, every method but GET and HEAD."""

    def outer(environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        origin = environ.get("HTTP_ORIGIN")
        reads = environ.get("REQUEST_METHOD") in ("GET", "HEAD")
        if not HOST.fullmatch(str(environ.get("HTTP_HOST", ""))):
            return _refuse(
                start_response,
                "403 Forbidden",
                "this dashboard answers on 127.0.0.1 and localhost only; use an SSH tunnel",
            )
        if not reads and not write:
            return _refuse(
                start_response,
                "405 Method Not Allowed",
                "this dashboard is read-only; start it with --write to change things",
            )
        if (
            not reads
            and origin is not None
            and not HOST.fullmatch(urllib.parse.urlsplit(str(origin)).netloc)
        ):
            return _refuse(
                start_response, "403 Forbidden", f"a page of {origin} may not change this study"
            )
        return inner(environ, start_response)

    return outer


def _refuse(start_response: StartResponse, status: str, why: str) -> list[bytes]:
    body = f"{why}\n".encode()
    start_response(
        status,
        [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Allow", "GET, HEAD"),
        ],
    )
    return [body]


def reader(url: str | None, folder: Path) -> RDBStorage:
    """The study's database, which must exist, as the database itself lets nobody write: no tables are made, no schema is marked.

    Raises StorageError.
    """
    try:
        place = (
            sqlalchemy.engine.make_url(database_url.expanded(url))
            if url
            else sqlalchemy.engine.URL.create("sqlite", database=str(folder / "study.db"))
        )
    except sqlalchemy.exc.ArgumentError as error:
        raise storage.cannot("read", error, url, folder) from None
    if place.get_backend_name() == "sqlite" and place.database:
        quoted = urllib.parse.quote(str(Path(place.database).absolute()))
        place = place.set(database=f"file:{quoted}", query={"mode": "ro", "uri": "true"})
    rendered = database_url.escaped(place.render_as_string(hide_password=False))
    how = {
        "pool_pre_ping": True,
        "execution_options": {"postgresql_readonly": True},
        "connect_args": options(place),
    }
    try:
        return quick(RDBStorage(rendered, engine_kwargs=how, skip_table_creation=True))
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        ImportError,
        RuntimeError,
    ) as error:
        raise storage.cannot("read", error, url, folder) from None


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in mid-answer is no error worth a traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """One line per request would drown the search's own."""


def server(application: App, port: int) -> wsgiref.simple_server.WSGIServer:
    """Bound to 127.0.0.1; port 0 takes a free one. Raises StorageError when the port is taken."""
    try:
        return wsgiref.simple_server.make_server(
            "127.0.0.1", port, application, server_class=_Server, handler_class=_Quiet
        )
    except OSError as error:
        raise StorageError(
            f"port {port} on 127.0.0.1: {error.strerror}; choose another with --port, or 0 for any free one"
        ) from None


def free_port(wanted: int) -> int:
    """`wanted` where it can be had on 127.0.0.1, else any that can."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StorageError("no free port on 127.0.0.1")


def find(studies: Path, name: str | None) -> Path:
    """A study's folder by name or path; without a name, the one that changed last. Raises DataError."""
    made = sorted((p.parent for p in studies.glob("*/space.yaml")), key=lambda p: p.stat().st_mtime)
    if name is None:
        if not made:
            raise DataError(f"no study in {studies}; make one with `tuner run FILE`")
        return made[-1]
    for folder in (studies / name, Path(name)):
        if (folder / "space.yaml").is_file():
            return folder
    raise DataError(f"no study {name!r} in {studies}{nearest(name, [p.name for p in made])}")


def serve(
    folder: Path, url: str | None, port: int, *, write: bool, announce: Callable[[str], None]
) -> None:
    """Serves one study until interrupted. `announce` is told the address of the study's page."""
    database = storage.connect(url, folder, print) if write else reader(url, folder)
    name = folder.resolve().name
    try:
        study = database.get_study_id_from_name(name)
    except KeyError:
        raise DataError(
            f"study {name!r} is not in its storage; `tuner run` makes it again"
        ) from None
    application = app(database, folder / "artifacts", write=write)
    httpd = server(application, port)
    warm(application, study)
    over = threading.Event()
    threading.Thread(target=keep_warm, args=(application, study, over), daemon=True).start()
    announce(f"http://127.0.0.1:{httpd.server_port}/dashboard/studies/{study}")
    try:
        httpd.serve_forever()
    except (KeyboardInterrupt, SystemExit):
        pass  # Ctrl-C is how it is meant to end
    finally:
        over.set()
        httpd.server_close()
