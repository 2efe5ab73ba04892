"""`tuner init DATA` and `tuner run DATA`: the kind of data is recognised, and the file runs as it is."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest

from tests.conftest import CommandResult
from tests.helpers import box_files, damaged_files, image_tables, mask_files
from tuner.commands import init, space_proposal
from tuner.commands.data_scan import coco_images, scan_data
from tuner.commands.space_proposal import (
    MODELS,
    TRIALS,
    Machine,
    choose_model,
    choose_size,
    explain_model,
    format_space,
    round_down,
)
from tuner.config import parsing, yaml_document
from tuner.config.search_settings import AS_MANY_AS_FIT
from tuner.errors import DataError, SpaceError

Tuner = Callable[..., CommandResult]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that refuses at once."""
    monkeypatch.setattr(init, "WEIGHT_HOSTS", ("http://127.0.0.1:9",))


def write_classes(root: Path, sizes: dict[str, int]) -> Path:
    for name, count in sizes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            damaged_files.make_picture(i + 100 * len(name), 40).save(root / name / f"{i}.png")
    return root


def write_splits(root: Path) -> Path:
    for split in ("train", "val", "test"):
        write_classes(root / split, {"cat": 8, "horse": 8})
    return root


def write_voc_with_masks(root: Path) -> Path:
    damaged_files.write_voc(root)
    damaged_files.write_masks(root / "SegmentationClass")
    return root


def write_named_masks(root: Path) -> Path:
    mask_files.write_images_and_masks(root)
    (root / "images").rename(root / "Training_Images")
    (root / "masks").rename(root / "Ground_Truth")
    return root


def write_parquet(root: Path) -> Path:
    frame = pandas.read_csv(damaged_files.write_table(root, "a.csv"))
    frame.to_parquet(root.with_suffix(".parquet"))
    return root.with_suffix(".parquet")


