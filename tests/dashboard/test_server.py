"""The dashboard called in this process: what it answers, whom it refuses, and that it can never write."""

import ast
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

import tuner
from tests.helpers.dashboard_requests import Answer
from tests.helpers.dashboard_requests import browse as request
from tuner import deferred_figures
from tuner.dashboard import background, cost_plot, dashboard_internals, server
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
        storage=storage.open_storage(None, folder), study_name="digits", direction="maximize"
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


TOKEN = "a-token-of-the-tests"
COOKIE = f"other=1; tuner_8080={TOKEN}"


def guarded_app(folder: Path, *, write: bool = False, study: int = 1) -> server.App:
    """What the command serves."""
    database = storage.open_storage(None, folder) if write else server.open_read_only(None, folder)
    guard = server.guard_of(database, study, TOKEN, write=write)
    inner = server.make_app(database, folder / "artifacts", study, allow_writes=write)
    return server.guarded(inner, guard)


def browse(app: server.App, path: str, method: str = "GET", **headers: Any) -> Answer:
    return request(app, path, method, **{"COOKIE": COOKIE, **headers})


@pytest.fixture(scope="module")
def app(made: Path) -> server.App:
    return guarded_app(made)


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
        deferred_figures.defer_figure(
            "curve", losses=[1.0], scores=[{"accuracy": 0.5}], metric="accuracy"
        )
    )
    answer = browse(guarded_app(folder), f"/artifacts/1/1/{artifact.name}")

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
    port = host.partition(":")[2] or "80"
    answer = browse(app, "/api/studies", host=host, COOKIE=f"tuner_{port}={TOKEN}")
    assert answer.status == 200


def test_with_write_the_study_can_be_deleted_but_not_from_another_page(folder: Path) -> None:
    app = guarded_app(folder, write=True)

    for origin in ("https://evil.example", "http://127.0.0.1:3000", "http://127.0.0.1", "null"):
        assert browse(app, "/api/studies/1", "DELETE", ORIGIN=origin).status == 403
    assert b"digits" in browse(app, "/api/studies").body
    assert browse(app, "/api/studies/1", "DELETE", ORIGIN="http://127.0.0.1:8080").status == 204
    assert b"digits" not in browse(app, "/api/studies").body


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    "cookie", ["", "tuner_8080=", "tuner_8080=wrong", f"tuner_80={TOKEN}", f"x=tuner_8080={TOKEN}"]
)
def test_without_the_token_nothing_is_read_or_written(
    cookie: str, write: bool, folder: Path
) -> None:
    app = guarded_app(folder, write=write)

    for path in ("/dashboard", "/api/studies/1?after=0", "/csv/1", "/api/meta?token=wrong"):
        answer = browse(app, path, COOKIE=cookie)
        assert answer.status == 403 and b"?token=" in answer.body
        assert TOKEN.encode() not in answer.body and "Set-Cookie" not in answer.headers
    assert browse(app, "/api/studies/1", "DELETE", COOKIE=cookie).status in (403, 405)
    assert b"digits" in browse(app, "/api/studies").body


def test_the_token_in_the_address_becomes_a_cookie(app: server.App) -> None:
    answer = browse(
        app, f"/dashboard/studies/1?a=%26&token={TOKEN}", host="localhost:9999", COOKIE=""
    )

    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard/studies/1?a=%26")
    cookie, *kept = answer.headers["Set-Cookie"].split("; ")
    assert set(kept) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    assert browse(app, "/api/meta", host="localhost:9999", COOKIE=cookie).status == 200
    elsewhere = browse(app, f"//evil.example/?token={TOKEN}", COOKIE="")
    assert elsewhere.headers["Location"] == "/evil.example/"


@pytest.mark.parametrize("write", [False, True])
def test_only_the_one_study_of_a_shared_database_is_served(write: bool, folder: Path) -> None:
    database = storage.open_storage(None, folder)
    other = optuna.create_study(storage=database, study_name="others", direction="maximize")
    other.tell(other.ask(), 0.5)  # trial id 4
    app = guarded_app(folder, write=write)

    listed = json.loads(browse(app, "/api/studies").body)["study_summaries"]
    assert [study["study_name"] for study in listed] == ["digits"]
    for path in ("/api/studies/2", "/api/studies/2?after=0", "/csv/2", "/artifacts/2/4/ab-cd"):
        assert browse(app, path).status == 404
    for method, path in (
        ("DELETE", "/api/studies/2"),
        ("PUT", "/api/studies/2/note"),
        ("PUT", "/api/studies/1/4/note"),
        ("POST", "/api/trials/4/tell"),
        ("POST", "/api/trials/4/user-attrs"),
        ("DELETE", "/api/artifacts/1/4/ab-cd"),
        ("POST", "/api/studies/1/rename"),
        ("POST", "/api/studies"),
        ("POST", "/incompatible-rdb-schema"),
        ("POST", "/api/studies/２/note"),
        ("DELETE", "/api/studies/-2"),
    ):
        assert browse(app, path, method).status == (404 if write else 405), path
    assert browse(app, "/api/studies/1?after=0").status == 200


