"""Studies on a real PostgreSQL server: alone, together, while it restarts, while coordinators die; and its password nowhere."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from tests.conftest import SMALL, CommandResult
from tests.helpers import postgres_server as serving
from tests.helpers import shared_search
from tests.helpers.dashboard_requests import browse
from tests.helpers.instant_engine import make_coordinator, make_space, run_all_jobs
from tuner.dashboard import server as dashboard
from tuner.errors import StorageError
from tuner.search import history, postgresql, retry_policy, storage
from tuner.search.history import FAILED_PERMANENTLY

Tuner = Callable[..., CommandResult]
pytestmark = pytest.mark.slow
optuna.logging.set_verbosity(optuna.logging.ERROR)
ROOT = Path(__file__).parents[2]
# the command line with leases that end soon
COMMAND = """
from tuner.cli import main
from tuner.search import leases, postgresql

assert leases.LEASE_SECONDS and leases.RENEWAL_SECONDS and postgresql.STALLED_SECONDS
leases.LEASE_SECONDS, leases.RENEWAL_SECONDS, postgresql.STALLED_SECONDS = 3.0, 0.5, 3
main()
"""


@pytest.fixture
def database(postgres: serving.TestServer) -> Iterator[str]:
    """A new database's name."""
    name = postgres.database()
    yield name
    postgres.query(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def url(postgres: serving.TestServer, database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """As it is written in a file: the password is in the environment."""
    monkeypatch.setenv("TUNER_DB_PASSWORD", postgres.password)
    return postgres.url(database, "${TUNER_DB_PASSWORD}")


class Process:
    """A search in the background, whose lines are read as they come."""

    def __init__(self, words: list[str], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.lines = folder, []
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.err = open(folder / "stderr", "a+")  # noqa: SIM115  closed in `wait`
        command = [sys.executable, "-u", *words]
        self.popen = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=self.err, text=True
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout:
            for line in self.popen.stdout:
                self.lines.append(line)

    def until(self, begin: str, count: int = 1, seconds: float = 120) -> None:
        """Waits until `count` lines begin so."""
        end = time.monotonic() + seconds
        while sum(line.startswith(begin) for line in self.lines) < count:
            assert time.monotonic() < end and self.popen.poll() is None, (
                begin,
                self.lines,
                self.said(),
            )
            time.sleep(0.02)

    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self, seconds: float = 200) -> int:
        code = self.popen.wait(seconds)
        self.reader.join(10)
        self.err.close()
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts `tuner run` over trials of seconds, or with `trials` given a coordinator over trials of moments."""
    begun: list[Process] = []

    def call(
        name: str, url: str, *words: str, trials: int | None = None, pause: float = 0.05
    ) -> Process:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if trials is not None:
            arguments = [
                "-m",
                "tests.helpers.shared_search",
                url,
                str(folder),
                str(trials),
                str(pause),
            ]
        else:
            text = (
                SMALL.replace("inline", "local")
                .replace("examples: 60", "examples: 600")
                .replace("epochs: {low: 1", "epochs: {low: 2")
            )
            (folder / "small.yaml").write_text(f"{text}storage: {url}\n")
            arguments = ["-c", COMMAND, "run", "small.yaml", *words]
        begun.append(Process(arguments, folder))
        return begun[-1]

    yield call
    for process in begun:
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGCONT)
            process.popen.kill()
            process.wait()


@contextlib.contextmanager
def opened(
    url: str | None, folder: Path = Path(), tell: Callable[[str], None] = print
) -> Iterator[optuna.storages.BaseStorage]:
    database = storage.open_storage(url, folder, tell)
    try:
        yield database
    finally:
        storage.close_storage(database)


def trials(url: str, name: str) -> tuple[list[optuna.trial.FrozenTrial], dict[int, int]]:
    """A study's trials, and which draw each is."""
    with opened(url) as database:
        study = optuna.load_study(study_name=name, storage=database)
        return study.get_trials(), history.proposal_numbers(study)


def draws(url: str, name: str, budget: int) -> dict[int, dict[str, Any]]:
    """Each draw's parameters, once it is sure that each counts once, that they are as many as the budget, and that nothing is left."""
    found, draw = trials(url, name)
    counted = [
        t
        for t in found
        if t.state.name in ("COMPLETE", "PRUNED") or FAILED_PERMANENTLY in t.user_attrs
    ]
    assert not [t for t in found if not t.state.is_finished()], [
        (t.number, t.state.name) for t in found
    ]
    assert [t.number for t in found] == list(range(len(found)))
    assert sorted(draw[t.number] for t in counted) == list(range(budget)), [
        (t.number, t.state.name, draw[t.number]) for t in found
    ]
    return {draw[t.number]: t.params for t in counted}


@pytest.fixture(scope="module")
def calm() -> dict[int, dict[str, Any]]:
    """What an undisturbed random search draws."""
    c = make_coordinator(make_space(trials=30, sampler="random", pruner="none"))
    run_all_jobs(c)
    return {t.number: t.params for t in c.study.get_trials()}


def sequel(
    url: str, budget: int, calm: dict[int, dict[str, Any]], *processes: Process
) -> list[dict[str, Any]]:
    """The last lines of processes that ended well, once the study is as one undisturbed process would have left it, but for order."""
    assert [p.wait() for p in processes] == [0] * len(processes), [p.said() for p in processes]
    assert draws(url, "t", budget) == {n: calm[n] for n in range(budget)}
    return [json.loads(p.lines[-1]) for p in processes]


# -- one coordinator


def test_a_study_on_postgresql_is_the_study_on_sqlite(url: str, tuner: Tuner, small: Path) -> None:
    words = ("run", small, "search.trials=8", "search.retrain=false")
    assert tuner(*words).code == 0
    said = tuner(*words, f"storage='{url}'", "search.name=server")
    assert (said.code, said.err) == (0, "")

    def told(place: str | None, name: str) -> list[tuple[Any, ...]]:
        with opened(place, small.parent / "studies" / name) as database:
            found = optuna.load_study(study_name=name, storage=database).get_trials()
        marks = {"seconds", "tuner:owner"}
        return [
            (
                t.number,
                t.state,
                t.params,
                t.values,
                t.intermediate_values,
                {k: v for k, v in t.user_attrs.items() if k not in marks},
            )
            for t in found
        ]

    assert told(url, "server") == told(None, "small") and len(told(url, "server")) == 8


def test_29_the_server_restarts_in_the_middle_and_the_study_ends_as_if_it_had_not(
    url: str, postgres: serving.TestServer, start: Callable[..., Process]
) -> None:
    process = start("a", url, "search.trials=5")
    process.until("#", 2)
    postgres.control("stop", "-m", "immediate")
    time.sleep(4)  # as long as a trial takes, so that one is told while nobody listens
    postgres.control("start")
    assert process.wait() == 0, process.said()
    said = process.said()
    assert (
        said.count("the database does not answer") == 1
        and "the database answers again" in said
        and "Traceback" not in said
    )
    found, _ = trials(url, "small")
    assert len(draws(url, "small", 5)) == 5
    lost = [
        t.user_attrs["tuner:reason"] for t in found if t.state.name == "FAIL"
    ]  # asked for when the server went, if any
    assert lost in ([], ["orphaned: its coordinator is gone, or did not hear that it was made"])
    assert (process.folder / "studies/small/export/manifest.json").exists()


def test_29_an_immediate_restart_while_a_study_runs(
    url: str,
    postgres: serving.TestServer,
    start: Callable[..., Process],
    calm: dict[int, dict[str, Any]],
) -> None:
    process = start("a", url, trials=30, pause=0.02)
    for done in (3, 12):
        process.until('{"carries', done)
        postgres.control("restart", "-m", "immediate")
    (end,) = sequel(url, 30, calm, process)
    assert end["closed"] == 30 and end["crowns"]


def test_29_connections_that_are_cut_again_and_again_change_nothing(
    url: str,
    postgres: serving.TestServer,
    start: Callable[..., Process],
    calm: dict[int, dict[str, Any]],
) -> None:
    processes = [start(name, url, trials=30, pause=0.1) for name in ("a", "b")]
    for process in processes:
        process.until('{"begun')
    cuts = 0
    while cuts < 16 and any(p.popen.poll() is None for p in processes):
        killed = postgres.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'study_%'"
        )
        cuts += len(killed)
        time.sleep(0.5)
    ends = sequel(url, 30, calm, *processes)
    assert cuts > 5 and sum(end["crowns"] for end in ends) == 1


def test_29_each_commit_in_turn_is_carried_out_and_not_heard_of(
    url: str, calm: dict[int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_policy, "FIRST_WAIT", 0.01)
    count, turn = 0, 0
    real = sqlalchemy.engine.default.DefaultDialect.do_commit

    def deaf(dialect: Any, connection: Any) -> None:
        nonlocal count
        real(dialect, connection)
        count += 1
        if count == turn:
            raise postgresql.ConnectionLost("cut after the commit")

    while count >= turn:  # until a study has fewer commits than this
        count, turn = 0, turn + 1
        with shared_search.shared_coordinator(url, Path(), 2, f"t{turn}") as c:
            monkeypatch.setattr(sqlalchemy.engine.default.DefaultDialect, "do_commit", deaf)
            while (job := c.next_job()) is not None:
                c.on_job_end(job, shared_search.run_job_slowly(c, job, 0.0))
            monkeypatch.setattr(sqlalchemy.engine.default.DefaultDialect, "do_commit", real)
        assert draws(url, f"t{turn}", 2) == {n: calm[n] for n in range(2)}, turn
        assert all(
            len(t.intermediate_values) == t.params["epochs"]
            for t in trials(url, f"t{turn}")[0]
            if t.state.name == "COMPLETE"
        )
    assert turn > 20


def test_29_patience_ends_and_says_what_to_do(
    url: str, database: str, postgres: serving.TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_policy, "TOTAL_WAIT", 1.5)
    told: list[str] = []
    with opened(url, tell=told.append) as found:
        postgres.control("stop", "-m", "immediate")
        try:
            with pytest.raises(
                StorageError,
                match=r"does not answer .*; finished trials are kept: see to it and run the same command",
            ) as error:
                found.get_all_studies()
        finally:
            postgres.control("start")
        assert (
            error.value.code == 4 and postgres.password not in str(error.value) and len(told) == 1
        )
        assert found.get_all_studies() == []


def test_29_the_server_goes_away_when_a_study_was_just_made(url: str) -> None:
    with opened(url) as database:
        optuna.create_study(
            storage=database, study_name="t", direction="maximize"
        )  # and nothing of what makes it tuner's
    with shared_search.shared_coordinator(url, Path(), 2) as c:
        run_all_jobs(c)
    assert len(draws(url, "t", 2)) == 2


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
def test_trials_that_were_enqueued_begin_now_in_every_time_zone(
    zone: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        with shared_search.shared_coordinator(url, Path(), 3) as c:
            run_all_jobs(c)
        durations = [t.duration for t in trials(url, "t")[0]]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert len(durations) == 3
    assert all(d is not None and 0 <= d.total_seconds() < 60 for d in durations), durations


# -- several coordinators


def test_a_trial_that_ends_while_another_coordinator_takes_it_over_counts_once(
    url: str, calm: dict[int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        shared_search.shared_coordinator(url, Path(), 3) as first,
        shared_search.shared_coordinator(url, Path(), 3) as second,
    ):
        job = first.next_job()
        assert job is not None

        def end(point: str) -> None:
            if point == "search.requeued":
                first.on_job_end(job, shared_search.run_job_slowly(first, job, 0.0))

        with monkeypatch.context() as patch:
            patch.setattr("tuner.search.ledger.crash_point", end)
            # the first one's lease has expired
            patch.setattr(second.coordination, "other_coordinators", list)
            run_all_jobs(second)
        run_all_jobs(first)
        assert (first.budget_used, second.budget_used) == (3, 3)
    assert draws(url, "t", 3) == {n: calm[n] for n in range(3)}
    assert sum(t.state.name == "FAIL" for t in trials(url, "t")[0]) == 1


def test_two_coordinators_share_a_study_draw_for_draw(
    url: str, start: Callable[..., Process], calm: dict[int, dict[str, Any]]
) -> None:
    processes = [start(name, url, trials=30) for name in ("a", "b")]
    ends = sequel(url, 30, calm, *processes)
    assert [end["closed"] for end in ends] == [30, 30] and sum(end["crowns"] for end in ends) == 1
    assert all(sum("carries" in line for line in p.lines) > 5 for p in processes)
    found, _ = trials(url, "t")
    assert len(found) == 30


def test_22_a_second_tuner_run_joins_and_one_export_comes_out(
    url: str, start: Callable[..., Process]
) -> None:
    words = ("search.trials=14", "search.sampler=random", "search.confirm={top: 1, repeats: 1}")
    first = start("a", url, *words)
    first.until("#0")
    second = start("b", url, *words)
    assert (first.wait(), second.wait()) == (0, 0), first.said() + second.said()
    assert f"is also being run by pid {first.popen.pid} on host" in "".join(second.lines)
    assert len(draws(url, "small", 14)) == 14
    assert all(any(line.startswith("#") for line in p.lines) for p in (first, second))
    exported = [p for p in (first, second) if (p.folder / "studies/small/export").exists()]
    assert len(exported) == 1
    (other,) = {first, second} - set(exported)
    (line,) = [line for line in other.lines if line.startswith("export")]
    assert (
        f"by pid {exported[0].popen.pid} on host" in line
        and str(exported[0].folder / "studies/small/export") in line
    )
    # the one that claimed the winner confirmed it, alone
    assert [any("again, 1 of 1" in x for x in p.lines) for p in (exported[0], other)] == [
        True,
        False,
    ]
    again = start(other.folder.name, url, *words)  # its own copy, once it is asked for
    assert again.wait() == 0 and (other.folder / "studies/small/export/manifest.json").exists()
    assert not any("again, 1 of 1" in line for line in again.lines)  # the database has the repeat


def test_a_study_that_another_machine_runs_is_not_cleaned_away(
    url: str, start: Callable[..., Process], tuner: Tuner, tmp_path: Path
) -> None:
    process = start("a", url, "search.trials=4", "search.retrain=false")
    process.until("#0 ")
    shutil.copytree(
        tmp_path / "a/studies/small", tmp_path / "b/small"
    )  # a folder with a lock of its own, as elsewhere
    words = ("clean", "small", "--all", "--yes", "--studies", tmp_path / "b")
    said = tuner(*words)
    assert (
        said.code == 4
        and f"small is being run by pid {process.popen.pid} on host" in said.err
        and "stop it first" in said.err
    )
    assert (tmp_path / "b/small").exists()
    assert process.wait() == 0 and len(trials(url, "small")[0]) == 4
    assert tuner(*words).code == 0 and not (tmp_path / "b/small").exists()
    with pytest.raises(KeyError):
        trials(url, "small")


def test_of_two_coordinators_one_is_killed_and_the_other_finishes(
    url: str, start: Callable[..., Process], calm: dict[int, dict[str, Any]]
) -> None:
    first, second = start("a", url, trials=30), start("b", url, trials=30)
    first.until('{"carries', 4)
    second.until('{"carries', 2)
    first.popen.kill()
    first.wait()
    (end,) = sequel(url, 30, calm, second)
    assert end["closed"] == 30 and end["crowns"]


def test_29_a_tuner_run_that_is_killed_leaves_its_trial_to_the_other(
    url: str, start: Callable[..., Process]
) -> None:
    first, second = start("a", url, "search.trials=6"), start("b", url, "search.trials=6")
    first.until("#")
    first.popen.kill()
    first.wait()
    assert second.wait() == 0, second.said()
    assert (
        len(draws(url, "small", 6)) == 6
        and (second.folder / "studies/small/export/manifest.json").exists()
    )


@pytest.mark.parametrize("pause", [0.4])
def test_29_one_that_is_stopped_beyond_its_lease_counts_nothing_twice(
    pause: float, url: str, start: Callable[..., Process], calm: dict[int, dict[str, Any]]
) -> None:
    first = start("a", url, trials=12, pause=pause)
    first.until('{"carries', 2)
    first.popen.send_signal(signal.SIGSTOP)
    second = start("b", url, trials=12, pause=pause)
    second.until('{"carries', 2)
    while len([t for t in trials(url, "t")[0] if t.state.name == "COMPLETE"]) < 12:
        assert second.popen.poll() is None, second.said()
        time.sleep(0.2)
    before = [(t.number, t.state, t.values, t.intermediate_values) for t in trials(url, "t")[0]]
    first.popen.send_signal(signal.SIGCONT)
    sequel(url, 12, calm, first, second)
    assert [
        (t.number, t.state, t.values, t.intermediate_values) for t in trials(url, "t")[0]
    ] == before
    assert [
        t
        for t in trials(url, "t")[0]
        if str(t.user_attrs.get("tuner:reason")).startswith("orphaned")
    ]


def test_29_a_tuner_run_that_is_stopped_and_continued_stops_its_trial(
    url: str, start: Callable[..., Process]
) -> None:
    first = start("a", url, "search.trials=4", "recipe.epochs=6")
    first.until("#0")
    first.popen.send_signal(signal.SIGSTOP)
    second = start("b", url, "search.trials=4", "recipe.epochs=6")
    assert second.wait() == 0, second.said()
    before = trials(url, "small")
    first.popen.send_signal(signal.SIGCONT)
    assert first.wait() == 0, first.said()
    assert trials(url, "small") == before and len(draws(url, "small", 4)) == 4
    assert (
        "export   by pid" in "".join(first.lines)
        and not (first.folder / "studies/small/export").exists()
    )


# -- passwords, and what is said


def spell(
    postgres: serving.TestServer,
    database: str,
    how: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A URL that finds its password in one of the ways there are."""
    bare = postgres.url(database).replace(f":{postgres.password}", "")
    monkeypatch.setenv("PGPASSFILE", str(folder / "pgpass"))
    if how == "written":
        return postgres.url(database)
    if how == "whole":
        monkeypatch.setenv("TUNER_DATABASE", postgres.url(database))
        return "${TUNER_DATABASE}"
    if how == "PGPASSWORD":
        monkeypatch.setenv("PGPASSWORD", postgres.password)
        return bare
    if how == ".pgpass":
        (folder / "pgpass").write_text(
            f"127.0.0.1:{postgres.port}:*:{postgres.user}:{postgres.password}\n"
        )
        (folder / "pgpass").chmod(0o600)
        return bare
    monkeypatch.setenv("TUNER_DB_PASSWORD", postgres.password)
    return postgres.url(database, "${TUNER_DB_PASSWORD}")


@pytest.mark.parametrize("how", ["variable", "written", "whole", "PGPASSWORD", ".pgpass"])
def test_the_password_is_found_and_left_nowhere(
    how: str,
    postgres: serving.TestServer,
    database: str,
    start: Callable[..., Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNER_HOME", str(tmp_path / "home"))
    place = spell(postgres, database, how, tmp_path, monkeypatch)
    words = ["search.trials=2", "--debug", "--dashboard", "--port=0"]
    process = start(
        "a",
        place,
        "data.examples=60",
        "recipe.epochs=1",
        *(
            words
            if how in ("variable", "written")
            else [*words[:2], "search.retrain=false", "engine.name=inline"]
        ),
    )
    listed = ""
    while process.popen.poll() is None:
        listed += subprocess.run(
            ["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True
        ).stdout
        time.sleep(0.1)
    assert process.wait() == 0, process.said()
    assert "small.yaml" in listed and ("tuner.dashboard.background" in listed) == (
        how in ("variable", "written")
    )
    said = "".join(process.lines) + process.said()
    assert ("is not kept" in said) == (how == "written") and "dashboard:" not in process.said()
    written = [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and p not in (process.folder / "small.yaml", tmp_path / "pgpass")
    ]
    assert any(p.name == "space.yaml" for p in written)
    for text in (listed, said, *(p.read_bytes().decode(errors="replace") for p in written)):
        assert postgres.password not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": "wrongword"}, 'password authentication failed for user "tuner"'),
        ({"database": "nosuchdatabase"}, 'database "nosuchdatabase" does not exist'),
        ({"user": "stranger"}, 'password authentication failed for user "stranger"'),
    ],
)
def test_20_what_the_server_refuses_is_said_at_once(
    change: dict[str, str],
    message: str,
    postgres: serving.TestServer,
    database: str,
    tuner: Tuner,
    small: Path,
) -> None:
    parts = {"user": postgres.user, "password": postgres.password, "database": database} | change
    url = f"postgresql://{parts['user']}:{parts['password']}@127.0.0.1:{postgres.port}/{parts['database']}"
    begun = time.monotonic()
    said = tuner("run", small, f"storage='{url}'", "--debug")
    assert time.monotonic() - begun < 30  # of which the connection has ten
    assert said.code == 4 and "cannot be opened" in said.err and message in said.err
    assert parts["password"] not in said.err + said.out


@pytest.mark.skipif(
    not shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin"),
    reason="PgBouncer is not installed (Debian: apt-get install pgbouncer)",
)
@pytest.mark.parametrize("mode", ["session", "transaction", "statement"])
def test_20_a_pooler_that_does_not_keep_sessions_is_refused(
    mode: str, postgres: serving.TestServer, database: str, tmp_path: Path
) -> None:
    with serving.pooling(postgres, mode) as port:
        url = postgres.url(database).replace(f":{postgres.port}/", f":{port}/")
        if mode == "session":
            with shared_search.shared_coordinator(url, tmp_path, 2) as c:
                run_all_jobs(c)
            assert len(draws(url, "t", 2)) == 2
            return
        with pytest.raises(StorageError, match="pool_mode = session") as error, opened(url):
            pass
    assert error.value.code == 4 and postgres.password not in str(error.value)
    locks = postgres.query("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
    assert locks == [(0,)]
    assert postgres.query(
        "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", database
    ) == [(0,)]


def test_the_dashboard_reads_and_the_server_lets_it_write_nothing(url: str, tmp_path: Path) -> None:
    with opened(url) as database:
        run_all_jobs(make_coordinator(make_space(trials=3), database))
    reader = dashboard.open_read_only(url, tmp_path)
    app = dashboard.make_app(reader, tmp_path, 1)
    for path, holds in (
        ("/api/studies", b'"study_name": "t"'),
        ("/api/studies/1?after=0", b'"number": 2'),
        ("/csv/1", b"Param lr"),
    ):
        answer = browse(app, path)
        assert answer.status == 200 and holds in answer.body
    with pytest.raises(optuna.exceptions.StorageInternalError) as refused:
        reader.set_study_user_attr(1, "key", "value")
    reader.engine.dispose()
    assert "read-only transaction" in str(refused.value.__cause__)


def test_a_dashboard_that_writes_lists_one_study_of_the_server(url: str, tmp_path: Path) -> None:
    with opened(url) as database:
        optuna.create_study(storage=database, study_name="others")
        run_all_jobs(make_coordinator(make_space(trials=1), database))
        study = database.get_study_id_from_name("t")
        guard = dashboard.guard_of(database, study, "token", write=True)
        app = dashboard.guarded(
            dashboard.make_app(database, tmp_path, study, allow_writes=True), guard
        )
        listed = browse(app, "/api/studies", COOKIE="tuner_8080=token").body
        assert b'"t"' in listed and b"others" not in listed
        for path, status in (("/api/studies/1", 404), (f"/api/studies/{study}", 204)):
            assert browse(app, path, "DELETE", COOKIE="tuner_8080=token").status == status
    with opened(url) as database:
        assert [study.study_name for study in database.get_all_studies()] == ["others"]


@pytest.mark.usefixtures("quick_program")
def test_tuner_export_finds_the_server_again(url: str, tuner: Tuner, small: Path) -> None:
    assert tuner("run", small, f"storage='{url}'", "search.trials=2").code == 0
    said = tuner("export", "small", "--format", "torch_export")
    assert (said.code, said.err) == (0, "") and "torch_export" in said.out