KINDS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "classes": (lambda p: write_classes(p, {"a": 9, "b": 9}), ["folder/classification"]),
    "splits": (write_splits, ["folder/classification"]),
    "voc": (box_files.write_voc, ["voc/detection"]),
    "voc of both": (write_voc_with_masks, ["voc/detection", "voc/segmentation"]),
    "coco": (box_files.write_coco, ["coco/detection"]),
    "yolo": (box_files.write_yolo, ["yolo/detection"]),
    "masks": (mask_files.write_images_and_masks, ["masks/segmentation"]),
    "masks by other names": (write_named_masks, ["masks/segmentation"]),
    "csv": (lambda p: damaged_files.write_table(p, "a.csv"), ["text/text_classification"]),
    "parquet": (write_parquet, ["text/text_classification"]),
    "jsonl": (lambda p: damaged_files.write_table(p, "a.jsonl"), ["text/text_classification"]),
    "nothing": (lambda p: (p.mkdir(), p)[1], []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_is_recognised_and_its_file_understood(tmp_path: Path, kind: str) -> None:
    write, labels = KINDS[kind]
    readings = scan_data(str(write(tmp_path / "data")))
    assert [reading.label for reading in readings] == labels
    for reading in readings:
        for has_gpu in (False, True):
            for preset in TRIALS:
                text = format_space(reading, Machine(has_gpu, True, tmp_path), preset)
                space = parsing.parse_space(yaml_document.parse_document(text, "f.yaml"))
                assert space.settings.search.trials == TRIALS[preset]
                assert {"lr", "freeze_depth"} <= {d.key for d in space.dimensions}


def test_run_of_a_folder_writes_a_file_runs_it_and_goes_on_with_it(
    tuner: Tuner, tmp_path: Path
) -> None:
    write_classes(tmp_path / "pets", {"cat": 20, "parrot": 20})
    quick = ["search.trials=2", "recipe.epochs=1", "engine.name=inline", "export=safetensors"]
    said = tuner("run", "pets", "--preset", "quick", *quick)
    assert said.code == 0, said.err
    assert "pets: 40 images of 2 classes: classification" in said.out
    assert "wrote pets.yaml (preset quick)" in said.out
    assert "resnet18_slim" in (tmp_path / "pets.yaml").read_text()  # there is no network
    again = tuner("run", "pets", *quick)
    assert again.code == 0 and "nothing left to do" in again.out
    refused = tuner("run", "pets", "--preset", "best", *quick)
    assert refused.code == 2 and "pets.yaml is there already" in refused.err
    (tmp_path / "pets.yaml").write_text("data: {path: birds}")
    refused = tuner("run", "pets", *quick)
    assert refused.code == 2 and "not about pets" in refused.err


def test_json_output_of_a_run_stays_json(tuner: Tuner, tmp_path: Path) -> None:
    write_classes(tmp_path / "pets", {"cat": 12, "parrot": 12})
    said = tuner(
        "run",
        "pets",
        "--json",
        "search.trials=1",
        "recipe.epochs=1",
        "engine.name=inline",
        "export=safetensors",
    )
    assert said.code == 0 and [json.loads(line) for line in said.out.splitlines()]
    assert "wrote pets.yaml" in said.err


def test_ambiguous_data_are_an_error_with_the_choices(tuner: Tuner, tmp_path: Path) -> None:
    write_voc_with_masks(tmp_path / "voc")
    refused = tuner("init", "voc")
    assert refused.code == 2
    assert "2 ways: voc/detection, voc/segmentation; choose one with --as" in refused.err
    assert not (tmp_path / "voc.yaml").exists()
    chosen = tuner("init", "voc", "--as", "voc/segmentation", "-o", "seg.yaml")
    assert chosen.code == 0 and "task: segmentation" in (tmp_path / "seg.yaml").read_text()
    refused = tuner("init", "voc", "--as", "voc/segmentatio")
    assert refused.code == 2 and "did you mean 'voc/segmentation'?" in refused.err


class Typed(io.StringIO):
    """A terminal, in which somebody has typed something or something is said."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_ambiguous_data_are_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_voc_with_masks(tmp_path / "voc")
    for answer, task in (("1", "detection"), ("2", "segmentation")):
        screen = Typed()
        monkeypatch.setattr("sys.stdin", Typed(f"{answer}\n"))
        monkeypatch.setattr("sys.stdout", screen)
        assert init.choose_reading(str(tmp_path / "voc"), None).task == task
        asked = screen.getvalue()
        assert "1  voc/detection\n2  voc/segmentation\nas which of these" in asked
    monkeypatch.setattr("sys.stdin", Typed("3\n"))
    with pytest.raises(SpaceError, match="3 is not one of 1 to 2"):
        init.choose_reading(str(tmp_path / "voc"), None)


def test_a_time_takes_the_place_of_a_number_of_trials(tuner: Tuner, tmp_path: Path) -> None:
    write_classes(tmp_path / "pets", {"cat": 4, "parrot": 4})
    said = tuner("init", "pets", "--time", "2h")
    assert said.code == 0, said.err
    space = parsing.load_space(tmp_path / "pets.yaml")
    search = space.settings.search
    assert search.time == "2h" and search.trials == AS_MANY_AS_FIT
    refused = tuner("init", "pets", "-o", "b.yaml", "--time", "soon")
    assert refused.code == 2 and "such as 90s" in refused.err
    assert not (tmp_path / "b.yaml").exists()


def test_a_json_file_with_cocos_keys_alone_has_no_images(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"images": 5, "annotations": null}')
    assert coco_images(file) == 0
    file.write_text('{"images": [{"id": 1}], "annotations": []}')
    assert coco_images(file) == 1


def test_bad_input_is_told_without_a_traceback(tuner: Tuner, tmp_path: Path) -> None:
    write_classes(tmp_path / "pets", {"cat": 3, "parrot": 3})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    write_classes(tmp_path / "one", {"cat": 3})
    (write_classes(tmp_path / "gaps", {"cat": 3, "parrot": 3}) / "none").mkdir()
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir()
        (tmp_path / "broken" / name / "x.png").write_text("no image")
    (tmp_path / "there.yaml").write_text("mine")
    for words, code, message in (
        (("init", "pest"), 3, "data.path: pest does not exist"),
        (("init", "empty"), 3, "empty: not known as data (it holds nothing)"),
        (("init", "broken"), 3, "x.png"),
        (("init", "gaps"), 3, "gaps: no image in 'none'"),
        (("run", "gaps"), 3, "gaps: no image in 'none'"),
        (("init", "pets/cat"), 3, "3 images lie directly in it; put each class's images into"),
        (("init", "one"), 3, "all images are in 'cat'"),
        (("init", "pets", "--preset", "quik"), 2, "did you mean 'quick'?"),
        (("init", "pets", "-o", "there.yaml"), 2, "there.yaml is there already"),
        (("init", "pets", "-o", "no/x.yaml"), 2, "no is no folder"),
        (("run", "there.yaml", "--preset", "best"), 2, "--preset and --as are for data"),
        (("run", "their.yaml"), 2, "their.yaml: no such file; did you mean 'there.yaml'?"),
    ):
        said = tuner(*words)
        assert (said.code, message in said.err) == (code, True), said.err
        assert "Traceback" not in said.err
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_labels_are_guessed_where_columns_have_unusual_names(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    rows = [f"{i},some words about {i},{'xy'[i % 2]},{'uvw'[i % 3]}" for i in range(40)]
    file.write_text("id,words,kind,topic\n" + "\n".join(rows))
    labels = [reading.label for reading in scan_data(str(file))]
    assert labels == ["text/text_classification/kind", "text/text_classification/topic"]
    assert scan_data(str(file))[0].options == {
        "header": True,
        "text": "words",
        "label": "kind",
    }


def test_rare_classes_change_metric_and_recipe(tmp_path: Path) -> None:
    reading = scan_data(str(write_classes(tmp_path / "d", {"a": 20, "b": 4})))[0]
    text = format_space(reading, Machine(False, False, tmp_path), "medium")
    assert "metric: balanced_accuracy" in text and "class_weights: [none, balanced]" in text


def test_weights_that_cannot_be_had_are_not_proposed(tmp_path: Path) -> None:
    here, away = Machine(False, True, tmp_path), Machine(False, False, tmp_path)
    assert choose_model("classification", here).weights == "default"
    assert choose_model("classification", away).name == "resnet18_slim"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "resnet18-f37072fd.pth").write_text("")
    assert choose_model("classification", away).name == "resnet18"


def test_another_model_than_the_usual_one_is_told_with_the_reason(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "pets", {"cat": 4, "parrot": 4})
    for can_download in (False, True):
        monkeypatch.setattr(init, "can_download", lambda can=can_download: can)
        said = tuner("init", "pets", "-o", f"{can_download}.yaml")
        told = "its weights are not here and cannot be downloaded" in said.out
        written = "# resnet18_slim instead of" in (tmp_path / f"{can_download}.yaml").read_text()
        assert said.code == 0 and told == written == (not can_download)
    monkeypatch.setattr(space_proposal, "is_installed", lambda model: model.package != "timm")
    assert explain_model("classification", Machine(False, True, tmp_path)) == (
        "resnet18 instead of timm/tf_efficientnet_lite0: timm is not installed"
    )


def test_small_images_are_not_blown_up_and_rates_are_numbers(tmp_path: Path) -> None:
    reading = scan_data(str(write_classes(tmp_path / "d", {"a": 4, "b": 4})))[0]
    model = choose_model("classification", Machine(False, True, tmp_path))
    assert reading.side == 40 and choose_size(reading, model, "best") == 64
    assert [round_down(v) for v in (5e-5, 0.0005 * 6, 0.02)] == ["5e-5", "3e-3", "2e-2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({m.name for group in MODELS.values() for m in group}))
def test_the_models_have_the_freeze_depths_that_are_searched(name: str) -> None:
    from tuner.training.model_summary import summarize_model

    model = next(m for group in MODELS.values() for m in group if m.name == name)
    assert summarize_model(name).depths[-1].depth - model.deepest in (0, 1)  # a new decoder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["splits", "voc", "coco", "yolo", "masks by other names"])
def test_check_accepts_the_file_as_it_is(tuner: Tuner, tmp_path: Path, kind: str) -> None:
    KINDS[kind][0](tmp_path / "data")
    assert tuner("init", "data", "--preset", "quick").code == 0
    checked = tuner("check", "data.yaml")
    # weights that are not here are the only thing that may be missing
    assert checked.code == 0 or "is not there yet; `tuner run` downloads it" in checked.err


def test_tables_of_images_are_known_by_their_cells(tmp_path: Path) -> None:
    table = image_tables.write_table(tmp_path / "photos", 96)
    text = table.read_text()
    readings = {reading.label: reading for reading in scan_data(str(table))}
    assert set(readings) == {"table/multilabel"}  # a column called labels decides
    reading = readings["table/multilabel"]
    assert reading.class_sizes == {"red": 48, "green": 48, "blue": 48} and reading.side == 24
    assert reading.options == {
        "image": "image", "label": "labels", "group": "person", "weight": "weight",
    }  # fmt: skip
    table.write_text(text.replace("labels,", "colours,", 1))
    found = {reading.label: reading for reading in scan_data(str(table))}
    assert set(found) == {
        "table/multilabel/colours",
        "table/classification/kind",
        "table/regression/age",
        "table/classification/height",
    }
    for reading in found.values():
        for preset in ("quick", "best"):
            written = format_space(reading, Machine(False, True, tmp_path), preset)
            space = parsing.parse_space(yaml_document.parse_document(written, "f.yaml"))
            assert space.values["data", "group"] == "person"


def test_a_table_beside_a_folder_of_images_and_with_its_own_splits(tmp_path: Path) -> None:
    table = image_tables.write_table(tmp_path / "data" / "images", 48)
    lines = table.read_text().splitlines()
    marked = [
        f"{lines[0]},split",
        *(f"{x},{'train' if i % 2 else 'test'}" for i, x in enumerate(lines[1:])),
    ]
    moved = tmp_path / "data" / "list.csv"
    moved.write_text("\n".join(marked))
    (reading,) = scan_data(str(moved))
    assert reading.options["folder"] == str(tmp_path / "data" / "images")
    assert reading.options["split"] == "split" and reading.splits == ("train", "test")
    moved.write_text("image,label\nnowhere.png,a\nneither.png,b\n")
    with pytest.raises(
        DataError, match=r"lists images such as 'nowhere.png', and neither .* has them"
    ):
        scan_data(str(moved))


def test_columns_of_texts_are_for_labels_or_numbers_too(tmp_path: Path) -> None:
    rows = [f"some words {i},{('a|b', 'b', 'a')[i % 3]},{i / 7:.3f}" for i in range(60)]
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["text,label,other", *rows]))
    assert [reading.task for reading in scan_data(str(file))] == ["text_multilabel"]
    file.write_text("\n".join(["text,other,label", *rows]))
    assert [reading.task for reading in scan_data(str(file))] == ["text_regression"]
