"""optuna-dashboard for one study, on this machine only and read-only.

Guard.py decides who may ask.
"""

import contextlib
import io
import os
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
from tuner.dashboard import dashboard_internals, study_json
from tuner.dashboard.dashboard_internals import script
from tuner.dashboard.guard import App, Environment, Guard, StartResponse, guarded, new_token
from tuner.dashboard.study_json import StudyJson
from tuner.errors import DataError, StorageError, nearest_hint
from tuner.search import storage
from tuner.search.bulk_reads import use_bulk_reads
from tuner.search.optuna_internals import stored_trial_id
from tuner.search.postgresql import connect_options

STUDY_REQUEST_PATTERN = re.compile(r"GET /api/studies/(\d{1,9})/?\?after=(\d{1,9})")
REFRESH_SECONDS = 10.0  # seconds
SLOWER = "optuna-dashboard's own page is served, which is slower with thousands of trials"
DATABASE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def complain(problem: str) -> None:
    print(f"tuner: warning: dashboard: {problem}", file=sys.stderr)


def make_app(
    database: BaseStorage,
    artifacts: Path,
    study: int,
    *,
    allow_writes: bool = False,
    warn: Callable[[str], None] = complain,
) -> App:
    """The dashboard of one study as a WSGI application, for whoever has passed the guard."""
    import optuna_dashboard

    # get_storage adds the cache without which every poll reads the whole study again
    cached = optuna.storages.get_storage(database)
    list_only(cached, study)
    inner: App = optuna_dashboard.wsgi(cached, artifact_store=PlottingArtifactStore(artifacts))
    if not allow_writes and isinstance(database, RDBStorage):
        different = dashboard_internals.trouble()
        if different:
            warn(f"{different}; {SLOWER}")
        else:
            inner = Faster(inner, database, cached, study, warn)
    return with_encoding(inner)


def list_only(storage: BaseStorage, study: int) -> None:
    """Lets `storage` list one study only.

    The page shows all that are listed, and a server may hold those of others.
    """
    list_all, name = storage.get_all_studies, storage.get_study_name_from_id(study)

    def list_one() -> list[Any]:
        return [frozen for frozen in list_all() if frozen.study_name == name]

    storage.get_all_studies = list_one  # type: ignore[method-assign]


