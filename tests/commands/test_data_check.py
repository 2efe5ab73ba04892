"""`tuner check --data`: real digits with wrong labels, copies, leaks and broken files, each of which is found."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import CommandResult
from tests.helpers import box_files, small_transformers
from tuner.commands.data_findings import Finding, probe_sentence
from tuner.preprocessing import near_duplicates
from tuner.training.data_check import LabelProbe, compare_texts
from tuner.training.label_doubts import deal_folds, find_doubted_labels

Tuner = Callable[..., CommandResult]
SWAPPED = 10


def write_digits(root: Path, count: int, swapped: int) -> list[str]:
    """A folder for each class; the first `swapped` images are in the class after theirs. Gives these."""
    pixels, labels = load_digits(return_X_y=True)
    wrong = []
    for i in range(count):
        label = int(labels[i]) if i >= swapped else (int(labels[i]) + 1) % 10
        path = root / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shades = np.round(pixels[i].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(shades).resize((32, 32), Image.Resampling.BICUBIC).save(path)
        if i < swapped:
            wrong.append(str(path))
    return wrong


def check(tuner: Tuner, *words: object) -> tuple[CommandResult, dict[str, Any]]:
    said = tuner("check", *words, "--data", "--json")
    return said, json.loads(said.out.splitlines()[-1]) if said.out else {}


def kinds(values: dict[str, Any]) -> dict[str, list[str]]:
    return {finding["kind"]: finding["examples"] for finding in values["findings"]}


def test_most_wrong_labels_are_found_and_doubts_are_no_faults(tuner: Tuner) -> None:
    wrong = write_digits(Path("digits"), 300, SWAPPED)
    said, values = check(tuner, "digits", "data.size=32")
    assert said.code == 0, said.err
    listed = [doubt["example"] for doubt in values["doubted"]]
    assert len(set(wrong) & set(listed)) >= 0.8 * SWAPPED
    assert len(set(wrong) & set(listed[: 2 * SWAPPED])) >= 0.7 * SWAPPED  # at the top
    assert len(listed) < 60  # and not by doubting everything
    found = [doubt for doubt in values["doubted"] if doubt["example"] in wrong]
    true = [d for d in found if int(d["likely"]) == (int(d["given"]) - 1) % 10]
    assert len(true) >= 0.3 * SWAPPED  # by chance about one of nine names the true class
    assert {doubt["split"] for doubt in values["doubted"]} <= {"train", "valid", "test"}
    assert all(d["given_probability"] < d["likely_probability"] for d in values["doubted"])
    page = Path(values["page"]).read_text()
    assert (
        all(doubt["example"] in page for doubt in found)
        and page.count("data:image/jpeg;base64,") >= len(wrong) - 3
    )
    assert not re.search(r"(src|href)=\"(?!data:)", page), "it needs no other file"
    assert not Path("digits.yaml").exists()
    # the first page is replaced, and a file of somebody else's is not
    Path("mine.html").write_text("mine")
    said = tuner("check", "digits", "--data", "--out", "mine.html")
    assert said.code == 4 and Path("mine.html").read_text() == "mine"


def test_broken_files_copies_and_leaks_are_found(tuner: Tuner) -> None:
    """With splits of the user's own; the code is that of a fault of data."""
    for split, start in (("train", 0), ("valid", 60)):
        write_digits(Path("all") / split, 120, 0)
        for path in Path("all", split).rglob("*.png"):
            if not start <= int(path.stem) < start + 60:
                path.unlink()
    train = Path("all/train")
    zero, other, third = sorted(train.glob("0/*.png"))[:3]
    shutil.copy(zero, "all/valid/0/leak.png")
    shutil.copy(other, train / "1" / "two.png")
    shutil.copy(third, train / "0" / "copy.png")
    one = Image.open(min(train.glob("4/*.png")))
    one.save(train / "4" / "again.jpg", quality=60)
    (train / "2" / "cut.png").write_bytes(zero.read_bytes()[:90])
    Image.new("L", (200, 20), 7).save(train / "3" / "blank.png")
    said, values = check(tuner, "all", "data.size=32")
    assert said.code == 3 and said.err.count("tuner: error:") == 3, said.err
    found = kinds(values)
    assert "cut.png" in found["unreadable"][0] and len(found["unreadable"]) == 1
    assert len(found["leak"]) == 1 and "leak.png (valid, 0)" in found["leak"][0]
    assert len(found["two_classes"]) == 1 and "two.png (train, 1)" in found["two_classes"][0]
    assert len(found["duplicate"]) == 1 and "copy.png" in found["duplicate"][0]
    assert any("again.jpg" in pair for pair in found["near_duplicate"])
    assert "blank.png" in found["blank"][0] and "blank.png" in found["narrow"][0]
    severities = {f["kind"]: f["severity"] for f in values["findings"]}
    assert {k for k, s in severities.items() if s == "fault"} == {
        "unreadable",
        "leak",
        "two_classes",
    }
    assert values["classes"]["0"]["valid"] == len(list(Path("all/valid/0").iterdir()))
    assert values["not_doubted_because"] is None
    # a search still refuses what the check could look past
    assert tuner("check", "digits.yaml", "--json").code == 2


