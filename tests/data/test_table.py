"""data/table.py: images that a file lists, with classes, groups and weights, and what is wrong with such files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec, TextInputSpec
from tuner.core.types import Dataset
from tuner.data import table
from tuner.data._rows import read_rows
from tuner.errors import DataError, SpaceError

INPUT_SPEC = ImageInputSpec(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)
COUNT = 30


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 images, each of its own shade."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        Image.new("L", (16, 16), 8 * i).save(folder / f"{i:02}.png")
    return folder


def rows(count: int = COUNT) -> list[dict[str, Any]]:
    """A class, a patient, a weight, a split, labels and a number for each image."""
    return [
        {
            "file": f"{i:02}.png",
            "kind": "ab"[i % 2],
            "patient": f"p{i // 3}",
            "w": 1 + i % 3,
            "part": ("train", "train", "train", "valid", "test")[i % 5],
            "age": i / 2,
        }
        for i in range(count)
    ]


def write_csv(path: Path, content: list[dict[str, Any]]) -> Path:
    lines = [",".join(content[0]), *(",".join(map(str, row.values())) for row in content)]
    path.write_text("\n".join(lines) + "\n")
    return path


def load(path: Path, photos: Path, task: str = "classification", **keys: Any) -> Dataset:
    names = ImageOptions.model_fields
    given = {key: keys.pop(key) for key in list(keys) if key in names}
    keys = {"image": "file", "label": "kind", "folder": str(photos)} | keys
    return table.load(
        path.parent / "home",
        INPUT_SPEC,
        task,
        path=str(path),
        options=ImageOptions(**given),
        **keys,
    )


def targets(source: Any) -> Any:
    return source.take(torch.arange(len(source)), 0).y


def shades(source: Any) -> list[int]:
    """The number of each image, from its shade."""
    x = source.take(torch.arange(len(source)), 0).x
    return [round(float(image.float().mean()) / 8) for image in x]


def write_parquet(path: Path, content: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(content), path)
    return path


def write_any(path: Path, content: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        return write_csv(path, content)
    if path.suffix == ".parquet":
        return write_parquet(path, content)
    if path.suffix == ".tsv":
        path.write_text(write_csv(path, content).read_text().replace(",", "\t"))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.parquet"])
def test_every_kind_of_file_gives_the_same_data(name: str, tmp_path: Path, photos: Path) -> None:
    data = load(write_any(tmp_path / name, rows()), photos, split="part")
    assert data.classes == ("a", "b")
    assert [len(s) for s in (data.train, data.valid, data.test)] == [18, 6, 6]
    assert [i % 2 for i in shades(data.train)] == targets(data.train).tolist()
    assert data.digest == load(write_csv(tmp_path / "n.csv", rows()), photos, split="part").digest


def test_columns_with_usual_names_need_no_keys_and_paths_no_ending(
    tmp_path: Path, photos: Path
) -> None:
    content = [{"image_id": r["file"][:2], "other": 7, "label": r["kind"]} for r in rows()]
    data = load(write_csv(tmp_path / "m.csv", content), photos, image=None, label=None)
    assert sorted(shades(data.full) + shades(data.test)) == list(range(COUNT))


def test_paths_begin_in_the_folder_of_the_file(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    content = [row | {"file": f"photos/{row['file']}"} for row in rows()]
    data = load(write_csv(tmp_path / "m.csv", content), photos, folder=None)
    assert len(data.full) + len(data.test) == COUNT


def test_files_of_splits(tmp_path: Path, photos: Path) -> None:
    for name, chosen in (("train", rows()[:20]), ("val", rows()[20:24]), ("test", rows()[24:])):
        write_csv(tmp_path / f"{name}.csv", chosen)
    data = load(tmp_path, photos)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [20, 4, 6]
    with pytest.raises(DataError, match=r"data\.split: .* has a file for each split"):
        load(tmp_path, photos, split="part")


@pytest.mark.parametrize("folds", [1, 3])
def test_groups_are_never_in_two_splits(folds: int, tmp_path: Path, photos: Path) -> None:
    path = write_csv(tmp_path / "m.csv", rows())
    held: list[int] = []
    for fold in range(folds):
        data = load(path, photos, group="patient", folds=folds, fold=fold)
        patients = [{i // 3 for i in shades(s)} for s in (data.train, data.valid, data.test)]
        assert all(patients) and sum(map(len, patients)) == len(set().union(*patients)) == 10
        held += shades(data.valid)
        assert data.train.whole.digest == data.full.digest  # type: ignore[attr-defined]
    assert len(held) == len(set(held)) and (folds == 1 or len(held) == len(data.full))
    singly = load(path, photos)
    assert any({i // 3 for i in shades(singly.train)} & {i // 3 for i in shades(singly.valid)})


def test_groups_that_the_file_itself_divides_are_refused(tmp_path: Path, photos: Path) -> None:
    path = write_csv(tmp_path / "m.csv", rows())
    with pytest.raises(DataError, match=r"data\.group: 8 groups have examples in more than one"):
        load(path, photos, group="patient", split="part")
    with pytest.raises(DataError, match=r"2 groups cannot be divided into 3 splits"):
        load(path, photos, group="kind")


def test_weights_go_with_their_images_and_have_a_mean_of_1(tmp_path: Path, photos: Path) -> None:
    data = load(write_csv(tmp_path / "m.csv", rows()), photos, weight="w")
    y = targets(data.full)
    assert set(y) == {"target", "example_weight"}
    expected = torch.tensor([(1 + i % 3) / 2 for i in shades(data.full)])
    assert torch.allclose(y["example_weight"], expected)
    assert torch.equal(data.full.take_targets(torch.tensor([3]))["target"], y["target"][3:4])  # type: ignore[attr-defined]
    assert data.digest != load(tmp_path / "m.csv", photos).digest


@pytest.mark.parametrize("augment", ["flip", "standard", "strong"])
def test_weighted_images_are_augmented_as_others_are(
    augment: str, tmp_path: Path, photos: Path
) -> None:
    path = write_csv(tmp_path / "m.csv", rows())
    plain = load(path, photos, augment=augment)
    weighted = load(path, photos, augment=augment, weight="w")
    index = torch.arange(len(plain.train))
    for view in range(3):
        x, y = plain.train.take(index, view)
        same_x, same_y = weighted.train.take(index, view)
        assert torch.equal(x, same_x) and torch.equal(y, same_y["target"])  # type: ignore[arg-type,call-overload,index]


def changed(number: int, **cells: Any) -> list[dict[str, Any]]:
    content = rows()
    content[number] |= cells
    return content


@pytest.mark.parametrize(
    ("content", "keys", "expected"),
    [
        (changed(3, file="3.png"), {}, r"m.csv:5: 3.png does not exist; did you mean '[0-9]3.png'\?\n.*1 of 30 images are not there \(looked in "),
        (changed(3, file="https://x.org/a.png"), {}, r"m.csv:5: https://x.org/a.png is an address; download"),
        (changed(3, file="02.png"), {}, r"m.csv:5: 02.png is also in the row at .*m.csv:4\n.*keep one row of each"),
        (changed(3, kind=""), {}, "1 rows without a label, at line 5"),
        (changed(3, patient=""), {"group": "patient"}, "1 rows without a group, at line 5; fill or remove"),
        (changed(3, w="heavy"), {"weight": "w"}, r"m.csv:5: 'heavy'\n.*data.weight: 1 of 30 cells are no finite numbers"),
        (changed(3, w=-1), {"weight": "w"}, r"m.csv:5: -1\n.*1 weights are below 0"),
        ([row | {"w": 0} for row in rows()], {"weight": "w"}, "all weights are 0"),
        (changed(3, part="trian"), {"split": "part"}, r"m.csv:5: 'trian' is no split; did you mean 'train'\?"),
        ([row | {"part": "test"} for row in rows()], {"split": "part"}, "no row names the split train"),
        (rows(), {"label": "kid"}, r"data.label: .*m.csv has no column 'kid'; did you mean 'kind'\?"),
        (rows(), {"weight": "wight"}, r"data.weight: .* has no column 'wight'"),
        (rows(), {"label": ("kind", "part")}, "2 columns, but an example has one class"),
        (rows(), {"folder": "nowhere"}, "data.folder: nowhere does not exist"),
        (rows(), {"label": "age"}, "30 different labels of 30 examples; is it the right column"),
        ([row | {"kind": "a"} for row in rows()], {}, r"at least 2 classes, found 1 \('a'\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(
    content: list[dict[str, Any]],
    keys: dict[str, Any],
    expected: str,
    tmp_path: Path,
    photos: Path,
) -> None:
    with pytest.raises(DataError, match=expected):
        load(write_csv(tmp_path / "m.csv", content), photos, **keys)


def test_texts_models_are_refused(tmp_path: Path, photos: Path) -> None:
    path = write_csv(tmp_path / "m.csv", rows())
    with pytest.raises(SpaceError, match="these are images, but the model wants texts"):
        table.load(
            tmp_path, TextInputSpec("x", 8), "classification", path=str(path), image="file",
            label="kind", folder=str(photos), options=ImageOptions(),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.parquet"])
def test_damaged_files_end_in_words(name: str, tmp_path: Path, photos: Path) -> None:
    """Bytes are cut, changed and inserted: it loads, or a DataError says why not."""
    whole = write_any(tmp_path / name, rows()).read_bytes()
    random = np.random.default_rng(0)
    errors = 0
    for _ in range(60):
        damaged = bytearray(whole)
        kind, place = int(random.integers(3)), int(random.integers(len(whole)))
        if kind == 0:
            del damaged[place:]
        elif kind == 1:
            damaged[place] = int(random.integers(256))
        else:
            damaged[place:place] = random.bytes(5)
        (tmp_path / name).write_bytes(bytes(damaged))
        try:
            load(tmp_path / name, photos, group="patient", weight="w")
        except DataError:
            errors += 1
    assert errors > 10


def test_parquet_without_its_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="Parquet needs the package pyarrow: pip install"):
        read_rows(tmp_path / "m.parquet", None, ())


# -- sets of labels and numbers


def labelled(cells: list[Any]) -> list[dict[str, Any]]:
    return [{"file": f"{i:02}.png", "kind": cell} for i, cell in enumerate(cells)]


SETS = ["x|y", "y", "", "x", "z | y"] * 6


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_sets_of_labels(name: str, tmp_path: Path, photos: Path) -> None:
    cells: list[Any] = SETS
    if name == "m.jsonl":
        cells = [[part.strip() for part in cell.split("|") if part.strip()] for cell in SETS]
    data = load(write_any(tmp_path / name, labelled(cells)), photos, "multilabel")
    assert data.classes == ("x", "y", "z")
    y = targets(data.full)
    assert y.dtype == torch.float32 and y.shape == (len(data.full), 3)
    wanted = {0: [1, 1, 0], 1: [0, 1, 0], 2: [0, 0, 0], 3: [1, 0, 0], 4: [0, 1, 1]}
    assert y.tolist() == [wanted[i % 5] for i in shades(data.full)]
    assert all(targets(s).sum(0).min() >= 1 for s in (data.train, data.valid, data.test))


def test_columns_of_flags_are_labels(tmp_path: Path, photos: Path) -> None:
    content = [
        {"file": f"{i:02}.png", "red": i % 2, "round": "yes" if i % 3 else "no"}
        for i in range(COUNT)
    ]
    path = write_csv(tmp_path / "m.csv", content)
    data = load(path, photos, "multilabel", label=("red", "round"))
    assert data.classes == ("red", "round")
    assert targets(data.test).tolist() == [[i % 2, float(bool(i % 3))] for i in shades(data.test)]


def test_numbers_of_several_columns(tmp_path: Path, photos: Path) -> None:
    content = [row | {"height": 1e4 * row["age"]} for row in rows()]
    data = load(
        write_csv(tmp_path / "m.csv", content), photos, "regression", label=("age", "height")
    )
    assert data.classes == ("age", "height")
    assert targets(data.full).tolist() == [[i / 2, 5e3 * i] for i in shades(data.full)]
    low = [sum(i < 10 for i in shades(s)) / len(s) for s in (data.train, data.valid, data.test)]
    assert max(low) - min(low) < 0.25  # low and high ones are in every split


@pytest.mark.parametrize(
    ("task", "content", "keys", "expected"),
    [
        ("multilabel", labelled(["x|y", "x;z", "y"] * 10), {}, r"data.separator: the cells hold '\|' and ';'; which one"),
        ("multilabel", labelled([""] * 30), {}, "no example has the label of any name"),
        ("multilabel", [row | {"kind": i % 2, "w": 2} for i, row in enumerate(rows())], {"label": ("kind", "w")}, r"m.csv:2: '2' in the column 'w'\n(.|\n)*30 cells are neither 1 nor 0"),
        ("multilabel", [row | {"kind": i % 2, "w": 0} for i, row in enumerate(rows())], {"label": ("kind", "w")}, "no example has the label 'w'"),
        ("multilabel", rows(), {"label": "file"}, "30 different labels of 30 examples; is 'file' the right column"),
        ("regression", changed(3, age="old"), {"label": "age"}, r"m.csv:5: 'old'\n.*data.label: 1 of 30 cells are no finite numbers; mend"),
        ("regression", changed(3, age="nan"), {"label": "age"}, r"m.csv:5: 'nan'"),
        ("regression", changed(3, age=""), {"label": "age"}, r"m.csv:5: ''"),
        ("regression", [row | {"age": 4} for row in rows()], {"label": "age"}, "the column 'age' has the value 4 in all 30 rows"),
    ],
)  # fmt: skip
def test_wrong_labels_and_numbers_are_told_with_their_lines(
    task: str, content: list[dict[str, Any]], keys: dict[str, Any], expected: str,
    tmp_path: Path, photos: Path,
) -> None:  # fmt: skip
    with pytest.raises(DataError, match=expected):
        load(write_csv(tmp_path / "m.csv", content), photos, task, **keys)


def test_a_list_among_other_cells_is_told_with_its_line(tmp_path: Path, photos: Path) -> None:
    path = write_any(tmp_path / "m.jsonl", labelled([["x"], ["y"], "x, y"] * 10))
    with pytest.raises(DataError, match=r"m.jsonl:3: 'x, y' is no list of labels"):
        load(path, photos, "multilabel")
