"""Storage URLs: variables are filled in only to connect, passwords are neither shown nor kept, and each mistake says its way out."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy

from tests.conftest import CommandResult
from tuner.config import database_url, parsing, yaml_document
from tuner.errors import StorageError
from tuner.search import storage

Tuner = Callable[..., CommandResult]
HEAD = "task: classification\ndata: {name: synthetic}\nmodel: {name: resnet18_slim, weights: bundled}\n"


@pytest.mark.parametrize(
    ("written", "kept", "password"),
    [
        ("postgresql://tuner:se%2Fcret@host:5432/db", "postgresql://tuner@host:5432/db", "se/cret"),
        ("postgresql://tuner:${PW}@host/db", "postgresql://tuner:${PW}@host/db", None),
        ("postgresql://tuner:${PW}secret@host/db", "postgresql://tuner@host/db", "${PW}secret"),
        ("postgresql://tuner@host/db", "postgresql://tuner@host/db", None),
        (
            "postgresql://host/db?user=tuner&password=secret&sslmode=require",
            "postgresql://host/db?user=tuner&sslmode=require",
            "secret",
        ),
        ("postgresql://host/db?password=secret", "postgresql://host/db", "secret"),
        (
            "postgresql+psycopg://:secret@/db?host=/run",
            "postgresql+psycopg://@/db?host=/run",
            "secret",
        ),
        ("${DATABASE}", "${DATABASE}", None),
        ("sqlite:///study.db", "sqlite:///study.db", None),
        ("foo", "foo", None),
    ],
)
def test_what_is_shown_and_kept_has_no_password(
    written: str, kept: str, password: str | None
) -> None:
    assert (
        database_url.without_password(written) == kept
        and database_url.without_password(kept) == kept
    )
    assert database_url.literal_password(written) == password


def test_variables_are_filled_in_as_a_url_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "p@ss:w/o?r#d% {x}"
    monkeypatch.setenv("PW", odd)
    monkeypatch.setenv("HOST", "db.example:5433")
    monkeypatch.setenv("WHOLE", "postgresql://u:p@h/d")
    found = sqlalchemy.engine.make_url(
        database_url.expand_variables("postgresql://tuner:${PW}@${HOST}/db")
    )
    assert (found.password, found.host, found.port, found.database) == (
        odd,
        "db.example",
        5433,
        "db",
    )
    assert database_url.expand_variables("${WHOLE}") == "postgresql://u:p@h/d"
    assert (
        database_url.hide_passwords(
            f"no {odd} and no {database_url.find_passwords(database_url.expand_variables('x://u:${PW}@h'))[0]}",
            "x://u:${PW}@h",
        )
        == "no *** and no ***"
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "postgresql://tuner:${NO_SUCH_VARIABLE}@host/db",
            "${NO_SUCH_VARIABLE} is not set; export NO_SUCH_VARIABLE=…",
        ),
        ("postgres://tuner:secret@host/db", "postgresql://, not postgres://"),
        ("postgresql://tuner:sec@ret@host/db", "is written %40"),
        ("sqlite://", "a database in memory ends with its process"),
        ("sqlite:///:memory:", "a database in memory ends with its process"),
    ],
)
def test_20_a_url_that_cannot_be_meant_is_refused_with_its_line(
    written: str, message: str, tuner: Tuner, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(f"{HEAD}storage: {json.dumps(written)}\n")
    said = tuner("run", "space.yaml")
    assert said.code == 2 and "space.yaml:4: storage: " in said.err and message in said.err, (
        said.err
    )
    assert (
        "secret" not in said.err
        and "sec@ret" not in said.err
        and not (tmp_path / "studies").exists()
    )


def test_the_file_as_it_is_printed_holds_neither_a_password_nor_a_variables_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PW", "fromtheenvironment")
    for written in ("postgresql://tuner:secret@host/db", "postgresql://tuner:${PW}@host/db"):
        space = parsing.parse_space(
            yaml_document.parse_document(f"{HEAD}storage: '{written}'\n", "x.yaml")
        )
        assert space.settings.storage == written  # what connects
        assert space.to_dict()["storage"] == written.replace(":secret", "")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo", "storage: foo cannot be opened"),
        ("postgresql+nodriver://tuner:secret@h/db", "cannot be opened"),
        (
            "postgresql+psycopg2cffi://tuner:secret@h/db",
            "install its driver, or write postgresql://",
        ),
    ],
)
def test_20_no_driver_or_no_url(url: str, message: str, tuner: Tuner, small: Path) -> None:
    said = tuner("run", small, f"storage='{url}'", "--debug")
    assert said.code == 4 and message in said.err and "secret" not in said.err, said.err


def test_20_without_psycopg_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"pip install 'psycopg\[binary\]"):
        storage.open_storage("postgresql://tuner:secret@127.0.0.1/db", tmp_path)


def test_20_a_server_that_is_down_is_named_within_ten_seconds_without_password(
    tuner: Tuner, small: Path
) -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: refused
        url = f"postgresql://tuner:secret@127.0.0.1:{closed.getsockname()[1]}/db"
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot be opened: .*[Rr]efused") as error:
            storage.open_storage(url, small.parent)
    assert (
        time.monotonic() - begun < 10 and "secret" not in str(error.value) and error.value.code == 4
    )


def test_20_a_server_that_never_answers_is_given_up_within_ten_seconds(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot be opened: .*timeout"):
            storage.open_storage(
                f"postgresql://tuner:secret@127.0.0.1:{silent.getsockname()[1]}/db?connect_timeout=2",
                tmp_path,
            )
    assert time.monotonic() - begun < 10


def test_an_sqlite_file_of_ones_own_is_as_safe_as_the_default_and_belongs_to_one_search(
    tuner: Tuner, small: Path
) -> None:
    url = f"storage=sqlite:///{small.parent}/own.db"
    assert tuner("run", small, url, "search.trials=1", "search.retrain=false").code == 0
    with sqlalchemy.create_engine(f"sqlite:///{small.parent}/own.db").connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    with storage.lock_if_local(url.partition("=")[2], small.parent / "elsewhere" / "small"):
        said = tuner("run", small, url)
    assert said.code == 4 and "is being run by pid" in said.err
