"""How long the dashboard of a study of 10,000 trials takes to answer, and to be drawn by a browser.

    python benchmarks/scale_dashboard.py [--trials 10000] [--repeats 3] [--plain] [--browser]

Makes a study on disk as `tuner run` leaves it: 6 parameters, 10 epochs, three files and a note a trial, a third of them pruned.
Then `tuner dashboard` is started on it anew for each repeat, and asked over HTTP for what the study's page loads.
`--plain`: Optuna's dashboard over Optuna's own storage is the twin, once. `--browser`: headless chromium opens the page too, and a
script in it notes when the history's curve and the best trial are on it, in seconds since the address was opened. No debugger is
attached: under one, V8 reads the page's script several times over, which takes a second. `--bars N`: as many trials in the timeline.
Prints one JSON object a measurement, in seconds. Before that, the CPU seconds in which a coordinator begins on that study.
"""

import argparse
import contextlib
import gzip
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from arms import hardware
from coordinator import EPOCHS, SPACE, Drawn, score, study_with
from optuna.storages._rdb import models

from tuner.commands import run as running
from tuner.commands.console import Console
from tuner.config import parsing, yaml_document
from tuner.dashboard import server, study_json
from tuner.dashboard.artifacts import ArtifactWriter, format_trial_note
from tuner.dashboard.dashboard_internals import note_attributes
from tuner.messages import Assignment, Epoch, TrialResult
from tuner.search import optuna_internals, storage
from tuner.search.coordinator import Coordinator

FILES = {"curve.png": "image/png", "confusion.png": "image/png", "per_class.csv": "text/csv"}
# tells the seconds since the page's address was opened
PROBE = """(() => {
  const seen = {}, note = name => seen[name] ??= Math.round(performance.now()) / 1000
  const timer = setInterval(() => {
    if (document.body?.textContent.includes('Best Trial (number=')) note('best_trial')
    if (document.querySelectorAll('.plotly .scatterlayer path').length) note('history')
    if (!seen.best_trial || !seen.history) return
    clearInterval(timer)
    const parts = performance.getEntriesByType('resource').map(e => [new URL(e.name).pathname, [e.startTime / 1000, e.responseEnd / 1000]])
    fetch('/seen?' + encodeURIComponent(JSON.stringify({...seen, network: Object.fromEntries(parts)})))
  }, 20)
})()"""
QUIET = "gpu background-networking component-update sync"  # what a browser does unasked
FLAGS = [
    "headless=new",
    "no-sandbox",
    "no-first-run",
    "window-size=1400,1000",
    *(f"disable-{what}" for what in QUIET.split()),
]


