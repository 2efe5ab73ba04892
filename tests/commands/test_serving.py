"""`tuner serve`: one model over HTTP: answers, limits, and who may ask."""

import io
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CommandResult
from tests.helpers.png_headers import png_header
from tuner.commands.serving import ModelApp, RequestProblem, ServeSettings
from tuner.dashboard.server import make_server
from tuner.training.inference import find_export, open_predictor

Tuner = Callable[..., CommandResult]
TOKEN = "token-of-the-test"


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def served(studied: Path) -> Iterator[tuple[ModelApp, int]]:
    """The model of a study behind a server of this process: the application and its port."""
    predictor = open_predictor(find_export(studied.parent, "small"))
    app = ModelApp(predictor, ServeSettings(megabytes=0.1), TOKEN)
    httpd = make_server(app, 0, 1.0)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield app, httpd.server_port
    httpd.shutdown()
    thread.join()
    httpd.server_close()
    app.close()


def ask(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """The status and the content of an answer; with the token, unless a header says otherwise."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    given = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/png", **named}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, given)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            status, content = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode()


def test_an_image_gets_the_answer_of_predict(
    tuner: Tuner, served: tuple[ModelApp, int], tmp_path: Path
) -> None:
    _, port = served
    (tmp_path / "a.png").write_bytes(png())
    status, answer = ask(port, "/predict", png())
    printed = json.loads(tuner("predict", "small", "a.png", "--json").out)
    assert status == 200 and answer["classes"] == pytest.approx(printed["classes"], abs=1e-5)
    status, model = ask(port, "/model")
    assert (status, model["input"], len(model["classes"])) == (200, "image", 3)
    status, page = ask(port, "/")
    assert status == 200 and "Drop a picture here" in page and "0.1 MB" in page


def test_what_is_no_image_or_too_much_is_refused_and_the_next_is_answered(
    served: tuple[ModelApp, int],
) -> None:
    _, port = served
    assert ask(port, "/predict", b"no image")[0] == 415
    status, answer = ask(port, "/predict", png_header(10_000, 9_500))
    assert status == 415 and "more than 50,000,000" in answer["error"]
    status, answer = ask(port, "/predict", bytes(200_000))
    assert status == 413 and "at most 0.1 MB" in answer["error"]
    assert ask(port, "/predict", b"x", Content_Length="-1")[0] in (400, 411)
    assert ask(port, "/predict", b"x", Content_Length="9" * 5000)[0] == 413
    assert ask(port, "/predict")[0] == 405
    assert ask(port, "/etc/passwd")[0] == 404
    assert ask(port, "/predict", png())[0] == 200


def test_who_lacks_the_token_or_comes_from_elsewhere_gets_nothing(
    served: tuple[ModelApp, int],
) -> None:
    _, port = served
    assert ask(port, "/predict", png(), Authorization="Bearer wrong")[0] == 403
    assert ask(port, "/", None, Authorization="")[0] == 403
    assert ask(port, "/predict", png(), Origin="http://evil.example")[0] == 403
    assert ask(port, "/", None, Host="evil.example")[0] == 403
    assert ask(port, "/predict", png(), Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_a_slow_request_and_a_slow_model_do_not_hold_up_others(
    served: tuple[ModelApp, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, port = served
    with socket.create_connection(("127.0.0.1", port), timeout=10) as half:
        words = f"POST /predict HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 50\r\n\r\nabc"
        half.sendall(words.encode())
        assert ask(port, "/predict", png())[0] == 200  # while the other one waits
        assert half.recv(100).split()[1] == b"408"
    end = threading.Event()
    real = app.predictor.task.describe_predictions

    def slow(*arguments: Any) -> Any:
        end.wait(20)
        return real(*arguments)

    monkeypatch.setattr(app.predictor.task, "describe_predictions", slow)
    hasty = ModelApp(app.predictor, ServeSettings(seconds=0.2), TOKEN)
    with pytest.raises(RequestProblem, match=r"no answer within 0\.2 s"):
        hasty.predict([np.zeros((9, 9, 3), np.uint8)])
    end.set()
    hasty.close()
    monkeypatch.undo()
    assert ask(port, "/predict", png())[0] == 200
    for _ in range(32):
        app.waiting.acquire()
    assert ask(port, "/predict", png())[0] == 503
    for _ in range(32):
        app.waiting.release()


def test_a_browser_gets_a_cookie_for_the_token(served: tuple[ModelApp, int]) -> None:
    app, port = served
    environ = {
        "HTTP_HOST": f"127.0.0.1:{port}",
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/",
        "QUERY_STRING": f"token={TOKEN}",
    }
    answers: list[Any] = []
    list(app(environ, lambda *given: answers.append(given)))
    status, headers = answers.pop()
    assert status.startswith("303") and dict(headers)["Location"] == "/"
    cookie = dict(headers)["Set-Cookie"].partition(";")[0]
    list(app({**environ, "QUERY_STRING": "", "HTTP_COOKIE": cookie}, lambda *g: answers.append(g)))
    assert answers[0][0] == "200 OK"
