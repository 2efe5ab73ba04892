"""The dashboard called in this process: what it answers, whom it refuses, and that it can never write."""

import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.helpers.dashboard_requests import browse
from tuner import deferred_figures
from tuner.dashboard import server
from tuner.errors import DataError, StorageError
from tuner.search import storage

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
optuna.logging.set_verbosity(optuna.logging.ERROR)
PICTURE = b"\x89PNG picture"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three trials; trial 0 has a picture."""
    tmp_path = tmp_path_factory.mktemp("made")
    folder = tmp_path / "studies" / "digits"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "space.yaml").write_text("")
    study = optuna.create_study(
        storage=storage.connect(None, folder), study_name="digits", direction="maximize"
    )
    (tmp_path / "curve.png").write_bytes(PICTURE)
    for number in range(3):
        trial = study.ask()
        trial.report(trial.suggest_float("lr", 0, 1), 1)
        if number == 0:
            store = optuna.artifacts.FileSystemArtifactStore(folder / "artifacts")
            optuna.artifacts.upload_artifact(
                artifact_store=store, file_path=str(tmp_path / "curve.png"), study_or_trial=trial
            )
        study.tell(trial, number / 2)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, for what changes things."""
    return Path(shutil.copytree(made, tmp_path / "studies" / "digits"))


@pytest.fixture(scope="module")
def app(made: Path) -> server.App:
    return server.app(server.reader(None, made), made / "artifacts")


@pytest.mark.parametrize(
    ("path", "status", "holds"),
    [
        ("/", 302, b""),
        ("/dashboard", 200, b"Optuna Dashboard"),
        ("/dashboard/studies/1/trials", 200, b"Optuna Dashboard"),
        ("/api/meta", 200, b'"artifact_is_available": true'),
        ("/api/studies", 200, b'"study_name": "digits"'),
        ("/api/studies/1?after=0", 200, b'"number": 2'),
        ("/api/studies/1/param_importances", 200, b'"name": "lr"'),
        ("/csv/1", 200, b"Param lr"),
        ("/static/bundle.js", 200, b""),
        ("/favicon.ico", 200, b""),
    ],
)
def test_everything_the_page_asks_for_is_answered(
    app: server.App, path: str, status: int, holds: bytes
) -> None:
    answer = browse(app, path)

    assert answer.status == status
    assert holds in answer.body


def test_an_artifact_is_served_byte_by_byte(app: server.App, made: Path) -> None:
    (artifact,) = (made / "artifacts").iterdir()

    answer = browse(app, f"/artifacts/1/1/{artifact.name}")

    assert (answer.status, answer.headers["Content-Type"], answer.body) == (
        200,
        "image/png",
        PICTURE,
    )


def test_a_picture_is_drawn_when_it_is_asked_for(folder: Path) -> None:
    (artifact,) = (folder / "artifacts").iterdir()
    artifact.write_bytes(
        deferred_figures.later("curve", losses=[1.0], scores=[{"accuracy": 0.5}], metric="accuracy")
    )
    served = server.app(server.reader(None, folder), folder / "artifacts")

    answer = browse(served, f"/artifacts/1/1/{artifact.name}")

    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
    assert answer.body.startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_reading_is_all_one_may_do(app: server.App, method: str) -> None:
    answer = browse(app, "/api/studies/1", method)

    assert answer.status == 405
    assert b"--write" in answer.body
    assert browse(app, "/api/studies/1?after=0").status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        None,
    ],
)
def test_a_foreign_host_is_refused(app: server.App, host: str | None) -> None:
    assert browse(app, "/api/studies", host=host).status == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1"])
def test_this_machine_is_served(app: server.App, host: str) -> None:
    assert browse(app, "/api/studies", host=host).status == 200


def test_with_write_the_study_can_be_deleted_but_not_from_another_page(folder: Path) -> None:
    app = server.app(storage.connect(None, folder), folder / "artifacts", write=True)

    assert browse(app, "/api/studies/1", "DELETE", ORIGIN="https://evil.example").status == 403
    assert b"digits" in browse(app, "/api/studies").body
    assert browse(app, "/api/studies/1", "DELETE", ORIGIN="http://127.0.0.1:8080").status == 204
    assert b"digits" not in browse(app, "/api/studies").body


def test_the_reader_cannot_write_even_past_the_guard(folder: Path) -> None:
    with pytest.raises(optuna.exceptions.StorageInternalError) as refused:
        server.reader(None, folder).set_study_user_attr(1, "key", "value")

    assert "readonly database" in str(refused.value.__cause__)


def test_the_reader_sees_what_a_running_search_commits(folder: Path) -> None:
    app = server.app(server.reader(None, folder), folder / "artifacts")
    before = browse(app, "/csv/1").body.count(b"\n")
    study = optuna.load_study(storage=storage.connect(None, folder), study_name="digits")

    study.tell(study.ask(), 0.9)

    assert browse(app, "/csv/1").body.count(b"\n") == before + 1


def test_the_reader_makes_nothing_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"study\.db cannot be read: .*unable to open"):
        server.reader(None, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_the_reader_makes_no_tables_in_a_database_that_is_not_a_study(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "study.db").execute("CREATE TABLE other (x)").connection.close()

    with pytest.raises(StorageError, match="cannot be read"):
        server.reader(f"sqlite:///{tmp_path}/study.db", tmp_path)

    connection = sqlite3.connect(tmp_path / "study.db")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("other",)]
    connection.close()


def test_odd_names_are_no_obstacle(folder: Path) -> None:
    odd = folder.rename(folder.with_name("a b{c}%20?#d"))

    assert server.reader(None, odd).get_study_id_from_name("digits") == 1


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StorageError, match=rf"port {port} on 127\.0\.0\.1: .*--port"):
            server.server(lambda *_: [], port)
        assert server.free_port(port) not in (0, port)


def test_studies_are_found_by_name_and_the_latest_without(folder: Path) -> None:
    studies = folder.parent

    assert server.find(studies, "digits") == folder
    assert server.find(studies, None) == folder
    assert server.find(Path("/nowhere"), str(folder)) == folder
    with pytest.raises(DataError, match="did you mean 'digits'"):
        server.find(studies, "digit")
    with pytest.raises(DataError, match="no study in"):
        server.find(studies / "digits", None)


def test_a_study_missing_from_its_storage_is_said(folder: Path) -> None:
    other = folder.rename(folder.with_name("renamed"))

    with pytest.raises(DataError, match="'renamed' is not in its storage"):
        server.serve(other, None, 0, write=False, announce=print)


def test_the_process_beside_a_search_ends_when_the_search_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuner.dashboard.background", "digits", str(tmp_path), "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        assert waiting.stdin is not None
        waiting.stdin.close()  # as the kernel does when the search is killed
        assert waiting.wait(30) == 0


def test_the_command_serves_until_interrupted(
    tuner: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    (folder / "space.yaml").write_text(
        "task: classification\ndata: {name: digits}\nmodel: {name: resnet18_slim}\n"
    )
    monkeypatch.setattr(server._Server, "serve_forever", interrupted)

    said = tuner("dashboard", "digits", "--studies", folder.parent, "--port", 0)

    assert said.code == 0
    assert said.out.startswith("study digits: http://127.0.0.1:")
    assert said.out.endswith("/dashboard/studies/1  (read-only; Ctrl-C ends it)\n")
