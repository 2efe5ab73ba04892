"""`tuner predict` into a table, with a least probability, and over folders that are never listed."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CommandResult
from tuner.commands.predict import limit_values, open_table, require_other_file, table_rows
from tuner.core.types import Prediction
from tuner.errors import SpaceError, StorageError
from tuner.preprocessing import example_files
from tuner.training.inference import NamedPrediction

Tuner = Callable[..., CommandResult]


def test_a_table_has_a_row_for_each_image_and_says_where_the_model_is_unsure(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "new").mkdir()
    for number in range(5):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "new" / f"{number}.png")
    (tmp_path / "new" / "bad.png").write_text("no image")
    said = tuner("predict", "small", "new", "--csv", "out.csv", "--batch", "2")
    assert said.code == 3 and said.out == "wrote out.csv\n"
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["example"] for row in rows] == [f"new/{n}.png" for n in range(5)]
    for row in rows:
        probabilities = json.loads(row["values"])
        assert row["answer"] == max(probabilities, key=probabilities.get)
        assert float(row["score"]) == probabilities[row["answer"]]
    bound = sorted(float(row["score"]) for row in rows)[2] - 1e-6  # they are rounded
    tuner("predict", "small", "new", "--csv", "out.csv", "--min", bound)
    answers = [
        row["answer"] for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    ]
    assert answers.count("unsure") == 2
    printed = tuner("predict", "small", "new/0.png", "--min", "1").out
    assert printed == "new/0.png  unsure\n"
    said = tuner("predict", "small", "new/0.png", "--csv", "gone/out.csv")
    assert said.code == 4 and "gone/out.csv" in said.err


def test_objects_below_the_least_score_are_left_out() -> None:
    objects = [
        {"label": "cat", "score": 0.9, "box": [0, 0, 1, 1]},
        {"label": "dog", "score": 0.5, "box": [1, 1, 2, 2]},
    ]
    values: dict[str, Any] = {"objects": objects}
    assert limit_values(values, 0.8) == {"objects": objects[:1]}
    prediction = NamedPrediction("image", "a.png", Prediction("", values))
    assert list(table_rows(prediction, 0.8)) == [["a.png", "cat", 0.9, "[0, 0, 1, 1]"]]
    shares = NamedPrediction("image", "a.png", Prediction("", {"shares": {"x": 0.25, "y": 0.0}}))
    assert list(table_rows(shares, None)) == [["a.png", "x", 0.25, ""]]


def test_a_table_replaces_neither_a_folder_nor_its_examples(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("good film\n")
    with pytest.raises(SpaceError, match="this file holds the examples"):
        require_other_file(texts, ["a text", str(tmp_path / "." / "texts.txt")])
    require_other_file(tmp_path / "new.csv", [str(texts)])
    with pytest.raises(StorageError, match="Is a directory"), open_table(tmp_path):
        pass


def test_a_folder_of_many_files_is_read_as_it_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 50 files at most as many are looked at as are sorted, until the next one is wanted."""
    monkeypatch.setattr(example_files, "SORTED_ENTRIES", 4)
    for number in range(50):
        (tmp_path / f"{number:02}.png").touch()
    seen = 0
    scan = example_files.os.scandir

    class Counting:
        def __init__(self, folder: Path) -> None:
            self.entries = scan(folder)

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self.entries.close()

        def __iter__(self) -> "Counting":
            return self

        def __next__(self) -> Any:
            nonlocal seen
            entry = next(self.entries)
            seen += 1
            return entry

    monkeypatch.setattr(example_files.os, "scandir", Counting)
    images = example_files.find_images([str(tmp_path)])
    next(images)
    assert seen == 4
    assert len({path.name for path in images}) == 49 and seen == 50
