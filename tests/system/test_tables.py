"""Tables of images and texts, end to end: from the table through search and export to a prediction."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import CommandResult
from tests.helpers import image_tables, small_transformers
from tuner.config import parsing, yaml_document

SPACE = """task: TASK
data: {name: table, path: TABLE, size: SIZE, DATA}
model: {name: resnet18_slim, weights: bundled}
recipe: {freeze_depth: 4, epochs: EPOCHS, lr: [0.0005, 0.001]}
search: {trials: 1, confirm: none, CALIBRATE}
engine: {name: inline, device: cpu}
export: [FORMATS]
"""


def write_space(path: Path, task: str, data: str, **words: str) -> Path:
    values = {
        "TASK": task, "DATA": data, "TABLE": "photos/photos.csv", "SIZE": "32", "EPOCHS": "1",
        "CALIBRATE": "calibrate: temperature", "FORMATS": "safetensors",
    } | words  # fmt: skip
    text = SPACE
    for word, value in values.items():
        text = text.replace(word, value)
    path.write_text(text)
    return path


def manifest(name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(
        Path(f"studies/{name}/export/manifest.json").read_text()
    )
    return content


def predictions(
    tuner: Callable[..., CommandResult], name: str, *what: object
) -> list[dict[str, object]]:
    said = tuner("predict", name, *what, "--json")
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_labels_from_a_table_to_a_prediction(tuner: Callable[..., CommandResult]) -> None:
    image_tables.write_table(Path("photos"), 48)
    file = write_space(
        Path("ml.yaml"), "multilabel", "label: labels, group: person, weight: weight",
        FORMATS="safetensors, onnx",
    )  # fmt: skip
    said = tuner("run", file)
    assert said.code == 0, said.err
    assert "48" not in said.err and ", 3 labels, 3 x 32 x 32" in said.out
    found = manifest("ml")
    run, scores = found["run"], found["scores"]
    assert isinstance(run, dict) and isinstance(scores, dict)
    thresholds = run["task"]["thresholds"]
    assert found["thresholds"] == thresholds
    assert len(thresholds) == 3 and all(0 < t < 1 for t in thresholds)
    assert scores["test"]["mean_average_precision"] > 0.6
    assert [scores["per_class"][name]["threshold"] for name in found["classes"]] == pytest.approx(
        thresholds
    )  # type: ignore[attr-defined]
    assert found["temperature"] is not None and set(found["exports"]) == {
        "safetensors",
        "onnx",
    }  # type: ignore[call-overload]
    best = parsing.load_space(Path("studies/ml/best.yaml"))
    assert best.values["task", "thresholds"] == tuple(thresholds)
    report = Path("studies/ml/report.html").read_text()
    assert "test labels its probabilities differ" in report and "precision by recall" in report
    card = Path("studies/ml/export/MODEL_CARD.md").read_text()
    assert "An example has a label from this probability on" in card and "3 labels: " in card
    (said_of,) = predictions(tuner, "ml", "photos/007.png")
    probabilities = said_of["probabilities"]
    assert isinstance(probabilities, dict)
    above = {n for n, t in zip(found["classes"], thresholds, strict=True) if probabilities[n] >= t}  # type: ignore[call-overload]
    assert set(said_of["labels"]) == above  # type: ignore[call-overload]


@pytest.mark.slow
def test_numbers_from_a_table_to_a_prediction(tuner: Callable[..., CommandResult]) -> None:
    image_tables.write_table(Path("photos"), 48)
    file = write_space(
        Path("rg.yaml"),
        "regression",
        "label: [age, height]",
        FORMATS="safetensors, onnx",
    )
    said = tuner("run", file)
    assert said.code == 0, said.err
    found = manifest("rg")
    scores, exports = found["scores"], found["exports"]
    assert isinstance(scores, dict) and isinstance(exports, dict)
    assert scores["test"]["r2"] > 0.3 and set(scores["per_class"]) == {"age", "height"}
    scale = found["target_scale"]
    assert isinstance(scale, dict) and 20 < scale["mean"][0] < 60 and scale["mean"][1] > 1000
    by_format = []
    for kind in exports:
        said_of = predictions(tuner, "rg", "photos/000.png", "photos/007.png", "--format", kind)
        by_format.append([one["targets"] for one in said_of])
    low, high = by_format[0]
    assert isinstance(low, dict) and isinstance(high, dict)
    assert high["height"] > low["height"] + 500 and high["age"] > low["age"]  # 4000, 0; 55, 20
    for other in by_format[1:]:
        for one, same in zip(by_format[0], other, strict=True):
            assert same == pytest.approx(one, rel=1e-3, abs=1e-2)
    assert "| target | R² | MAE | RMSE |" in Path("studies/rg/export/MODEL_CARD.md").read_text()
    assert "largest errors" in Path("studies/rg/report.html").read_text().lower()


@pytest.mark.parametrize(
    ("task", "label", "key"),
    [("text_multilabel", "topics", "labels"), ("text_regression", "length", "targets")],
)
def test_texts_from_a_table_to_a_prediction(
    task: str, label: str, key: str, tuner: Callable[..., CommandResult]
) -> None:
    pytest.importorskip("transformers")
    small_transformers.write_model_folder(Path(), "bert")
    words = ("fine film", "cold day", "well made", "bad day")
    rows = [f"{words[i % 4]} {i},{'a|b' if i % 2 else 'b'},{i % 4}.5" for i in range(40)]
    rows[3] = rows[3].replace("a|b", "")
    Path("texts.csv").write_text("\n".join(["text,topics,length", *rows]) + "\n")
    Path("t.yaml").write_text(
        f"task: {task}\ndata: {{name: text, path: texts.csv, label: {label}}}\n"
        "model: {name: bert, folder: bert, length: 16}\n"
        "recipe: {freeze_depth: 2, epochs: 1, lr: [0.0001, 0.001]}\n"
        "search: {trials: 1}\nengine: {name: inline, device: cpu}\nexport: [safetensors]\n"
    )
    said = tuner("run", "t.yaml")
    assert said.code == 0, said.err
    (said_of,) = predictions(tuner, "t", "fine film")
    assert key in said_of


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("recipe.class_weights=balanced", "recipe.class_weights: multilabel has no such key, only"),
        ("data.augment={mosaic: 0.5}", "data.augment.mosaic: classification cannot use it"),
        ("task.thresholds=2", "task.thresholds: must be below 1, got 2"),
    ],
)
def test_keys_that_mean_nothing_for_labels_are_refused(words: str, expected: str) -> None:
    text = "task: {name: multilabel}\ndata: {name: table, path: x}\nmodel: resnet18\n"
    document = parsing.apply_overrides(yaml_document.parse_document(text, "f"), [words])
    with pytest.raises(Exception, match=r".*") as caught:
        parsing.parse_space(document)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("recipe.label_smoothing=0.1", "regression has no such key: its loss smooths no labels"),
        ("recipe.sampling=balanced", "recipe.sampling: regression has no such key, only"),
        ("search.calibrate=1.5", "search.calibrate: 1.5, but regression has no such key, only"),
        ("search.metric=accuracy", "'accuracy' is not a metric of regression"),
        ("search.direction=maximise", ""),
        ("task.loss=msle", "task.loss: expected mse, mae or huber"),
    ],
)
def test_keys_that_mean_nothing_for_numbers_are_refused(words: str, expected: str) -> None:
    text = "task: {name: regression}\ndata: {name: table, path: x}\nmodel: resnet18\nsearch: {metric: mae}\n"
    document = parsing.apply_overrides(yaml_document.parse_document(text, "f"), [words])
    with pytest.raises(Exception, match=r".*") as caught:
        parsing.parse_space(document)
    assert (expected or "mae is minimised") in str(caught.value)


def extract(shared: Path, name: str, folder: Path) -> Path:
    with tarfile.open(shared / f"{name}.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@pytest.mark.slow
def test_which_cells_are_in_a_photograph_of_blood(
    shared: Path, tmp_path: Path, tuner: Callable[..., CommandResult]
) -> None:
    folder = extract(shared, "bccd", tmp_path)
    lines = ["image,kinds"]
    for file in sorted((folder / "Annotations").glob("*.xml"))[:200]:
        objects = ElementTree.parse(file).getroot().iter("object")
        kinds = sorted({str(o.findtext("name")) for o in objects})
        lines.append(f"{file.stem}.jpg,{'|'.join(kinds)}")
    table = folder / "cells.csv"
    table.write_text("\n".join(lines) + "\n")
    images = folder / "JPEGImages"
    file = write_space(
        Path("cells.yaml"), "multilabel", f"label: kinds, folder: {images}",
        TABLE=str(table), SIZE="96", EPOCHS="3",
    )  # fmt: skip
    said = tuner("run", file)
    assert said.code == 0, said.err
    scores = manifest("cells")["scores"]
    assert isinstance(scores, dict) and scores["test"]["mean_average_precision"] > 0.7
    (said_of,) = predictions(tuner, "cells", images / "BloodImage_00000.jpg")
    assert set(said_of["probabilities"]) == {"Platelets", "RBC", "WBC"}  # type: ignore[call-overload]


@pytest.mark.slow
def test_the_number_that_a_hand_signs(
    shared: Path, tmp_path: Path, tuner: Callable[..., CommandResult]
) -> None:
    folder = extract(shared, "signdigits", tmp_path)
    lines = ["image,digit"]
    for digit in range(10):
        files = sorted((folder / str(digit)).glob("*.jpg"))[:60]
        lines += [f"{digit}/{file.name},{digit}" for file in files]
    (folder / "hands.csv").write_text("\n".join(lines) + "\n")
    file = write_space(
        Path("hands.yaml"), "regression", "label: digit",
        TABLE=str(folder / "hands.csv"), SIZE="64", EPOCHS="6",
    )  # fmt: skip
    said = tuner("run", file)
    assert said.code == 0, said.err
    scores = manifest("hands")["scores"]
    assert isinstance(scores, dict) and scores["test"]["r2"] > 0.5
    (said_of,) = predictions(tuner, "hands", next((folder / "9").glob("*.jpg")))
    assert set(said_of["targets"]) == {"digit"}  # type: ignore[call-overload]