def with_encoding(inner: App) -> App:
    """optuna-dashboard fails on a request that does not say which encodings it takes, such as
    curl's.
    """

    def outer(environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        return inner(environ, start_response)

    return outer


class Faster:
    """Answers with `Detail` for a study that tuner made, and with a script that draws less.

    Optuna's dashboard answers all else. It answers everything from the moment at which an answer of
    ours fails: another version of it may differ inside in ways that `dashboard_internals.trouble`
    does not see.
    """

    def __init__(
        self,
        inner: App,
        database: RDBStorage,
        cached: BaseStorage,
        study: int,
        warn: Callable[[str], None],
    ) -> None:
        self.inner, self.database, self.cached, self.study = inner, database, cached, study
        self.warn, self.lock = warn, threading.Lock()
        self.detail: StudyJson | None = None
        self.failed = False

    def __call__(self, environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        answer = None if self.failed else self.answer(environ)
        if answer is None:
            return self.inner(environ, start_response)
        headers, body = answer
        start_response("200 OK", [*headers, ("Content-Length", str(len(body)))])
        return [body]

    def answer(self, environ: Environment) -> tuple[list[tuple[str, str]], bytes] | None:
        """Headers and body; None where Optuna's dashboard is to answer."""
        line = f"{environ.get('REQUEST_METHOD')} {environ.get('PATH_INFO')}"
        wanted = STUDY_REQUEST_PATTERN.fullmatch(f"{line}?{environ.get('QUERY_STRING', '')}")
        try:
            if line == "GET /static/bundle.js":
                kind = ("Content-Type", "text/javascript; charset=utf-8")
                return [kind, ("Cache-Control", "max-age=600")], script(
                    study_json.MAX_TIMELINE_TRIALS
                )
            if wanted and int(wanted[1]) == self.study and self.is_ours():
                return [("Content-Type", "application/json")], self.read(int(wanted[2]))
        except (
            DATABASE_ERRORS
        ):  # Optuna's own answer fails in the same way, or the next one succeeds
            return None
        except Exception as error:  # inner names fail in any way, and Optuna's own page is right
            self.give_up(error)
        return None

    def is_ours(self) -> bool:
        try:
            return self.detail is not None or (
                storage.SPACE_ATTRIBUTE in self.cached.get_study_user_attrs(self.study)
            )
        except KeyError:  # the study has been removed
            return False

    def read(self, after: int) -> bytes:
        with self.lock:
            self.detail = self.detail or StudyJson(self.database, self.cached, self.study)
        return self.detail.render(after)

    def give_up(self, error: Exception) -> None:
        with self.lock:
            first, self.failed = not self.failed, True
        if first:
            self.warn(f"{type(error).__name__}: {error}; {SLOWER}")


def preload_study(application: App, study: int) -> None:
    """Asks for what the study's page asks for, so that whoever opens it need not wait for the study
    to be read.
    """
    for path in (f"/api/studies/{study}", f"/api/studies/{study}/param_importances"):
        environ: Environment = {"PATH_INFO": path, "QUERY_STRING": "after=999999999"}
        wsgiref.util.setup_testing_defaults(environ)
        # whatever fails here fails again, and is then shown, when somebody opens the page
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")  # Optuna's, of importances that rest on few trials
            list(application(environ, lambda *_: None))


def keep_preloaded(application: App, study: int, stop_event: threading.Event) -> None:
    """Reads what has been added, every ten seconds or so, for two per cent of one core at most,
    until it is `over`.
    """
    took = 0.0
    while not stop_event.wait(max(REFRESH_SECONDS, 50 * took)):
        begun = time.monotonic()
        preload_study(application, study)
        took = time.monotonic() - begun


class PlottingArtifactStore(FileSystemArtifactStore):
    """A study's artifacts, whose pictures are drawn when they are asked for."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        from tuner.dashboard import plots

        with super().open_reader(artifact_id) as file:
            return io.BytesIO(plots.render_figure(file.read()))


def open_read_only(url: str | None, folder: Path) -> RDBStorage:
    """The study's database, which must exist, as the database itself lets nobody write.

    No tables are made, no schema is marked.

    Raises StorageError.
    """
    try:
        place = (
            sqlalchemy.engine.make_url(database_url.expand_variables(url))
            if url
            else sqlalchemy.engine.URL.create("sqlite", database=str(folder / "study.db"))
        )
    except sqlalchemy.exc.ArgumentError as error:
        raise storage.storage_error("read", error, url, folder) from None
    if place.get_backend_name() == "sqlite" and place.database:
        quoted = urllib.parse.quote(str(Path(place.database).absolute()))
        place = place.set(database=f"file:{quoted}", query={"mode": "ro", "uri": "true"})
    rendered = database_url.escape_braces(place.render_as_string(hide_password=False))
    how = {
        "pool_pre_ping": True,
        "execution_options": {"postgresql_readonly": True},
        "connect_args": connect_options(place),
    }
    try:
        return use_bulk_reads(RDBStorage(rendered, engine_kwargs=how, skip_table_creation=True))
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        ImportError,
        RuntimeError,
    ) as error:
        raise storage.storage_error("read", error, url, folder) from None


class _HttpServer(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away, or says nothing, is no error worth a traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """One line per request would drown the search's own."""


def make_server(
    application: App, port: int, timeout: float | None = None
) -> wsgiref.simple_server.WSGIServer:
    """Bound to 127.0.0.1; port 0 takes a free one. Raises StorageError when the port is taken.

    `timeout`: how many seconds a connection may be silent; None: for ever.
    """
    handler = type("Handler", (_QuietHandler,), {"timeout": timeout})
    try:
        return wsgiref.simple_server.make_server(
            "127.0.0.1", port, application, server_class=_HttpServer, handler_class=handler
        )
    except OSError as error:
        raise StorageError(
            f"port {port} on 127.0.0.1: {error.strerror}; choose another with --port, or 0 for "
            "any free one"
        ) from None


def choose_port(preferred: int) -> int:
    """`wanted` where it can be had on 127.0.0.1, else any that can."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StorageError("no free port on 127.0.0.1")


def study_folders(studies: Path) -> list[Path]:
    """The folders of the studies in a folder, the one that changed last at the end.

    Those that cannot be read are among them, at the beginning. Raises DataError where `studies`
    cannot be read itself.
    """
    try:
        folders = [studies / name for name in os.listdir(studies)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{studies}: cannot be read ({error.strerror})") from None
    return sorted(filter(_is_study, folders), key=lambda folder: (changed_at(folder), folder))


def changed_at(folder: Path) -> float:
    """When a study's space.yaml was written, in seconds since 1970; 0 where it cannot be read."""
    try:
        return (folder / "space.yaml").stat().st_mtime
    except OSError:
        return 0.0


def _is_study(folder: Path) -> bool:
    """Whether a folder has a space.yaml, or may have one that this user cannot see."""
    try:
        (folder / "space.yaml").lstat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def find_study(studies: Path, name: str | None) -> Path:
    """A study's folder by name or path; without a name, the one that changed last.

    Raises DataError.
    """
    made = study_folders(studies)
    if name is None:
        if not made:
            raise DataError(f"no study in {studies}; make one with `tuner run FILE`")
        return made[-1]
    for folder in (studies / name, Path(name)):
        if _is_study(folder):
            return folder
    raise DataError(f"no study {name!r} in {studies}{nearest_hint(name, [p.name for p in made])}")


def serve(
    folder: Path,
    url: str | None,
    port: int,
    *,
    allow_writes: bool,
    announce: Callable[[str], None],
    token: str | None = None,
) -> None:
    """Serves one study until interrupted.

    `announce` is told the address of the study's page, which holds the token.
    """
    database = (
        storage.open_storage(url, folder, print) if allow_writes else open_read_only(url, folder)
    )
    name = folder.resolve().name
    try:
        study = database.get_study_id_from_name(name)
    except KeyError:
        raise DataError(
            f"study {name!r} is not in its storage; `tuner run` makes it again"
        ) from None
    application = make_app(database, folder / "artifacts", study, allow_writes=allow_writes)
    guard = guard_of(database, study, token or new_token(), write=allow_writes)
    httpd = make_server(guarded(application, guard), port)
    preload_study(application, study)
    over = threading.Event()
    threading.Thread(target=keep_preloaded, args=(application, study, over), daemon=True).start()
    announce(address(httpd.server_port, f"/studies/{study}", guard.token))
    try:
        httpd.serve_forever()
    except (KeyboardInterrupt, SystemExit):
        pass  # Ctrl-C is how it is meant to end
    finally:
        over.set()
        httpd.server_close()


def guard_of(database: BaseStorage, study: int, token: str, *, write: bool) -> Guard:
    def list_trials() -> list[int]:
        trials = database.get_all_trials(study, deepcopy=False)
        return [stored_trial_id(database, study, trial) for trial in trials]

    return Guard(token, study, list_trials, write)


def address(port: int, page: str, token: str) -> str:
    return f"http://127.0.0.1:{port}/dashboard{page}?token={token}"
