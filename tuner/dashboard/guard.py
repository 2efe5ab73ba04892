"""Decides who may use the dashboard, and for what: who has its address, and for one study."""

import re
import secrets
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Environment = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environment, StartResponse], Iterable[bytes]]
HOST = re.compile(
    r"(127\.0\.0\.1|localhost)(:[0-9]+)?", re.IGNORECASE
)  # any port: an SSH tunnel may end on another one
PAGE = re.compile(r"/|/dashboard(/.*)?|/static/.*|/favicon\.ico|/api/(meta|studies)/?")
OF_STUDY = re.compile(r"/(?:api/studies|api/artifacts|artifacts|csv)/([0-9]+)(?:/([0-9]+))?(/.*)?")
OF_TRIAL = re.compile(r"/api/trials/([0-9]+)/.*")


def new_token() -> str:
    """A random token that nobody can guess, fit for an address."""
    return secrets.token_urlsafe(24)


@dataclass(frozen=True)
class Refusal:
    """Why a request is not passed on to the dashboard."""

    status: str
    reason: str


@dataclass
class Guard:
    """Decides about each request before the dashboard sees it.

    The dashboard has no login. The guard refuses other host names (DNS rebinding), other origins
    (pages of other sites and ports), whoever lacks the token (other users of this machine), and
    what is not of the one study: its database may be a server with the studies of others.
    """

    token: str
    study: int
    list_trials: Callable[[], Iterable[int]]  # the ids of the study's trials
    write: bool = False
    trials: set[int] = field(default_factory=set)  # those that were in the study when it was asked

    def refusal(self, environ: Environment) -> Refusal | None:
        """Why the request is refused; None if it may pass. `authorised` checks the token."""
        host = str(environ.get("HTTP_HOST", ""))
        reads = environ.get("REQUEST_METHOD") in ("GET", "HEAD")
        if not HOST.fullmatch(host):
            reason = "this dashboard answers on 127.0.0.1 and localhost only; use an SSH tunnel"
            return Refusal("403 Forbidden", reason)
        if reads:
            return None
        if not self.write:
            reason = "this dashboard is read-only; start it with --write to change things"
            return Refusal("405 Method Not Allowed", reason)
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and str(origin).lower() != f"http://{host.lower()}":
            return Refusal("403 Forbidden", f"a page of {origin} may not change this study")
        return None

    def authorised(self, environ: Environment) -> bool:
        """Whether the request has the token, in the cookie that `admit` sets."""
        name = cookie_name(environ)
        given = (pair.partition("=") for pair in str(environ.get("HTTP_COOKIE", "")).split(";"))
        return any(key.strip() == name and self.is_token(value) for key, _, value in given)

    def is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.strip().encode(), self.token.encode())

    def concerns_study(self, environ: Environment) -> bool:
        """Whether the request is about the page or the one study.

        A request to an unknown path is not.
        """
        path = str(environ.get("PATH_INFO", "")).rstrip("/") or "/"
        reads = environ.get("REQUEST_METHOD") in ("GET", "HEAD")
        if PAGE.fullmatch(path):
            return reads  # writing there would make a new study
        if of_trial := OF_TRIAL.fullmatch(path):
            return self.has_trial(int(of_trial[1]))
        of_study = OF_STUDY.fullmatch(path)
        if of_study is None or int(of_study[1]) != self.study:
            return False
        if of_study[3] == "/rename":  # makes a new study, and a study's folder keeps its name
            return False
        return of_study[2] is None or self.has_trial(int(of_study[2]))

    def has_trial(self, trial: int) -> bool:
        if trial not in self.trials:
            self.trials = set(self.list_trials())
        return trial in self.trials


def guarded(inner: App, guard: Guard) -> App:
    """`inner` behind `guard`.

    A token in an address becomes a cookie, and the address loses it.
    """

    def outer(environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        refusal = guard.refusal(environ)
        if refusal is not None:
            return refuse(start_response, refusal)
        query = urllib.parse.parse_qsl(str(environ.get("QUERY_STRING", "")))
        if any(key == "token" and guard.is_token(value) for key, value in query):
            rest = [(key, value) for key, value in query if key != "token"]
            return admit(environ, start_response, rest, guard.token)
        if not guard.authorised(environ):
            reason = (
                "this dashboard answers only to who started it: open the address that the command "
                "printed, "
                "with its ?token=..., once in this browser; each start has a new one"
            )
            return refuse(start_response, Refusal("403 Forbidden", reason))
        if not guard.concerns_study(environ):
            reason = "this dashboard serves one study, and this is not part of it"
            return refuse(start_response, Refusal("404 Not Found", reason))
        return inner(environ, start_response)

    return outer


def admit(
    environ: Environment, start_response: StartResponse, query: list[tuple[str, str]], token: str
) -> list[bytes]:
    """Redirects the browser to the address without the token; a session cookie holds the token."""
    path = "/" + urllib.parse.quote(str(environ.get("PATH_INFO", "")).lstrip("/\\"))
    place = f"{path}?{urllib.parse.urlencode(query)}" if query else path
    cookie = f"{cookie_name(environ)}={token}; Path=/; HttpOnly; SameSite=Strict"
    headers = [("Location", place), ("Set-Cookie", cookie), ("Cache-Control", "no-store")]
    start_response("303 See Other", [*headers, ("Content-Length", "0")])
    return [b""]


def cookie_name(environ: Environment) -> str:
    """The cookie's name, with the port that the browser sees.

    The name has the port because browsers share cookies between the ports of a host.
    """
    port = str(environ.get("HTTP_HOST", "")).partition(":")[2] or "80"
    return f"tuner_{port}"


def refuse(start_response: StartResponse, refusal: Refusal) -> list[bytes]:
    body = f"{refusal.reason}\n".encode()
    kind, length = ("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))
    start_response(refusal.status, [kind, length, ("Allow", "GET, HEAD")])
    return [body]
