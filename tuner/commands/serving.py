"""`tuner serve`: an exported model over HTTP on this machine, as JSON and as a page.

It answers only on 127.0.0.1, and only to who has the token of the address that it prints. The size
of a request, the time for it and the number of those that wait are limited.
"""

import base64
import contextlib
import io
import json
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tuner.commands.report import render_page
from tuner.dashboard.guard import (
    HOST,
    Environment,
    Refusal,
    StartResponse,
    admit,
    cookie_name,
    new_token,
    refuse,
)
from tuner.dashboard.server import make_server
from tuner.preprocessing.image_decoding import DECODE_ERRORS, FORMATS, silence_pillow
from tuner.training.inference import NamedPrediction, Predictor, find_export, open_predictor

MAX_WAITING = 32  # requests at a time; others are told to come again
MAX_TEXTS = 100  # in one request
MAX_LENGTH_DIGITS = 18  # of the number of a request's bytes


@dataclass(frozen=True)
class ServeSettings:
    """Options of the command line. `megabytes` is the most that a request may have, `seconds` the
    most that it may take.
    """

    export_format: str | None = None
    device: str = "auto"
    trust: bool = False
    flips: bool | None = None
    megabytes: float = 20.0
    seconds: float = 30.0


class RequestProblem(Exception):
    """Why a request is not answered: the status of HTTP and a sentence."""

    def __init__(self, status: str, problem: str) -> None:
        super().__init__(problem)
        self.status, self.problem = status, problem


def serve_model(
    studies: Path,
    name: str,
    port: int,
    settings: ServeSettings,
    announce: Callable[[str], None],
    token: str | None = None,
) -> None:
    """Serves an export until interrupted. `announce` gets the address, which holds the token.

    Raises DataError, SpaceError, StorageError.
    """
    predictor = open_predictor(
        find_export(studies, name),
        settings.export_format,
        settings.device,
        trust=settings.trust,
        flips=settings.flips,
    )
    app = ModelApp(predictor, settings, token or new_token())
    httpd = make_server(app, port, settings.seconds)
    announce(f"http://127.0.0.1:{httpd.server_port}/?token={app.token}")
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # Ctrl-C is how it is meant to end
        httpd.serve_forever()
    httpd.server_close()
    app.close()


