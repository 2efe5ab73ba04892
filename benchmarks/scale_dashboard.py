"""How long the dashboard of a study of 10,000 trials takes to answer, and to be drawn by a browser.

    python benchmarks/scale_dashboard.py [--trials 10000] [--repeats 3] [--plain] [--browser]

Makes a study on disk as `tuner run` leaves it: 6 parameters, 10 epochs, three files and a note a trial, a third of them pruned.
Then `tuner dashboard` is started on it anew for each repeat, and asked over HTTP for what the study's page loads.
`--plain`: Optuna's dashboard over Optuna's own storage is the twin, once. `--browser`: headless chromium opens the page too;
drawn is when the history's curve and the best trial are on it. Prints one JSON object a measurement; seconds of wall clock, and of the CPU of the browser's main thread. Before that, the CPU
seconds in which a coordinator begins on that study.
"""

import argparse
import contextlib
import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import wsgiref.simple_server
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from arms import hardware
from coordinator import EPOCHS, SPACE, Drawn, score, study_with
from optuna.storages._rdb import models

from tuner import dashboard, document, parsing, running, storage
from tuner.artifacts import PIECE, Artifacts, note
from tuner.orders import Assignment, Epoch, Result
from tuner.report import Console
from tuner.search import Coordinator

FILES = {"curve.png": "image/png", "confusion.png": "image/png", "per_class.csv": "text/csv"}
QUIET = "gpu background-networking component-update sync"  # what a browser does unasked
FLAGS = ["headless=new", "no-sandbox", "no-first-run", "window-size=1400,1000", *(f"disable-{what}" for what in QUIET.split())]


