"""Makes the pictures of README.md and docs/ from the program as it is.

    python docs/pictures.py                        the terminal and the dashboard, from one search; freeze depth, as measured
    python docs/pictures.py --data FOLDER          also those from trainings on real photographs: a search while it runs, its report,
                                                   the page of examined data, the page of `tuner serve`, detection, segmentation

FOLDER holds clothing.tar (photographs of clothes, in a folder a class), raccoon.tar (200 photographs with boxes in Pascal
VOC's XML), humans.tar (290 photographs of people with masks) and tf_efficientnet_lite0.safetensors (ImageNet weights under
timm's names). A picture that cannot be made stays as it is, and the reason is printed. Minutes on two CPU cores.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
TUNER = [sys.executable, "-m", "tuner"]
COMMAND = "tuner run search_spaces/resnet.yaml"  # README's first command
COLUMNS = 96
TALLY = re.compile(r" *\| \d+/\d+[^\n\x1b]*")  # in a terminal it is in a bar, which goes at the end
WINDOW = "1280,1380"  # with what a browser shows around the page
PAGE = "1100,1590"  # the upper part of a page
FINDINGS = "1100,1458"  # the same of a page of examined data
EXAMPLES = "1100,1210"  # the part with photographs
COLOURS = 256  # of a page's picture, which is then small
CLASSES, PER_CLASS = ("dress", "pants", "shoes", "t-shirt"), 30  # photographs of clothes
NEW = "shoes"  # the class of the photograph that the model has not seen
ROWS = 24  # of the terminal
TRIALS_SHOWN = 5  # lines above the table of a running search
HEIGHT = 430  # of a photograph at most; README shows it smaller
PATIENCE = 60  # seconds in which the dashboard draws its plots
BACKBONE = "tf_efficientnet_lite0"
REPLAY = DOCS.parent / "benchmarks/plots/replay.json"
FROZEN, TRAINED = "#4c78a8", "#f58518"

DETECTION = """
task: {{name: detection, confidence: 0.7}}
data: {{name: voc, path: raccoon, size: 192, augment: flip, views: 2}}
model: {{name: fasterrcnn/timm/{backbone}, backbone: {weights}, regions: 32, proposals: 100}}
recipe: {{lr: 0.01, freeze_depth: 8, epochs: 6, batch_size: 4, clip_norm: 10.0, schedule: cosine, warmup: 0.1}}
export: [safetensors]
"""
SEGMENTATION = """
task: {{name: segmentation, loss: dice}}
data: {{name: masks, path: humans, images: Training_Images, masks: Ground_Truth, size: 192, augment: flip, views: 2}}
model: {{name: unet/tu-{backbone}, weights: {weights}}}
recipe: {{optimizer: adamw, lr: 1e-3, freeze_depth: 4, epochs: 8, batch_size: 16, schedule: cosine}}
export: [safetensors]
"""


class Missing(Exception):
    """What a picture needs and is not there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="the folder with the photographs and weights")
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["TUNER_HOME"] = str(place / "home")
        (place / "search_spaces").symlink_to(DOCS.parent / "search_spaces")
        for name in arguments.only:
            try:
                PICTURES[name](place, arguments.data)
            except Missing as reason:
                print(f"docs/{name}: left as it is: {reason}")
            else:
                print(f"docs/{name}: made")


def terminal(place: Path, data: Path | None) -> None:
    """What the command prints, in its colours."""
    searched(place)
    printed = TALLY.sub("", (place / "output").read_text())
    draw_terminal(f"$ {COMMAND}\n{printed}", "terminal")


def draw_terminal(printed: str, name: str) -> None:
    """What stands in a terminal, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(printed), soft_wrap=True)
    picture = console.export_svg(title="tuner", unique_id=name)
    # fonts from another host would not be fetched for a picture in a page
    (DOCS / f"{name}.svg").write_text(re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL))


def searched(place: Path) -> None:
    """The study of the command, searched once for the pictures of this call."""
    if (place / "output").exists():
        return
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    command = [*TUNER, *COMMAND.split()[1:]]
    ended = subprocess.run(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    (place / "output").write_text(ended.stdout)


def dashboard(place: Path, data: Path | None) -> None:
    """The study's page in a real browser."""
    searched(place)
    with served(place, "dashboard", "resnet", "--port", "0") as address, browser(WINDOW) as chrome:
        chrome.get(address)
        wait(chrome, "document.querySelectorAll('.plotly .barlayer path').length > 5")
        chrome.save_screenshot(str(DOCS / "dashboard.png"))


