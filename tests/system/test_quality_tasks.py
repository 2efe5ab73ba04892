"""The sets and scores of benchmarks/quality_tasks.py: what it compares is the same for all arms, and right."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import box_files, mask_files

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("task_sets", "task_scores"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data under the names that the benchmark reads, each with an example that occurs twice."""
    folder = tmp_path / "data"
    box_files.write_voc(folder / "raccoon", count=20)
    twin = folder / "raccoon" / "images" / "20.png"
    twin.write_bytes((folder / "raccoon" / "images" / "19.png").read_bytes())
    notes = folder / "raccoon" / "annotations"
    (notes / "20.xml").write_text((notes / "19.xml").read_text())
    humans = mask_files.write_images_and_masks(folder / "humans", count=12)
    (humans / "images").rename(humans / "Training_Images")
    (humans / "masks").rename(humans / "Ground_Truth")
    for file in (humans / "Ground_Truth").iterdir():
        Image.fromarray(255 * np.array(Image.open(file))).save(file)
    lines = [f"{'spam' if i % 3 == 0 else 'ham'}\tmessage, number {i}" for i in range(30)]
    (folder / "SMSSpamCollection").write_text("\n".join([*lines, lines[0]]) + "\n")
    return folder


COUNTS = {"raccoon": (20, 4), "humans": (12, 4), "sms": (30, 4)}


def make(data: Path, name: str, out: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Writes a small set; the names of its images and the lists or texts of its parts."""
    import task_sets

    small = dataclasses.replace(task_sets.SETS[name], counts={"test": 4, "valid": 3, "train": None})
    monkeypatch.setitem(task_sets.SETS, name, small)
    sizes = task_sets.make_set(name, data, out, seed)
    assert sum(sizes.values()) == COUNTS[name][0] and sizes["test"] == COUNTS[name][1]
    lists = out.rglob("*.csv") if name == "sms" else out.rglob("*.txt")
    listed = [str(path.relative_to(out)) for path in sorted(out.rglob("images/*"))]
    return listed + [file.read_text() for file in sorted(lists)]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.usefixtures("modules")
def test_a_seed_splits_a_set_in_one_way_and_no_example_is_in_two_parts(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = (
        make(data, name, tmp_path / f"{number}", seed, monkeypatch)
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


@pytest.mark.usefixtures("modules")
def test_the_truth_scores_1_and_a_shifted_box_less(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import task_scores
    import task_sets

    make(data, "raccoon", tmp_path / "set", 0, monkeypatch)
    for shift, expected in ((0, (1.0, 1.0)), (4, (0.35, 1.0))):
        found = {
            file.stem: [
                {
                    "label": name,
                    "score": 0.9,
                    "box": [box[0] + shift, *box[1:2], box[2] + shift, box[3]],
                }
                for name, box in objects
            ]
            for file, objects in task_sets.list_boxes(tmp_path / "set", "test")
        }
        (tmp_path / "found.json").write_text(json.dumps(found))
        scores = task_scores.scores("boxes", tmp_path / "set", tmp_path / "found.json")
        # red boxes have 18 x 20 pixels: IoU 14 / 22 = 0.64; blue ones 20 x 26: 16 / 24 = 0.67
        assert (scores["map"], scores["map_50"]) == pytest.approx(expected, abs=0.051)


@pytest.mark.usefixtures("modules")
def test_mean_iou_is_over_all_pixels_of_both_classes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import task_scores
    import task_sets

    make(data, "humans", tmp_path / "set", 0, monkeypatch)
    right, nothing = tmp_path / "right", tmp_path / "nothing"
    background = pixels = 0
    for folder in (right, nothing):
        folder.mkdir()
    for image, file in task_sets.list_masks(tmp_path / "set", "test"):
        mask = (np.array(Image.open(file)) > 127).astype(np.uint8)
        Image.fromarray(mask).save(right / f"{image.stem}.png")
        Image.fromarray(0 * mask).save(nothing / f"{image.stem}.png")
        background += int((mask == 0).sum())
        pixels += mask.size
    assert task_scores.mask_scores(tmp_path / "set", right) == {"mean_iou": 1.0}
    expected = {"mean_iou": pytest.approx(background / pixels / 2)}
    assert task_scores.mask_scores(tmp_path / "set", nothing) == expected


@pytest.mark.usefixtures("modules")
def test_scores_of_texts_by_hand(tmp_path: Path) -> None:
    import task_scores

    # truth 0 0 0 1, predicted 0 0 1 1
    rows = [[0, [0.9, 0.1]], [0, [0.8, 0.2]], [0, [0.3, 0.7]], [1, [0.1, 0.9]]]
    (tmp_path / "texts.json").write_text(json.dumps({"classes": ["ham", "spam"], "rows": rows}))
    assert task_scores.scores("texts", tmp_path, tmp_path / "texts.json") == pytest.approx(
        {"macro_f1": (4 / 5 + 2 / 3) / 2, "balanced_accuracy": (2 / 3 + 1) / 2, "accuracy": 3 / 4}
    )