def test_a_client_that_names_no_encoding_gets_the_files_of_the_page(app: server.App) -> None:
    for path in ("/static/bundle.js", "/favicon.ico"):
        answer = browse(app, path, ACCEPT_ENCODING=None)
        assert answer.status == 200 and answer.body


# -- another version of optuna-dashboard


def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("optuna_dashboard._serializer.serialize_study_detail")


def module_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard._inmemory_cache", None)


def other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna_dashboard._serializer.serialize_study_detail", lambda study: {})


def other_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_dashboard import _serializer

    real = _serializer.serialize_frozen_trial
    monkeypatch.setattr(
        _serializer, "serialize_frozen_trial", lambda *words: real(*words) | {"note": "other"}
    )


@pytest.fixture
def ours(folder: Path) -> Path:
    """A study that tuner has marked as its own, which is what it answers for itself."""
    storage.open_storage(None, folder).set_study_user_attr(1, storage.SPACE_ATTRIBUTE, "{}")
    return folder


def answers_of(app: server.App) -> list[Any]:
    found = [json.loads(request(app, f"/api/studies/1?after={n}").body) for n in (0, 2)]
    for part in found:
        for trial in part["trials"]:
            trial["user_attrs"].sort(key=json.dumps)
    return [*found, len(request(app, "/static/bundle.js").body)]


@pytest.mark.parametrize("change", [gone, module_gone, other_arguments, other_answer])
def test_where_the_dashboard_differs_inside_its_own_page_is_served(
    change: Callable[[pytest.MonkeyPatch], None], ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna_dashboard

    place, warnings = ours / "artifacts", list[str]()
    store = optuna.artifacts.FileSystemArtifactStore(place)
    optunas = optuna_dashboard.wsgi(
        optuna.storages.get_storage(f"sqlite:///{ours}/study.db"), store
    )
    change(monkeypatch)

    app = server.make_app(server.open_read_only(None, ours), place, 1, warn=warnings.append)

    assert answers_of(app) == answers_of(optunas)
    assert len(warnings) == 1 and "optuna-dashboard 0." in warnings[0] and "slower" in warnings[0]


def test_an_answer_that_fails_while_serving_is_optunas_own_from_then_on(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, warnings = ours / "artifacts", list[str]()
    app = server.make_app(server.open_read_only(None, ours), place, 1, warn=warnings.append)
    before = answers_of(app)
    assert warnings == []
    for part in before[:2]:  # the only thing that Optuna's own answer lacks
        assert [plot["id"] for plot in part["plotly_graph_objects"]] == [cost_plot.NAME]
        part["plotly_graph_objects"] = []

    other_arguments(monkeypatch)
    assert answers_of(app)[:2] == before[:2]
    assert len(warnings) == 1 and warnings[0].startswith("TypeError: ")


def test_warming_cannot_end_the_command() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("whatever it is")

    server.preload_study(fails, 1)


def test_the_installed_pages_script_has_the_timeline_where_it_is_looked_for() -> None:
    import optuna_dashboard

    path = Path(optuna_dashboard.__file__).parent / "public" / "bundle.js"
    plain, changed = path.read_bytes(), dashboard_internals.script(77)
    (place,) = re.finditer(rb"(\w+)=\1\.slice\(-77\);", changed)
    assert changed == plain[: place.start()] + place[0] + plain[place.start() :]
    assert dashboard_internals.trouble() == ""


def test_inner_names_of_the_dashboard_are_used_in_one_module() -> None:
    """Imports of its submodules, and the keys and files of its own."""
    inner = re.compile(r"optuna_dashboard\.(_|\w+\.)|dashboard:|.*optuna_dashboard/public")
    for path in Path(tuner.__file__).parent.rglob("*.py"):
        source = path.read_text()
        if path.name == "dashboard_internals.py" or "dashboard" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            names: list[object] = []
            if isinstance(node, ast.Import):
                names = [f"{alias.name}." for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.Constant):
                names = [node.value]
            for name in names:
                assert not inner.match(str(name)), f"{path.name} uses {name}"


def test_the_reader_cannot_write_even_past_the_guard(folder: Path) -> None:
    with pytest.raises(optuna.exceptions.StorageInternalError) as refused:
        server.open_read_only(None, folder).set_study_user_attr(1, "key", "value")

    assert "readonly database" in str(refused.value.__cause__)


def test_the_reader_sees_what_a_running_search_commits(folder: Path) -> None:
    app = guarded_app(folder)
    before = browse(app, "/csv/1").body.count(b"\n")
    study = optuna.load_study(storage=storage.open_storage(None, folder), study_name="digits")

    study.tell(study.ask(), 0.9)

    assert browse(app, "/csv/1").body.count(b"\n") == before + 1


def test_the_reader_makes_nothing_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"study\.db cannot be read: .*unable to open"):
        server.open_read_only(None, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_the_reader_makes_no_tables_in_a_database_that_is_not_a_study(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "study.db").execute("CREATE TABLE other (x)").connection.close()

    with pytest.raises(StorageError, match="cannot be read"):
        server.open_read_only(f"sqlite:///{tmp_path}/study.db", tmp_path)

    connection = sqlite3.connect(tmp_path / "study.db")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("other",)]
    connection.close()


def test_odd_names_are_no_obstacle(folder: Path) -> None:
    odd = folder.rename(folder.with_name("a b{c}%20?#d"))

    assert server.open_read_only(None, odd).get_study_id_from_name("digits") == 1


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StorageError, match=rf"port {port} on 127\.0\.0\.1: .*--port"):
            server.make_server(lambda *_: [], port)
        assert server.choose_port(port) not in (0, port)


