"""Makes the pictures of README.md and docs/ from the program as it is.

    python docs/pictures.py                        the terminal and the dashboard, from one search; freeze depth, as measured
    python docs/pictures.py --data FOLDER          also detection and segmentation, from trainings on real photographs

FOLDER holds raccoon.tar (200 photographs with boxes in Pascal VOC's XML), humans.tar (290 photographs of people with masks) and
tf_efficientnet_lite0.safetensors (ImageNet weights under timm's names). A picture that cannot be made stays as it is, and
the reason is printed. Minutes on two CPU cores.
"""

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
TUNER = [sys.executable, "-m", "tuner"]
COMMAND = "tuner run search_spaces/resnet.yaml"  # README's first command
COLUMNS = 96
TALLY = re.compile(r" *\| \d+/\d+[^\n\x1b]*")  # in a terminal it is in a bar, which goes at the end
WINDOW = "1280,1380"  # with what a browser shows around the page
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
    text = Text.from_ansi(f"$ {COMMAND}\n{printed}")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(text, soft_wrap=True)
    picture = console.export_svg(title="tuner", unique_id="terminal")
    # fonts from another host would not be fetched for a picture in a page
    (DOCS / "terminal.svg").write_text(
        re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL)
    )


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
    try:
        from selenium import webdriver
        from selenium.webdriver.support.ui import WebDriverWait
    except ImportError:
        raise Missing("selenium is not installed: pip install -e '.[test]'") from None
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        raise Missing("chromium is not installed (Debian: chromium, chromium-driver)")
    searched(place)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "hide-scrollbars", f"window-size={WINDOW}"):
        options.add_argument(f"--{flag}")
    command = [*TUNER, "dashboard", "resnet", "--port", "0"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as server:
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            assert server.stdout is not None
            chrome.get(next(word for word in server.stdout.readline().split() if "http" in word))
            drawn = "return document.querySelectorAll('.plotly .barlayer path').length > 5"
            WebDriverWait(chrome, PATIENCE).until(lambda page: page.execute_script(drawn))
            chrome.save_screenshot(str(DOCS / "dashboard.png"))
        finally:
            chrome.quit()
            server.terminate()


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
    "detection.png": detection,
    "segmentation.png": segmentation,
}


if __name__ == "__main__":
    main()