@dataclass
class ModelApp:
    """A model as a WSGI application. Predictions are made one after another, in one thread."""

    predictor: Predictor
    settings: ServeSettings
    token: str
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    waiting: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(MAX_WAITING)
    )

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)

    def __call__(self, environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        refusal = self.refusal(environ)
        if refusal is not None:
            return refuse(start_response, refusal)
        query = urllib.parse.parse_qsl(str(environ.get("QUERY_STRING", "")))
        if any(key == "token" and self.is_token(value) for key, value in query):
            rest = [(key, value) for key, value in query if key != "token"]
            return admit(environ, start_response, rest, self.token)
        if not self.is_authorised(environ):
            reason = (
                "open the address that `tuner serve` printed, with its ?token=..., once in this "
                "browser; a program sends the header `Authorization: Bearer TOKEN`"
            )
            return refuse(start_response, Refusal("403 Forbidden", reason))
        try:
            return self.answer(environ, start_response)
        except RequestProblem as error:
            return send_json(start_response, error.status, {"error": error.problem})

    def refusal(self, environ: Environment) -> Refusal | None:
        """Why the request is refused before anything else: other hosts (DNS rebinding) and pages of
        other origins may not ask.
        """
        host = str(environ.get("HTTP_HOST", ""))
        if not HOST.fullmatch(host):
            return Refusal("403 Forbidden", "this model answers on 127.0.0.1 and localhost only")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and str(origin).lower() != f"http://{host.lower()}":
            return Refusal("403 Forbidden", f"a page of {origin} may not use this model")
        return None

    def is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.strip().encode(), self.token.encode())

    def is_authorised(self, environ: Environment) -> bool:
        """Whether the request has the token: in its cookie, or as a program sends it."""
        kind, _, given = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        if kind.lower() == "bearer" and self.is_token(given):
            return True
        name = cookie_name(environ)
        pairs = (pair.partition("=") for pair in str(environ.get("HTTP_COOKIE", "")).split(";"))
        return any(key.strip() == name and self.is_token(value) for key, _, value in pairs)

    def answer(self, environ: Environment, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ.get("REQUEST_METHOD"), environ.get("PATH_INFO") or "/"
        if method == "GET" and path == "/":
            return self.send_page(start_response)
        if method == "GET" and path == "/model":
            return send_json(start_response, "200 OK", self.describe())
        if path == "/predict" and method == "POST":
            examples = self.read_examples(environ)
            return send_json(start_response, "200 OK", self.predict(examples))
        if path in ("/", "/model", "/predict"):
            raise RequestProblem("405 Method Not Allowed", "GET / or /model, POST /predict")
        raise RequestProblem("404 Not Found", "GET / or /model, POST /predict")

    def describe(self) -> dict[str, Any]:
        """The model, as GET /model tells it."""
        m = self.predictor.published.manifest
        return {
            "study": m["study"],
            "task": m["run"]["task"]["name"],
            "classes": m["classes"],
            "input": "text" if self.predictor.takes_texts else "image",
            "scores": m["scores"]["test"],
            "limits": {"megabytes": self.settings.megabytes, "seconds": self.settings.seconds},
        }

    def send_page(self, start_response: StartResponse) -> list[bytes]:
        nonce = secrets.token_urlsafe(12)
        described = self.describe()
        page = render_page(
            "serve_page.html",
            nonce=nonce,
            takes_texts=self.predictor.takes_texts,
            **described,
        )
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
            "img-src data: blob:; connect-src 'self'"
        )
        headers = [("Content-Security-Policy", policy), ("Cache-Control", "no-store")]
        return send(start_response, "200 OK", "text/html; charset=utf-8", page.encode(), headers)

    # -- predictions

    def read_examples(self, environ: Environment) -> list[Any]:
        """The texts of a request, or the bytes of its image. Raises RequestProblem."""
        body = self.read_body(environ)
        if not self.predictor.takes_texts:
            return [body]
        try:
            if str(environ.get("CONTENT_TYPE", "")).startswith("text/plain"):
                return [body.decode()]
            content = json.loads(body)
            texts = content.get("texts", [content.get("text")])
        except (ValueError, AttributeError, RecursionError):
            texts = None
        if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
            raise RequestProblem(
                "400 Bad Request", 'send {"text": "…"}, {"texts": ["…"]}, or text/plain in UTF-8'
            )
        if len(texts) > MAX_TEXTS:
            raise RequestProblem("413 Content Too Large", f"at most {MAX_TEXTS} texts a request")
        return texts

    def read_body(self, environ: Environment) -> bytes:
        """The body of a request, whose size is known before it is read. Raises RequestProblem."""
        length = str(environ.get("CONTENT_LENGTH") or "")
        if not length.isdecimal():
            raise RequestProblem("411 Length Required", "send Content-Length")
        # Python reads no number of thousands of digits
        if len(length) > MAX_LENGTH_DIGITS or int(length) > self.settings.megabytes * 1e6:
            raise RequestProblem(
                "413 Content Too Large",
                f"at most {self.settings.megabytes:g} MB a request (--max-mb)",
            )
        try:
            body: bytes = environ["wsgi.input"].read(int(length))
        except TimeoutError:
            raise RequestProblem("408 Request Timeout", "the request came too slowly") from None
        if len(body) != int(length):
            raise RequestProblem("400 Bad Request", "the request is shorter than it says")
        return body

    def predict(self, examples: list[Any]) -> Any:
        """What the model says of the bytes of an image, or of texts: one answer, or a list of them.

        Raises RequestProblem.
        """
        if not self.waiting.acquire(blocking=False):
            raise RequestProblem("503 Service Unavailable", "too many requests; try again")
        try:
            future = self.worker.submit(self.compute, examples)
            answers = future.result(self.settings.seconds)
        except OutOfTime:
            future.cancel()
            raise RequestProblem(
                "503 Service Unavailable",
                f"no answer within {self.settings.seconds:g} s (--seconds); try again",
            ) from None
        finally:
            self.waiting.release()
        values = [answer_values(answer) for answer in answers]
        return values[0] if len(values) == 1 else {"answers": values}

    def compute(self, examples: list[Any]) -> list[NamedPrediction | str]:
        """The predictions; images are opened here too, since Pillow's warnings can be silenced in
        one thread only.
        """
        with silence_pillow():
            opened = [open_image(e) if isinstance(e, bytes) else e for e in examples]
            return list(self.predictor.predict_all(opened))


def open_image(body: bytes) -> Image.Image:
    """An image from the bytes of its file; nothing of it is decoded yet. Raises RequestProblem."""
    try:
        return Image.open(io.BytesIO(body), formats=FORMATS)
    except DECODE_ERRORS:
        raise RequestProblem(
            "415 Unsupported Media Type", f"no image; send the bytes of one: {', '.join(FORMATS)}"
        ) from None


def answer_values(answer: NamedPrediction | str) -> dict[str, Any]:
    """A prediction for a program. Raises RequestProblem for an image that cannot be decoded."""
    if isinstance(answer, str):
        raise RequestProblem("415 Unsupported Media Type", answer.partition(": ")[2])
    prediction = answer.prediction
    drawn = {}
    if prediction.picture is not None:
        drawn = {"picture": base64.b64encode(prediction.picture).decode()}
    return {"line": prediction.line, **prediction.values, **drawn}


def send(
    start_response: StartResponse,
    status: str,
    kind: str,
    body: bytes,
    headers: list[tuple[str, str]],
) -> list[bytes]:
    length = ("Content-Length", str(len(body)))
    start_response(status, [("Content-Type", kind), length, *headers])
    return [body]


def send_json(start_response: StartResponse, status: str, content: Any) -> list[bytes]:
    body = json.dumps(content, ensure_ascii=False).encode()
    return send(start_response, status, "application/json", body, [("Cache-Control", "no-store")])
