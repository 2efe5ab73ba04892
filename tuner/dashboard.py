"""optuna-dashboard on this machine only, and read-only: it has no login, so neither others nor other pages may reach it."""

import socketserver
import wsgiref.simple_server
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore

from tuner import storage
from tuner.errors import DataError, StorageError, nearest

Environment = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environment, StartResponse], Iterable[bytes]]
HOSTS = ("127.0.0.1", "localhost", "[::1]")


def app(database: optuna.storages.BaseStorage, artifacts: Path | None, *, write: bool = False) -> App:
    """The dashboard as a WSGI application behind `guarded`."""
    import optuna_dashboard

    store = FileSystemArtifactStore(artifacts) if artifacts is not None else None
    return guarded(optuna_dashboard.wsgi(optuna.storages.get_storage(database), artifact_store=store), write=write)


def guarded(inner: App, *, write: bool) -> App:
    """Refuses foreign Host headers (DNS rebinding) and, unless `write`, every method but GET and HEAD."""

    def outer(environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        host = str(environ.get("HTTP_HOST", "")).rsplit(":", 1)[0] if not str(environ.get("HTTP_HOST", "")).endswith("]") else "[::1]"
        if host not in HOSTS:
            return _refuse(start_response, "403 Forbidden", "this dashboard answers on 127.0.0.1 and localhost only; use an SSH tunnel")
        if not write and environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _refuse(start_response, "405 Method Not Allowed", "this dashboard is read-only; start it with --write to change things")
        return inner(environ, start_response)

    return outer


def _refuse(start_response: StartResponse, status: str, why: str) -> list[bytes]:
    body = f"{why}\n".encode()
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """One line per request would drown the search's own."""


def server(application: App, port: int) -> wsgiref.simple_server.WSGIServer:
    """Bound to 127.0.0.1; port 0 takes a free one. Raises StorageError when the port is taken."""
    try:
        return wsgiref.simple_server.make_server("127.0.0.1", port, application, server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        raise StorageError(f"port {port} on 127.0.0.1: {error.strerror}; choose another with --port, or 0 for any free one") from None


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


def serve(folder: Path, url: str | None, port: int, *, write: bool, announce: Callable[[str], None]) -> None:
    """Serves one study until interrupted."""
    httpd = server(app(storage.connect(url, folder), folder / "artifacts", write=write), port)
    announce(f"http://127.0.0.1:{httpd.server_port}/dashboard")
    try:
        httpd.serve_forever()
    except (KeyboardInterrupt, SystemExit):
        pass  # Ctrl-C is how it is meant to end
    finally:
        httpd.server_close()
