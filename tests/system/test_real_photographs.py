"""The newcomer's path: from a folder of photographs to a model in a program of one's own."""

import csv
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandResult
from tests.helpers.exported_programs import WITHOUT_TUNER, programs

CLASSES = ("dress", "pants", "shoes")
COUNTS = {"train": ("photos", 24), "test": ("new", 6)}  # of each class; the second: its folder
COMMANDS = """
tuner init photos
tuner plan photos.yaml
tuner run photos.yaml search.trials=6
tuner report photos
tuner test photos new
tuner export photos
tuner predict photos new
"""


@pytest.fixture
def photos(shared: Path, tmp_path: Path) -> Path:
    """Photographs of clothes in `photos`, and others in `new`, in a folder a class."""
    counts = dict.fromkeys(((split, name) for split in COUNTS for name in CLASSES), 0)
    with tarfile.open(shared / "clothing.tar") as archive:
        for member in archive:
            key = Path(member.name).parts[-3:-1]
            if not member.isfile() or key not in counts or counts[key] == COUNTS[key[0]][1]:
                continue
            counts[key] += 1
            target = tmp_path / COUNTS[key[0]][0] / key[1] / Path(member.name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None
            target.write_bytes(source.read())
    assert list(counts.values()) == [24, 24, 24, 6, 6, 6]
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_seven_commands_lead_from_a_folder_to_a_model_that_needs_no_tuner(
    photos: Path, tuner: Callable[..., CommandResult]
) -> None:
    printed = {}
    for command in COMMANDS.split("\n")[1:-1]:
        said = tuner(*command.split()[1:])
        assert said.code == 0 and "Traceback" not in said.err, (command, said.err)
        printed[command.split()[1]] = said.out
    assert "72 images of 3 classes: classification" in printed["init"]
    assert printed["plan"].startswith("study   about ")

    study = photos / "studies/photos"
    report = (study / "report.html").read_text()
    assert all(name in report for name in CLASSES) and "confusion" in report.lower()
    manifest = json.loads((study / "export/manifest.json").read_text())
    assert manifest["scores"]["valid"]["accuracy"] > 0.5  # chance is 0.33
    tables = [
        path
        for path in (study / "artifacts").iterdir()
        if path.read_bytes().startswith(b"class,precision")
    ]
    assert tables and len(list(csv.reader(io.StringIO(tables[0].read_text())))) == 4

    tested = json.loads((photos / "tested/photos/new/scores.json").read_text())
    assert tested["examples"] == 18
    answers = dict(line.split()[:2] for line in printed["predict"].splitlines())
    assert len(answers) == 18 and {Path(image).parts[0] for image in answers} == {"new"}
    right = sum(Path(image).parts[1] == name for image, name in answers.items())
    assert tested["scores"]["accuracy"] == pytest.approx(right / 18)

    program = programs(study / "export")["onnx"]
    image = next(iter(answers))
    (study / "export/image.jpg").write_bytes((photos / image).read_bytes())
    ended = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_TUNER, program],
        cwd=study / "export",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[0] == answers[image]


@pytest.mark.slow
def test_the_model_that_suits_the_photographs_best_is_searched_exported_and_predicts(
    photos: Path, shared: Path, tuner: Callable[..., CommandResult]
) -> None:
    """ImageNet's weights say more of photographs than those of small grey clothes."""
    timms = f"timm/tf_efficientnet_lite0={shared / 'tf_efficientnet_lite0.safetensors'}"
    said = tuner(
        "models", "--for", "photos", "--among", "resnet18_slim,timm/tf_efficientnet_lite0",
        "--weights", timms, "--write", "chosen.yaml",
    )  # fmt: skip
    assert said.code == 0, said.err
    first = next(line for line in said.out.splitlines() if "first choice" in line)
    assert first.startswith("timm/tf_efficientnet_lite0 ")
    words = ["search.trials=3", "recipe.epochs=1", "data.size=96", "engine.name=inline"]
    said = tuner("run", "chosen.yaml", *words, "export=[safetensors]")
    assert said.code == 0, said.err
    manifest = json.loads(Path("studies/chosen/export/manifest.json").read_text())
    assert manifest["run"]["model"]["name"] == "timm/tf_efficientnet_lite0"
    said = tuner("predict", "chosen", "new", "--json")
    assert said.code == 0, said.err
    answers = [json.loads(line) for line in said.out.splitlines()]
    right = sum(
        Path(a["image"]).parts[1] == max(a["classes"], key=a["classes"].get) for a in answers
    )
    assert len(answers) == 18 and right >= 12
