"""`tuner test`: an export on new data; every example counts, classes go by name, wrong ones are listed."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tuner as package
from tests.conftest import CommandResult
from tests.helpers.tiny_tasks import TINY_TASKS
from tuner.commands.new_data import choose_folder
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import ImageInputSpec
from tuner.errors import DataError
from tuner.manifest import PublishedExport
from tuner.training.inference import Predictor
from tuner.training.new_data import (
    bootstrap_intervals,
    class_table,
    read_new_data,
    rename_classes,
    test_on,
)

Tuner = Callable[..., CommandResult]
test_on.__test__ = False  # type: ignore[attr-defined]


def write_new_images(folder: Path, study: Path, count: int = 9) -> dict[Path, str]:
    """Random images in folders named by what the study's model says of them, but for the first, which lies in the folder of another class; and their true folders."""
    rng = np.random.default_rng(5)
    model = package.load(study)
    places = {}
    for number in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        said = model(pixels).values["classes"]
        name = min(said, key=said.get) if number == 0 else max(said, key=said.get)
        place = folder / name / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
        places[place] = name
    return places


def test_new_images_are_scored_whole_and_the_wrong_ones_are_listed(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    """The new data may lack classes and have classes of one image; none is set aside."""
    places = write_new_images(tmp_path / "new", studied)
    said = tuner("test", "small", "new", "--json")
    assert said.code == 0, said.err
    content = json.loads(said.out)
    assert content["examples"] == 9 and content["scores"]["accuracy"] == pytest.approx(8 / 9)
    low, high = content["intervals"]["accuracy"]
    assert 0.5 < low < 8 / 9 < high <= 1
    folder = tmp_path / content["folder"]
    (row,) = csv.DictReader((folder / "mistakes.csv").read_text().splitlines())
    wrong = next(iter(places))
    assert (row["example"], row["is"]) == (str(wrong.relative_to(tmp_path)), places[wrong])
    page = (folder / "report.html").read_text()
    assert "First test with these data" in page and "data:image/jpeg;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    again = tuner("test", "small", "new")
    assert "Test number 2 with these data" in again.out and "1 of 9 are wrong" in again.out


def test_an_unknown_class_and_files_of_someone_else_are_refused(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    write_new_images(tmp_path / "new", studied, 3)
    (tmp_path / "new" / "class7").mkdir()
    shutil.copy(next((tmp_path / "new").rglob("*.png")), tmp_path / "new" / "class7")
    said = tuner("test", "small", "new")
    assert said.code == 3 and "'class7', which the model does not know" in said.err
    shutil.rmtree(tmp_path / "new" / "class7")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("my own")
    said = tuner("test", "small", "new", "--out", "mine")
    assert said.code == 4 and "which no test wrote" in said.err
    assert (tmp_path / "mine" / "report.html").read_text() == "my own"
    (tmp_path / "notes").mkdir()
    assert tuner("test", "small", "notes").code == 3


def test_data_of_one_name_in_two_places_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parent = Path("tested/small")
    digests = {"a/photos": "1", "b/photos.v2": "2", "photos-2": "3"}
    places = {}
    for data, digest in digests.items():
        folder = places[data] = choose_folder(parent, data, digest)
        folder.mkdir(parents=True)
        content = {"tuner_test": "1", "data": data, "data_digest": digest}
        (folder / "scores.json").write_text(json.dumps(content))
    assert [p.name for p in places.values()] == ["photos", "photos-2", "photos-2-2"]
    for data, folder in places.items():  # again, changed, and moved
        assert choose_folder(parent, data, digests[data]) == folder
        assert choose_folder(parent, str(tmp_path / data), "changed") == folder
    assert choose_folder(parent, "c/photos", "2") == places["b/photos.v2"]


def test_the_studys_own_data_are_no_new_data(tuner: Tuner, studied: Path, tmp_path: Path) -> None:
    manifest = json.loads((studied / "export" / "manifest.json").read_text())
    write_new_images(tmp_path / "new", studied, 3)
    manifest["run"]["data"] = {"name": "folder", "path": str(tmp_path / "new")}
    (studied / "export" / "manifest.json").write_text(json.dumps(manifest))
    said = tuner("test", "small", next((tmp_path / "new").iterdir()))
    assert said.code == 3 and "the study was made with these data" in said.err


def test_classes_go_by_name_and_what_is_no_class_stays() -> None:
    table = class_table(["cat", "dog", "hen"], ["dog", "cat"])
    assert table.tolist() == [1, 0]
    assert rename_classes(torch.tensor([0, 1, 1]), table, 3).tolist() == [1, 0, 0]
    mask = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    renamed = rename_classes(mask, table, 3)
    assert isinstance(renamed, torch.Tensor)
    assert (renamed.tolist(), renamed.dtype) == ([[1, 0, 255]], torch.uint8)
    boxes = {"boxes": torch.zeros(1, 2, 4), "labels": torch.tensor([[1, -1]])}
    moved = rename_classes(boxes, table, 3)
    assert isinstance(moved, dict) and moved["labels"].tolist() == [[0, -1]]
    several = rename_classes(torch.tensor([[1.0, 0.0]]), table, 3)
    assert isinstance(several, torch.Tensor) and several.tolist() == [[0.0, 1.0, 0.0]]
    with pytest.raises(DataError, match=r"'dgo'.*did you mean 'dog'"):
        class_table(["cat", "dog"], ["dgo"])


def test_deep_grey_is_read_as_the_exports_own_images_were(tmp_path: Path) -> None:
    """An export of 12 bits: its model knows 800 as 50, however dark the new images are."""
    for name in "ab":
        (tmp_path / "new" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((8, 8), 800 + number, np.uint16)
            Image.fromarray(pixels).save(tmp_path / "new" / name / f"{number}.png")
    spec = ImageInputSpec(8, 8, "bilinear", (0.0,) * 3, (1.0,) * 3, grey_bits=12)
    nothing = PluginConfig("", {})
    run = Run(PluginConfig("classification", {}), nothing, nothing, Recipe(), 0)
    path = {"path": str(tmp_path / "new")}
    for bits, grey in ((12, 50), (None, 200), (16, 3)):  # of the images alone: 10 bits
        new = read_new_data(run, replace(spec, grey_bits=bits), tmp_path / "home", "folder", path)
        assert new.dataset.test.take(torch.arange(4), 0).x.unique().tolist() == [grey]  # type: ignore[union-attr]


def test_an_interval_is_that_of_the_binomial() -> None:
    """90 of 100 right: the bootstrap's interval of the accuracy is that of 100 tosses."""
    from tuner.tasks import classification

    task = classification.build(("a", "b"), Recipe())
    logits = torch.tensor([[2.0, 0.0]] * 90 + [[0.0, 2.0]] * 10)
    pairs = [(logits, torch.zeros(100, dtype=torch.int64))]
    results = task.example_results(pairs)
    low, high = bootstrap_intervals(task, {"accuracy": 0.9}, results, 100)["accuracy"]
    assert (low, high) == (pytest.approx(0.84, abs=0.015), pytest.approx(0.95, abs=0.015))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(TINY_TASKS))
def test_every_task_can_be_tested_with_new_data(name: str, tmp_path: Path) -> None:
    tiny = TINY_TASKS[name]
    run = tiny.make_run(tmp_path)
    context = tiny.prepare(run, tmp_path / "home", "cpu")
    dataset = context.dataset
    module = ExportModule(context.staged_model, dataset.input_spec).eval()
    published = PublishedExport(tmp_path, {"classes": list(dataset.classes)})
    predictor = Predictor(published, module, context.task, dataset.input_spec, torch.device("cpu"))
    new = read_new_data(run, dataset.input_spec, tmp_path / "home", run.data.name, run.data.options)
    result = test_on(predictor, new, tiny.metric, 4)
    total = len(dataset.full) + len(dataset.test)
    assert result.count == len(new.names) == len(new.dataset.test) == total
    assert set(result.scores) >= {tiny.metric}
    low, high = result.intervals[tiny.metric]
    assert low <= result.scores[tiny.metric] <= high
    listed = context.task.list_mistakes(result.pairs)
    assert (listed is None) == (name not in ("classification", "text_classification"))
    if listed is None:
        assert result.example_scores is not None and len(result.example_scores) == total
