"""The dashboard in a real browser, over a real study: what a person sees, and no error in the console."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import SMALL

selenium = pytest.importorskip(
    "selenium", reason="selenium is not installed; it comes with the test extra"
)
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)",
    ),
]
QUIET = "gpu quic background-networking component-update sync"  # what a browser does unasked
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--window-size=1400,1000",
    *(f"--disable-{what}" for what in QUIET.split()),
]
TUNER = [sys.executable, "-m", "tuner"]
PATIENCE = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three trials over synthetic images, made by the command."""
    place = tmp_path_factory.mktemp("browser")
    (place / "small.yaml").write_text(SMALL)
    words = [
        "search.trials=3",
        "recipe.epochs={low: 1, high: 2}",
        "search.pruner=none",
        "search.retrain=false",
        "search.keep=0",
    ]
    environ = os.environ | {"TUNER_HOME": str(place / "home")}
    subprocess.run(
        [*TUNER, "run", "small.yaml", *words, "--quiet"], cwd=place, env=environ, check=True
    )
    return place


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(place: Path, *tuner: str, options: Sequence[str] = ()) -> Iterator[str]:
    """The address of the study's page, with the token, as `tuner dashboard` prints it."""
    command = [sys.executable, *tuner, "dashboard", "small", "--port", str(free()), *options]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[2]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(place: Path, browser: Any) -> Iterator[str]:
    """The study's page without the token, which the browser has."""
    with served(place, "-m", "tuner") as address:
        browser.get(address)
        yield address.partition("?")[0]


def body(browser: Any) -> str:
    return str(browser.find_element(By.TAG_NAME, "body").text)


def wait(browser: Any, condition: Any) -> Any:
    return WebDriverWait(browser, PATIENCE).until(condition)


def complaints(browser: Any) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_studys_page_shows_its_name_metric_and_history(browser: Any, page: str) -> None:
    browser.get(page)

    wait(
        browser,
        lambda b: "Best Trial (number=" in body(b) and "Hyperparameter Importance" in body(b),
    )
    assert "small (id=1)" in body(browser) and "accuracy" in body(browser)
    wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, ".plotly .scatterlayer path"))
    cost = "[id$='score-against-cost']"
    wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, f"{cost} .scatterlayer .point"))
    assert "Score against cost" in browser.find_element(By.CSS_SELECTOR, cost).text
    assert complaints(browser) == []


@pytest.mark.parametrize("most", [2, 1000])
def test_the_timeline_has_the_latest_trials(most: int, place: Path, browser: Any) -> None:
    with served(
        place,
        "-c",
        f"from tuner import cli; from tuner.dashboard import study_json; study_json.MAX_TIMELINE_TRIALS = {most}; cli.main()",
    ) as page:
        browser.execute_cdp_cmd("Network.clearBrowserCache", {})
        browser.get(page)
        bars = "return document.querySelectorAll('#graph-timeline .barlayer .point path').length"
        assert wait(browser, lambda b: b.execute_script(bars)) == min(most, 3)
        assert complaints(browser) == []


def test_a_trial_shows_its_note_and_its_pictures(browser: Any, page: str) -> None:
    browser.get(f"{page}/trials")
    wait(browser, lambda b: "3 Trials" in body(b))

    browser.find_element(By.XPATH, "//*[text()='Trial 2']").click()

    wait(browser, lambda b: "Trial 2 (trial_id=3)" in body(b) and "Best accuracy" in body(b))
    assert all(name in body(browser) for name in ("curve.png", "confusion.png", "per_class.csv"))
    widths = "return [...document.querySelectorAll('img[src*=\"/artifacts/\"]')].map(i => i.naturalWidth)"
    wait(
        browser,
        lambda b: len(b.execute_script(widths)) >= 2 and min(b.execute_script(widths)) > 100,
    )
    assert complaints(browser) == []