def test_studies_are_found_by_name_and_the_latest_without(folder: Path) -> None:
    studies = folder.parent

    assert server.find_study(studies, "digits") == folder
    assert server.find_study(studies, None) == folder
    assert server.find_study(Path("/nowhere"), str(folder)) == folder
    with pytest.raises(DataError, match="did you mean 'digits'"):
        server.find_study(studies, "digit")
    with pytest.raises(DataError, match="no study in"):
        server.find_study(studies / "digits", None)


def test_a_study_missing_from_its_storage_is_said(folder: Path) -> None:
    other = folder.rename(folder.with_name("renamed"))

    with pytest.raises(DataError, match="'renamed' is not in its storage"):
        server.serve(other, None, 0, allow_writes=False, announce=print)


def test_the_process_beside_a_search_ends_when_the_search_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optuna.py").write_text("open('ran', 'w')")  # as the search's folder may have
    monkeypatch.chdir(tmp_path)
    with background.start_process("digits", tmp_path, 0, "", TOKEN) as process:
        assert TOKEN not in " ".join(map(str, process.args))  # which every user of the machine sees
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert process.stdin is not None
        process.stdin.close()  # as the kernel does when the search is killed
        assert process.wait(30) == 0
    assert not (tmp_path / "ran").exists()


def test_the_address_of_the_dashboard_beside_a_search_is_the_first_thing_said(
    tuner: Callable[..., Any], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[Any, ...]] = []
    ended: list[str] = []
    process = SimpleNamespace(terminate=lambda: ended.append("it"), wait=lambda: ended.append("is"))

    def start(*words: Any) -> Any:
        begun.append(words)
        return process

    def search(space: Any, folders: Any, console: Any, began: float) -> None:
        console.print_line("data   7 train examples")
        raise DataError("it is over")

    monkeypatch.setattr(background, "start_process", start)
    monkeypatch.setattr("tuner.commands.run.run_study", search)

    said = tuner("run", small, "--dashboard", "--port", 0)

    first, second = said.out.splitlines()
    (name, _, port, _, token), told = begun[0], re.fullmatch(r"browse (\S+) while .*", first)
    assert told is not None and (name, second) == ("small", "data   7 train examples")
    assert told[1] == f"http://127.0.0.1:{port}/dashboard?token={token}"
    assert said.code == 3 and ended == ["it", "is"]


def test_the_command_serves_until_interrupted(
    tuner: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    (folder / "space.yaml").write_text(
        "task: classification\ndata: {name: 'not_here:load'}\nmodel: {name: 'not_here:build'}\n"
    )  # of modules that do not import on this machine
    monkeypatch.setattr(server._HttpServer, "serve_forever", interrupted)

    said = tuner("dashboard", "digits", "--studies", folder.parent, "--port", 0)

    assert said.code == 0
    assert said.out.startswith("study digits: http://127.0.0.1:")
    assert re.search(
        r"/dashboard/studies/1\?token=[\w-]{32}  \(read-only; Ctrl-C ends it\)\n$", said.out
    )