@pytest.mark.parametrize(
    ("severities", "code"),
    [("", 0), ("note", 0), ("note note", 0), ("note fault", 3), ("fault", 3)],
)
def test_the_exit_code_is_that_of_the_worst_finding(
    severities: str, code: int, tuner: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [Finding("odd", word == "fault", f"a {word}") for word in severities.split()]
    changes: dict[str, Any] = {
        "tuner.commands.data_check.find_run": lambda *_: None,
        "tuner.training.data_check.examine_data": lambda *_: None,
        "tuner.commands.data_check.find_problems": lambda _: findings,
        "tuner.commands.data_check.write_page": lambda *_: None,
        "tuner.commands.data_check.check_lines": lambda *_: ["examined"],
    }
    for name, instead in changes.items():
        monkeypatch.setattr(name, instead)
    Path("photos").mkdir()
    said = tuner("check", "photos", "--data")
    assert said.code == code and said.out.startswith("examined\nwrote ")
    assert said.err.count("tuner: error: photos: a fault") == severities.count("fault")
    assert "a note" not in said.err


def test_texts_are_examined(tuner: Tuner) -> None:
    folder = small_transformers.write_model_folder(Path(), "bert")
    small_transformers.write_csv(Path("m.csv"), 60)
    lines = Path("m.csv").read_text().splitlines()
    text, _, label = lines[1].rpartition(",")
    Path("m.csv").write_text(
        "\n".join([*lines, *[lines[1]] * 3, f"{text.upper()}!,{label}"]) + "\n"
    )
    Path("x.yaml").write_text(
        "task: text_classification\ndata: {name: text, path: m.csv}\n"
        f"model: {{name: bert, folder: {folder}, length: 16}}\n"
    )
    said = tuner("check", "x.yaml", "--data")
    found = "with the same text in two splits" in said.err
    assert said.code == (3 if found else 0), said.err
    assert "64 texts, text classification" in said.out and "tokens" in said.out
    assert "with the same text" in said.out and "nearly alike" in said.out
    assert "of 64 doubted by a linear probe on the features of bert" in said.out


def test_objects_are_counted_and_their_labels_are_not_doubted(tuner: Tuner) -> None:
    box_files.write_voc(Path("boxes"))
    said, values = check(tuner, "boxes")
    assert said.code == 0, said.err
    scenes = box_files.make_scenes(20)
    objects = [name for scene in scenes for name, _ in scene]
    for name in ("red", "blue"):
        assert sum(values["classes"][name].values()) == objects.count(name)
    assert values["probe"] is None and "not detection" in values["not_doubted_because"]


def test_options_that_need_data_say_so(tuner: Tuner, small: Path) -> None:
    Path("photos").mkdir()
    for words in ((small, "--json"), (small, "--out", "x.html"), ("photos",)):
        said = tuner("check", *words)
        assert said.code == 2 and "--data" in said.err
    assert tuner("check", "photos", "--data").code == 3  # it holds nothing
    said = tuner("check", small, "--data", "-o", "nowhere/page.html")
    assert said.code == 4 and "nowhere is no folder; make it, or write elsewhere" in said.err


def test_confident_learning_by_hand() -> None:
    """Thresholds: 0.7 for class 0 and 0.6 for class 1."""
    probabilities = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.35, 0.65], [0.8, 0.2], [0.05, 0.95]])  # fmt: skip
    doubts = find_doubted_labels(probabilities, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert [(d.row, d.given, d.likely) for d in doubts] == [(4, 1, 0)]
    assert doubts[0].given_probability == pytest.approx(0.2)
    # another class is more probable, but not as sure as its own examples are
    probabilities[4] = torch.tensor([0.6, 0.4])
    assert find_doubted_labels(probabilities, torch.tensor([0, 0, 0, 1, 1, 1])) == []


def test_a_label_next_to_impossible_is_doubted_though_no_other_class_is_sure() -> None:
    sure = torch.eye(3).repeat(4, 1) * 0.85 + 0.05
    unsure = torch.tensor([[0.01, 0.51, 0.48], [0.2, 0.45, 0.35]])
    labels = torch.tensor([*[0, 1, 2] * 4, 0, 0])
    doubts = find_doubted_labels(torch.cat([sure, unsure]), labels)
    assert [(d.row, d.likely) for d in doubts] == [(12, 1)]


def test_folds_have_each_class_in_proportion() -> None:
    labels = torch.arange(100) % 2
    folds = deal_folds(labels)
    counts = torch.zeros(5, 2, dtype=torch.int64).index_put_(
        (folds, labels), torch.ones(100, dtype=torch.int64), accumulate=True
    )
    assert (counts == 10).all()


def test_near_duplicates_survive_light_and_leave_others_alone() -> None:
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 200, (6, 3, 16, 16), np.uint8))
    pixels[4] = (pixels[1].float() * 0.8 + 30).byte()  # darker and flatter
    pixels[5] = 9
    thumbnails = near_duplicates.make_thumbnails(pixels)
    assert [pair[:2] for pair in near_duplicates.find_similar(thumbnails)] == [(1, 4)]
    assert near_duplicates.is_blank(thumbnails).tolist() == [False] * 5 + [True]


def test_texts_that_differ_in_case_and_points_alone_are_near() -> None:
    equal, near = compare_texts(["a b", "A, b!", "a b", "c", "?", "!"])
    assert (equal, near) == ([[0, 2]], [(0, 1)])


@pytest.mark.parametrize(("accuracy", "is_weak"), [(0.55, True), (0.9, False)])
def test_a_probe_that_is_often_wrong_says_so(accuracy: float, is_weak: bool) -> None:
    checked: Any = SimpleNamespace(probe=LabelProbe("resnet18_slim", accuracy, []), names=["a"] * 9)
    assert ("its own mistakes" in probe_sentence(checked)) == is_weak