NOTE = """
const [version, done] = arguments;
fetch('/api/studies/1/note', {method: 'PUT', headers: {'Content-Type': 'application/json'},
  body: JSON.stringify({version, body: 'written by a person'})}).then(answer => done(answer.status));
"""  # what the page sends when somebody saves a note


def test_the_page_may_write_with_the_token_and_write_only(
    place: Path, browser: Any, page: str, tmp_path: Path
) -> None:
    shutil.copytree(place / "studies", tmp_path / "studies")  # the others read the study's note
    with served(tmp_path, "-m", "tuner", options=["--write"]) as address:
        bare = address.partition("?")[0]
        browser.get(bare)
        assert "?token=" in body(browser) and "Best Trial" not in body(browser)
        browser.get(address)
        wait(browser, lambda b: "Best Trial (number=" in body(b))
        assert browser.current_url == bare  # the token has left the address
        assert browser.execute_script("return document.cookie") == ""  # out of reach of scripts
        assert browser.execute_async_script(NOTE, 2) == 204
        browser.get(f"{bare}/note")
        wait(browser, lambda b: "written by a person" in body(b))
        browser.get(page)  # another port, for which the browser has another token
        assert browser.execute_async_script(NOTE, 2) == 405
    complaints(browser)  # of what was refused


def test_the_studys_note_is_shown(browser: Any, page: str) -> None:
    browser.get(f"{page}/note")

    wait(browser, lambda b: "for the best accuracy on the validation examples" in body(b))
    assert complaints(browser) == []


def test_the_dashboard_beside_a_search_shows_a_running_trial(place: Path, browser: Any) -> None:
    port = free()
    words = [
        "search.name=beside",
        "engine.name=local",
        "data.examples=200",
        "recipe.epochs=500",
        "recipe.freeze_depth=0",
    ]
    command = [*TUNER, "run", "small.yaml", *words, "--dashboard", "--port", str(port), "--quiet"]
    environ = os.environ | {"TUNER_HOME": str(place / "home")}
    with subprocess.Popen(
        command, cwd=place, env=environ, stdout=subprocess.PIPE, text=True
    ) as search:
        assert search.stdout is not None
        address, _, token = search.stdout.readline().strip().partition("?")
        assert address == f"http://127.0.0.1:{port}/dashboard"
        answers(f"{address}?{token}", search)
        browser.get(f"{address}/studies/1/trials?{token}")
        wait(browser, lambda b: "Running" in body(b))
        assert complaints(browser) == []
        assert search.poll() is None
        search.terminate()
        assert search.wait(PATIENCE) == 143
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def answers(url: str, search: "subprocess.Popen[str]") -> None:
    """Waits until the dashboard of a running search answers."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    end = time.monotonic() + PATIENCE
    while search.poll() is None and time.monotonic() < end:
        try:
            opener.open(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer while the search ran")


def test_a_picture_dropped_on_the_page_of_serve_gets_its_classes(place: Path, browser: Any) -> None:
    """An answer with a bar for each class, and a sentence for what is no picture."""
    Image.effect_noise((60, 40), 90).convert("RGB").save(place / "new.png")
    (place / "bad.png").write_text("no picture")
    environ = os.environ | {"TUNER_HOME": str(place / "home")}
    subprocess.run([*TUNER, "export", "small", "--quiet"], cwd=place, env=environ, check=True)
    command = [*TUNER, "serve", "small", "--port", str(free())]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            browser.get("about:blank")
            complaints(browser)  # of an earlier test's page, whose server is gone
            browser.get(process.stdout.readline().split()[1])
            assert "token" not in browser.current_url
            chooser = browser.find_element(By.ID, "file")
            chooser.send_keys(str(place / "new.png"))
            bars = wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#answer .bar"))
            assert len(bars) == 3 and sum(float(bar.text.split()[-2]) for bar in bars) > 99
            assert complaints(browser) == []
            chooser.send_keys(str(place / "bad.png"))
            wait(browser, lambda b: "no image" in b.find_element(By.ID, "problem").text)
        finally:
            process.terminate()