def made(place: Path, trials: int) -> Path:
    """The folder of a study of so many trials, with what the page shows beside the numbers."""
    folder = place / "studies" / "bench"
    folder.mkdir(parents=True)
    (folder / "artifacts").mkdir()
    (folder / "space.yaml").write_text(SPACE)
    space = parsing.parse(document.parse(SPACE, "scale.yaml"))
    random.seed(0)
    study = study_with(folder, space, trials)
    study.set_user_attr(storage.SPACE, json.dumps(space.tree()))  # it is tuner's
    trial_rows, study_rows = [], []
    for number in range(trials):
        run = space.sample(Drawn(random.Random(number)))
        scores = [score(run.recipe.lr, run.recipe.freeze_depth, epoch) for epoch in range(1, EPOCHS + 1)]
        epochs = tuple(Epoch(i, 1 - s, dict.fromkeys(("accuracy", "balanced_accuracy", "f1"), s), 0.1) for i, s in enumerate(scores, 1))
        for name, kind in FILES.items():
            artifact = {"artifact_id": f"{number}-{name}", "filename": name, "mimetype": kind, "encoding": None}
            row = {"trial_id": number + 1, "key": f"artifacts:{number}-{name}", "value_json": json.dumps(json.dumps(artifact))}
            trial_rows.append(row)
        body = note(run, Result("complete", epochs, EPOCHS, {}, 1.0), "accuracy")
        pieces = {f"note_str:{i}": body[start : start + PIECE] for i, start in enumerate(range(0, len(body), PIECE))}
        for key, value in {**pieces, "note_ver": 1}.items():
            study_rows.append({"study_id": study._study_id, "key": f"dashboard:{number + 1}:{key}", "value_json": json.dumps(value)})
    with study._storage._backend.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.execute(sqlalchemy.insert(models.TrialSystemAttributeModel), trial_rows)
        connection.execute(sqlalchemy.insert(models.StudySystemAttributeModel), study_rows)
        pruned = sqlalchemy.update(models.TrialModel).where(models.TrialModel.number % 3 == 2)
        connection.execute(pruned.values(state=optuna.trial.TrialState.PRUNED))
    return folder


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[str]:
    """The address of the study's page, from the command."""
    command = [sys.executable, "-m", "tuner", "dashboard", "bench", "--studies", str(folder.parent), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[2]
        finally:
            process.terminate()


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[str]:
    """Optuna's own, in this process."""
    import optuna_dashboard

    own = optuna.storages.get_storage(f"sqlite:///{folder}/study.db")
    server = wsgiref.simple_server.make_server(
        "127.0.0.1", 0, optuna_dashboard.wsgi(own), server_class=dashboard._Server, handler_class=dashboard._Quiet
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/dashboard/studies/1"
    server.shutdown()


def answered(page: str) -> dict[str, Any]:
    """Seconds until each thing that the page loads has been answered, one after another."""
    base = page.partition("/dashboard")[0]
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
        with urllib.request.urlopen(request, timeout=1200) as answer:
            body = answer.read()
        found[name] = round(time.monotonic() - start, 3)
        if name == "study":
            found["study_mb_sent"] = round(len(body) / 1e6, 2)
            text = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
            found["study_mb"] = round(len(text) / 1e6, 2)
            found["trials"] = len(json.loads(text)["trials"])
    found["first_load"] = round(sum(found[name] for name in ("page", "bundle", "meta", "studies", "study")), 3)
    return found


def drawn(page: str) -> dict[str, float]:
    """Seconds until a browser shows the study's page."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.page_load_strategy = "none"
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
        try:
            driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            start = time.monotonic()
            driver.set_script_timeout(600)
            driver.get(page)
            found = {}
            for name, script in {
                "best_trial": "return document.body && document.body.textContent.includes('Best Trial (number=')",
                "history": "return document.querySelectorAll('.plotly .scatterlayer path').length > 0",
            }.items():
                WebDriverWait(driver, 600, 0.05).until(lambda d, script=script: d.execute_script(script))
                found[name] = round(time.monotonic() - start, 3)
            metrics = {m["name"]: m["value"] for m in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
            found["cpu"] = {name: round(metrics[f"{name}Duration"], 2) for name in ("Task", "Script", "Layout", "RecalcStyle")}
            timing = "return performance.getEntriesByType('resource').map(e => [e.name.replace(/^.*?\\/\\/[^/]+/, ''), e.startTime, e.responseEnd])"
            found["network"] = {name: [round(a / 1000, 3), round(b / 1000, 3)] for name, a, b in driver.execute_script(timing)}
            return found
        finally:
            driver.quit()


def begun(folder: Path) -> dict[str, float]:
    """CPU seconds until a coordinator has read the study and could ask, and for Optuna's own reading alone."""
    space = parsing.load(folder / "space.yaml")
    found = {}
    for name, database in {
        "tuner": storage.connect(None, folder),
        "optuna": optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db"),
    }.items():
        start = time.process_time()
        study = optuna.load_study(study_name="bench", storage=database)
        if name == "tuner":
            listener = running.Both(Console("quiet"), Artifacts(study, folder, "accuracy"))
            Coordinator(study, space, lambda run: Assignment(run, "accuracy", space.settings.engine, "home"), listener, lambda: False)
        else:
            study.get_trials(deepcopy=False)
        found[name] = round(time.process_time() - start, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--keep", type=Path, help="make the study here, or take the one that is here")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(json.dumps({"hardware": hardware()}))
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        folder = place / "studies" / "bench"
        if not folder.exists():
            made(place, args.trials)
        print(json.dumps({"coordinator_start_cpu": begun(folder)}), flush=True)
        arms = {"tuner": (ours, args.repeats), **({"plain": (plain, 1)} if args.plain else {})}
        for name, (arm, repeats) in arms.items():
            for repeat in range(repeats):
                with arm(folder) as page:
                    print(json.dumps({"arm": name, "repeat": repeat, "answered": answered(page)}), flush=True)
                if args.browser:
                    with arm(folder) as page:
                        print(json.dumps({"arm": name, "repeat": repeat, "drawn": drawn(page)}), flush=True)


if __name__ == "__main__":
    main()