@contextlib.contextmanager
def browser(window: str) -> Iterator[Any]:
    """A browser without a window, of this size. Raises Missing."""
    try:
        from selenium import webdriver
    except ImportError:
        raise Missing("selenium is not installed: pip install -e '.[test]'") from None
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        raise Missing("chromium is not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "hide-scrollbars", f"window-size={window}"):
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def wait(chrome: Any, condition: str) -> None:
    """Waits until a condition in JavaScript holds in the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(chrome, PATIENCE).until(lambda page: page.execute_script(f"return {condition}"))


@contextlib.contextmanager
def served(place: Path, *words: str) -> Iterator[str]:
    """The address that a command prints, as long as it runs."""
    with subprocess.Popen([*TUNER, *words], cwd=place, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield next(
                word for line in server.stdout for word in line.split() if word.startswith("http")
            )
        finally:
            server.terminate()


def photograph_page(chrome: Any, picture: Path) -> None:
    """What the browser shows, with so few colours that the file is small."""
    image = Image.open(io.BytesIO(chrome.get_screenshot_as_png())).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


# -- a search on photographs of clothes


def running(place: Path, data: Path | None) -> None:
    """The terminal while a search runs, in a real one."""
    search_clothes(place, data)
    draw_terminal(f"$ tuner run photos\n{(place / 'running').read_text()}", "running")


def search_clothes(place: Path, data: Path | None) -> None:
    """`tuner run photos`, once for the pictures of this call. What stands in its terminal when some
    trials have ended is kept.
    """
    if (place / "studies/photos/report.html").exists():
        return
    if shutil.which("tmux") is None:
        raise Missing("tmux is not installed (Debian: tmux)")
    unpack_clothes(place, data)
    tmux = ["tmux", "-S", str(place / "tmux")]
    command = f"{shlex.join([*TUNER, 'run', 'photos'])} 2>{place}/errors"
    size = ("-x", str(COLUMNS), "-y", str(ROWS))
    subprocess.run([*tmux, "new-session", "-d", *size, "-c", str(place), command], check=True)
    while subprocess.run([*tmux, "has-session"], capture_output=True, check=False).returncode == 0:
        time.sleep(0.3)
        captured = subprocess.run(
            [*tmux, "capture-pane", "-e", "-p"], capture_output=True, text=True, check=False
        ).stdout
        plain = re.sub(r"\x1b\[[0-9;]*m", "", captured)
        ended = len(re.findall(r"^#\d+ .* ep +\d+/", plain, re.MULTILINE))
        is_training = re.search(r"^#\d+ .*━ epoch +([2-9]|\d\d)/", plain, re.MULTILINE)
        if ended >= TRIALS_SHOWN and is_training and not (place / "running").exists():
            (place / "running").write_text(captured.rstrip() + "\n")
    if not (place / "studies/photos/report.html").exists():
        raise Missing(f"tuner run photos failed: {(place / 'errors').read_text()}")


def unpack_clothes(place: Path, data: Path | None) -> None:
    """Some photographs of some classes in `photos`, one of them twice, and another one in `new.jpg`."""
    if data is None or not (data / "clothing.tar").exists():
        raise Missing("name a folder with clothing.tar: --data FOLDER")
    with tarfile.open(data / "clothing.tar") as tar:
        tar.extractall(place, filter="data")
    for name in CLASSES:
        found = sorted((place / "clothing/train" / name).iterdir())
        (place / "photos" / name).mkdir(parents=True)
        for path in found[:PER_CLASS]:
            path.rename(place / "photos" / name / path.name)
        if name == NEW:
            shutil.copy(found[PER_CLASS], place / "new.jpg")
    twice = sorted((place / "photos" / CLASSES[0]).iterdir())[0]
    shutil.copy(twice, place / "photos" / CLASSES[1] / "copy.jpg")


def report(place: Path, data: Path | None) -> None:
    """The upper part of the report of the search on photographs."""
    search_clothes(place, data)
    with browser(PAGE) as chrome:
        chrome.get((place / "studies/photos/report.html").as_uri())
        photograph_page(chrome, DOCS / "report.png")


def examples(place: Path, data: Path | None) -> None:
    """The part of the same report that shows photographs."""
    search_clothes(place, data)
    with browser(EXAMPLES) as chrome:
        chrome.get((place / "studies/photos/report.html").as_uri())
        heading = chrome.find_element("xpath", "//h2[contains(., 'confident mistakes')]")
        chrome.execute_script("window.scrollTo(0, arguments[0].offsetTop - 30)", heading)
        photograph_page(chrome, DOCS / "report_examples.png")


def examined(place: Path, data: Path | None) -> None:
    """The page of `tuner check --data`."""
    search_clothes(place, data)
    command = [*TUNER, "check", "photos.yaml", "--data", "--out", "data.html"]
    subprocess.run(command, cwd=place, check=False)  # 3: there is something to mend, as shown
    with browser(FINDINGS) as chrome:
        chrome.get((place / "data.html").as_uri())
        photograph_page(chrome, DOCS / "data.png")


def serving(place: Path, data: Path | None) -> None:
    """The page of `tuner serve`, with a photograph dropped on it."""
    search_clothes(place, data)
    with served(place, "serve", "photos", "--port", "0") as address, browser("760,730") as chrome:
        chrome.get(address)
        chrome.find_element("id", "file").send_keys(str(place / "new.jpg"))
        wait(chrome, "document.querySelectorAll('#answer .bar').length > 2")
        photograph_page(chrome, DOCS / "serve.png")


def detection(place: Path, data: Path | None) -> None:
    unpack(place, data, "raccoon.tar")
    photograph = hold_out(place / "raccoon/images/raccoon-110.jpg")
    (place / "raccoon/annotations/raccoon-110.xml").unlink()
    predict(place, data, "raccoons", DETECTION, photograph, DOCS / "detection.png")


def segmentation(place: Path, data: Path | None) -> None:
    unpack(place, data, "humans.tar")
    photograph = hold_out(place / "humans/Training_Images/137.jpg")
    (place / "humans/Ground_Truth/137.png").unlink()
    predict(place, data, "people", SEGMENTATION, photograph, DOCS / "segmentation.png")


def unpack(place: Path, data: Path | None, archive: str) -> None:
    """Raises Missing where the archive or the weights are not there."""
    if data is None:
        raise Missing("name a folder with photographs: --data FOLDER")
    for name in (archive, f"{BACKBONE}.safetensors"):
        if not (data / name).exists():
            raise Missing(f"{data / name} is not there")
    with tarfile.open(data / archive) as tar:
        tar.extractall(place, filter="data")


def hold_out(photograph: Path) -> Path:
    """Out of the data, so that the model has not seen what the picture shows."""
    return photograph.rename(photograph.parents[2] / photograph.name)


def predict(
    place: Path, data: Path | None, name: str, space: str, photograph: Path, picture: Path
) -> None:
    """One training as the space file says, and what `tuner predict` draws from its export."""
    assert data is not None
    weights = (data / f"{BACKBONE}.safetensors").resolve()
    (place / f"{name}.yaml").write_text(space.format(backbone=BACKBONE, weights=weights))
    subprocess.run([*TUNER, "train", f"{name}.yaml"], cwd=place, check=True)
    export = f"studies/{name}/train"
    subprocess.run([*TUNER, "predict", export, photograph, "--out", name], cwd=place, check=True)
    (drawn,) = (place / name).iterdir()
    image = Image.open(drawn)
    image.thumbnail((HEIGHT, HEIGHT))
    image.save(picture, optimize=True)


def freezing(place: Path, data: Path | None) -> None:
    """Freeze depth: which stages are frozen, and what a training takes, as benchmarks/replay.py measured it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = json.loads(REPLAY.read_text())["repeats"]
    plain, tuner = (
        [
            statistics.median(times)
            for times in zip(*(r[arm]["trials"] for r in measured), strict=True)
        ]
        for arm in ("plain", "tuner")
    )
    depths, stages = range(len(tuner)), len(tuner)
    mpl.rcParams.update(
        {"svg.hashsalt": "tuner", "svg.fonttype": "none", "font.family": "sans-serif"}
    )
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    model, time = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.2))
    for depth in depths:
        colours = [FROZEN] * depth + [TRAINED] * (stages - depth)
        model.barh([depth] * stages, 0.9, left=range(stages), height=0.62, color=colours)
    model.text(0, -0.95, "input", fontsize=9)
    model.text(stages - 0.1, -0.95, "head", fontsize=9, ha="right")
    model.set(ylabel="freeze depth", xticks=[], yticks=depths, ylim=(stages - 0.4, -1.3))
    model.set_title("stages: frozen (blue) and trained (orange)", fontsize=11)
    for shift, times, colour, name in (
        (-0.18, plain, "#9a9a9a", "a plain script"),
        (0.18, tuner, "#2b8a3e", "tuner"),
    ):
        rows = time.barh([d + shift for d in depths], times, height=0.34, color=colour, label=name)
        time.bar_label(rows, [f"{t:.1f}" for t in times], padding=3, fontsize=8)
    time.set_title("seconds of the same training", fontsize=11)
    time.set(xticks=[], xlim=(0, 1.12 * max(plain)))
    time.legend(loc="lower right", frameon=False)
    for axes in (model, time):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.savefig(DOCS / "freezing.svg", metadata={"Date": None})


PICTURES: dict[str, Callable[[Path, Path | None], None]] = {
    "terminal.svg": terminal,
    "dashboard.png": dashboard,
    "freezing.svg": freezing,
    "running.svg": running,
    "report.png": report,
    "report_examples.png": examples,
    "data.png": examined,
    "serve.png": serving,
    "detection.png": detection,
    "segmentation.png": segmentation,
}


if __name__ == "__main__":
    main()