def made(place: Path, trials: int) -> Path:
    """The folder of a study of so many trials, with what the page shows beside the numbers."""
    folder = place / "studies" / "bench"
    folder.mkdir(parents=True)
    (folder / "artifacts").mkdir()
    (folder / "space.yaml").write_text(SPACE)
    space = parsing.parse_space(yaml_document.parse_document(SPACE, "scale.yaml"))
    random.seed(0)
    study = study_with(folder, space, trials)
    study.set_user_attr(storage.SPACE_ATTRIBUTE, json.dumps(space.to_dict()))  # it is tuner's
    study_id = optuna_internals.study_id_of(study)
    trial_rows, study_rows = [], []
    for number in range(trials):
        run = space.sample(Drawn(random.Random(number)))
        scores = [
            score(run.recipe.lr, run.recipe.freeze_depth, epoch) for epoch in range(1, EPOCHS + 1)
        ]
        epochs = tuple(
            Epoch(i, 1 - s, dict.fromkeys(("accuracy", "balanced_accuracy", "f1"), s), 0.1)
            for i, s in enumerate(scores, 1)
        )
        for name, kind in FILES.items():
            artifact = {
                "artifact_id": f"{number}-{name}",
                "filename": name,
                "mimetype": kind,
                "encoding": None,
            }
            row = {
                "trial_id": number + 1,
                "key": f"artifacts:{number}-{name}",
                "value_json": json.dumps(json.dumps(artifact)),
            }
            trial_rows.append(row)
        body = format_trial_note(run, TrialResult("complete", epochs, EPOCHS, {}, 1.0), "accuracy")
        for key, value in note_attributes(number + 1, body).items():
            row = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
            study_rows.append(row)
    database = optuna_internals.database_of(optuna_internals.storage_of(study))
    with database.engine.begin() as connection:
        connection.execute(sqlalchemy.insert(models.TrialSystemAttributeModel), trial_rows)
        connection.execute(sqlalchemy.insert(models.StudySystemAttributeModel), study_rows)
        pruned = sqlalchemy.update(models.TrialModel).where(models.TrialModel.number % 3 == 2)
        connection.execute(pruned.values(state=optuna.trial.TrialState.PRUNED))
    return folder


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[str]:
    """The address of the study's page, from the command."""
    command = [
        sys.executable,
        "-m",
        "tuner",
        "dashboard",
        "bench",
        "--studies",
        str(folder.parent),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[2]
        finally:
            process.terminate()


@contextlib.contextmanager
def served(app: server.App) -> Iterator[str]:
    httpd = server.make_server(app, 0)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/dashboard/studies/1"
    httpd.shutdown()


def tuner_app(folder: Path) -> server.App:
    """What the command serves, as it serves it once the page's address has been said."""
    found = server.make_app(server.open_read_only(None, folder), folder / "artifacts", 1)
    server.preload_study(found, 1)
    return found


def optuna_app(folder: Path) -> server.App:
    import optuna_dashboard

    return optuna_dashboard.wsgi(optuna.storages.get_storage(f"sqlite:///{folder}/study.db"))


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[str]:
    """Optuna's own, in this process."""
    with served(optuna_app(folder)) as page:
        yield page


def answered(page: str) -> dict[str, Any]:
    """Seconds until each thing that the page loads has been answered, one after another."""
    base = page.partition("/dashboard")[0]
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    browser.open(page, timeout=1200).close()  # the token in the address becomes a cookie
    found: dict[str, Any] = {}
    for name, path in {
        "page": "/dashboard/studies/1",
        "bundle": "/static/bundle.js",
        "meta": "/api/meta",
        "studies": "/api/studies",
        "study": "/api/studies/1?after=0",
        "importances": "/api/studies/1/param_importances",
        "poll": f"/api/studies/1?after={10**6}",
    }.items():
        start = time.monotonic()
        request = urllib.request.Request(base + path, headers={"Accept-Encoding": "gzip"})
        with browser.open(request, timeout=1200) as answer:
            body = answer.read()
        found[name] = round(time.monotonic() - start, 3)
        if name == "study":
            found["study_mb_sent"] = round(len(body) / 1e6, 2)
            text = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
            found["study_mb"] = round(len(text) / 1e6, 2)
            found["trials"] = len(json.loads(text)["trials"])
    found["first_load"] = round(
        sum(found[name] for name in ("page", "bundle", "meta", "studies", "study")), 3
    )
    return found


def watched(inner: server.App, seen: queue.Queue[dict[str, Any]]) -> server.App:
    """The page with a script that tells when things are drawn."""

    def outer(environ: server.Environment, start_response: server.StartResponse) -> Iterable[bytes]:
        path, body, kind = environ["PATH_INFO"], b"", "text/html"
        if path == "/probe.js":
            body, kind = PROBE.encode(), "text/javascript"
        elif path == "/seen":
            seen.put(json.loads(urllib.parse.unquote(environ["QUERY_STRING"])))
        elif path.startswith("/dashboard"):
            head: list[Any] = []
            body = b"".join(inner(environ, lambda *words: head.extend(words)))
            body = body.replace(b"<head>", b"<head><script src=/probe.js></script>")
            policy = [
                (name, value)
                for name, value in head[1]
                if name.lower() == "content-security-policy"
            ]
            start_response(
                "200 OK", [("Content-Type", kind), ("Content-Length", str(len(body))), *policy]
            )
            return [body]
        else:
            return inner(environ, start_response)
        start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    return outer


def drawn(app: server.App) -> dict[str, Any]:
    """Seconds until a browser that is started for it shows the study's page."""
    seen: queue.Queue[dict[str, Any]] = queue.Queue()
    with (
        served(watched(app, seen)) as page,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        command = [
            "chromium",
            *(f"--{flag}" for flag in (*FLAGS, f"user-data-dir={profile}")),
            page,
        ]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as browser:
            try:
                return seen.get(timeout=600)
            finally:
                browser.terminate()


def begun(folder: Path) -> dict[str, float]:
    """CPU seconds until a coordinator has read the study and could ask, and for Optuna's own reading alone."""
    space = parsing.load_space(folder / "space.yaml")
    found = {}
    for name, database in {
        "tuner": storage.open_storage(None, folder),
        "optuna": optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db"),
    }.items():
        start = time.process_time()
        study = optuna.load_study(study_name="bench", storage=database)
        if name == "tuner":
            listener = running.CombinedListener(
                Console("quiet"), ArtifactWriter(study, folder, "accuracy")
            )
            Coordinator(
                study,
                space,
                lambda run: Assignment(run, "accuracy", space.settings.engine, "home"),
                listener,
                lambda: False,
            )
        else:
            study.get_trials(deepcopy=False)
        found[name] = round(time.process_time() - start, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--bars", type=int, default=study_json.MAX_TIMELINE_TRIALS)
    parser.add_argument(
        "--keep", type=Path, help="make the study here, or take the one that is here"
    )
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(json.dumps({"hardware": hardware()}))
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        folder = place / "studies" / "bench"
        if not folder.exists():
            made(place, args.trials)
        print(json.dumps({"coordinator_start_cpu": begun(folder)}), flush=True)
        study_json.MAX_TIMELINE_TRIALS = args.bars
        arms = {
            "tuner": (ours, tuner_app, args.repeats),
            **({"plain": (plain, optuna_app, 1)} if args.plain else {}),
        }
        for name, (arm, app, repeats) in arms.items():
            for repeat in range(repeats):
                with arm(folder) as page:
                    print(
                        json.dumps({"arm": name, "repeat": repeat, "answered": answered(page)}),
                        flush=True,
                    )
            for repeat in range(repeats if args.browser else 0):
                print(
                    json.dumps({"arm": name, "repeat": repeat, "drawn": drawn(app(folder))}),
                    flush=True,
                )


if __name__ == "__main__":
    main()
