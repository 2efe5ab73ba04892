"""Requests to the dashboard's application, called in this process."""

from dataclasses import dataclass
from typing import Any
from wsgiref.util import setup_testing_defaults

from tuner.dashboard import server


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def browse(
    app: server.App,
    path: str,
    method: str = "GET",
    host: str | None = "127.0.0.1:8080",
    **headers: str | None,
) -> Answer:
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        **{
            f"HTTP_{k}": v
            for k, v in {"ACCEPT_ENCODING": "gzip", **headers}.items()
            if v is not None
        },
    }
    environ["PATH_INFO"], _, environ["QUERY_STRING"] = path.partition("?")
    setup_testing_defaults(environ)
    environ.pop("HTTP_HOST")
    if host is not None:
        environ["HTTP_HOST"] = host
    found: list[Any] = []
    chunks = app(environ, lambda status, headers, *_: found.extend((status, dict(headers))))
    body = b"".join(chunks)
    if close := getattr(chunks, "close", None):
        close()
    return Answer(int(found[0].split()[0]), found[1], body)
