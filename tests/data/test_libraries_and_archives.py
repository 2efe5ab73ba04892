"""Data that a library or an archive holds: Hugging Face's, torchvision's, zip and tar."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets

from tests.conftest import CommandResult
from tests.helpers import box_files, mask_files, small_transformers
from tests.helpers.http_server import serve_folder
from tuner.config import plugins
from tuner.config.data_options import ImageFileOptions, ImageOptions
from tuner.core.input_spec import ImageInputSpec, TextInputSpec
from tuner.core.types import Dataset
from tuner.data import folder, huggingface
from tuner.data import torchvision as torchvision_source
from tuner.errors import DataError, SpaceError
from tuner.files.downloads import forbid_downloads
from tuner.preprocessing import unpacked_data

SPEC = ImageInputSpec(16, 16, "nearest", (0.5,) * 3, (0.5,) * 3)


def load_folder(path: Path, home: Path) -> Dataset:
    return folder.load(home, SPEC, "classification", path=str(path), image=ImageOptions())


def sizes(dataset: Dataset) -> tuple[int, int, int]:
    return len(dataset.train), len(dataset.valid), len(dataset.test)


# -- archives


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for i in range(20):
        path = root / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i * 10, 0, 0)).save(path)
    return root


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("inside", ["", "photos/"])
def test_an_archive_is_read_as_the_folder_in_it(
    kind: str, inside: str, photos: Path, tmp_path: Path
) -> None:
    archive = tmp_path / f"photos.{kind}"
    files = [path for path in sorted(photos.rglob("*")) if path.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("__MACOSX/._x", b"")
            for path in files:
                packed.write(path, inside + str(path.relative_to(photos)))
    else:
        with tarfile.open(archive, "w:gz" if kind.endswith("gz") else "w") as packed_tar:
            for path in files:
                packed_tar.add(path, inside + str(path.relative_to(photos)))
    expected = load_folder(photos, tmp_path / "home")
    dataset = load_folder(archive, tmp_path / "home")
    assert dataset.digest == expected.digest and dataset.classes == ("cat", "dog")
    entries = list((tmp_path / "home" / "unpacked").glob("[!.]*"))
    assert load_folder(archive, tmp_path / "home").digest == dataset.digest
    assert [path for path in (tmp_path / "home" / "unpacked").glob("[!.]*") if path.is_dir()] == [
        path for path in entries if path.is_dir()
    ]


def test_archives_of_boxes_and_masks_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name, task, root in (
        ("coco", "detection", box_files.write_coco(tmp_path / "coco")),
        ("yolo", "detection", box_files.write_yolo(tmp_path / "yolo")),
        ("voc", "detection", box_files.write_voc(tmp_path / "voc")),
        ("masks", "segmentation", mask_files.write_images_and_masks(tmp_path / "masks", 16)),
    ):
        with tarfile.open(tmp_path / f"{name}.tgz", "w:gz") as packed:
            packed.add(root, name)
        read = plugins.load_plugin("data", name)
        a, b = (
            read(home, SPEC, task, path=str(path), image=ImageOptions())
            for path in (root, tmp_path / f"{name}.tgz")
        )
        assert a.digest == b.digest, name


def evil_zip(path: Path, name: str) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("cat/a.png", b"x")
        packed.writestr(name, b"x")
    return path


def evil_tar(path: Path, member: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as packed:
        packed.addfile(member, io.BytesIO(b""))
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize("name", ["../out.png", "/tmp/out.png", "cat/../../out.png", "..\\out.png"])
def test_nothing_of_an_archive_is_written_outside(name: str, tmp_path: Path) -> None:
    evil = [evil_zip(tmp_path / "a.zip", name)]
    if "\\" not in name:
        evil.append(
            evil_tar(tmp_path / "b.tar", link("cat", "../.." if name[0] == "." else "/etc"))
        )
    if ".." in name and "\\" not in name:
        evil.append(evil_tar(tmp_path / "a.tar", tarfile.TarInfo(name)))
    for archive in evil:
        with pytest.raises(DataError, match="leads out of the archive"):
            load_folder(archive, tmp_path / "home")
    assert not list(tmp_path.rglob("out.png"))
    assert not [path for path in (tmp_path / "home" / "unpacked").iterdir() if path.is_dir()]


def test_damaged_and_exploding_archives_are_refused(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = evil_zip(tmp_path / "a.zip", "dog/b.png")
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.zip: cannot be unpacked .*is it truncated"):
        load_folder(archive, tmp_path / "home")
    (tmp_path / "b.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"b\.tar\.gz: cannot be unpacked"):
        load_folder(tmp_path / "b.tar.gz", tmp_path / "home")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("cat/a.png", bytes(10_000_000))
    monkeypatch.setattr(unpacked_data, "MIN_BYTES_OF_RATIO", 1_000_000)
    with pytest.raises(DataError, match="bytes that become 10,000,000 in 1 files"):
        load_folder(tmp_path / "bomb.zip", tmp_path / "home")


# -- Hugging Face


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("datasets")


def image_bytes(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, 0, 0))


def read_saved(path: Path, home: Path, task: str, spec: Any = SPEC, **keys: Any) -> Dataset:
    return huggingface.load(home, spec, task, path=str(path), image=ImageOptions(), **keys)


def test_rows_of_a_group_are_in_one_split(library: Any, tmp_path: Path) -> None:
    features = library.Features(
        {
            "image": library.Image(),
            "label": library.ClassLabel(names=["dog", "cat"]),
            "who": library.Value("int64"),
        }
    )
    rows = {
        "image": [image_bytes(10 * i) for i in range(20)],
        "label": [i % 2 for i in range(20)],
        "who": [i // 4 for i in range(20)],
    }
    library.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "one"))
    data = read_saved(tmp_path / "one", tmp_path / "home", "classification", group="who")
    parts = [rows_of_images(s) for s in (data.train, data.valid, data.test)]
    people = [{i // 4 for i in part} for part in parts]
    assert all(people) and sum(map(len, people)) == 5 and sum(map(len, parts)) == 20
    with pytest.raises(
        DataError, match=r"data\.group: .* has no column 'whom'; did you mean 'who'"
    ):
        read_saved(tmp_path / "one", tmp_path / "home", "classification", group="whom")


def rows_of_images(source: Any) -> list[int]:
    """The rows of the saved dataset that a source has."""
    whole = source.whole.rows[source.rows] if hasattr(source, "whole") else source.rows
    return list(whole.tolist())


@pytest.mark.parametrize("is_split", [False, True])
def test_images_with_classes_of_a_saved_dataset(
    library: Any, is_split: bool, tmp_path: Path
) -> None:
    features = library.Features(
        {"image": library.Image(), "label": library.ClassLabel(names=["dog", "cat"])}
    )
    rows = {"image": [image_bytes(10 * i) for i in range(20)], "label": [i % 2 for i in range(20)]}
    dataset = library.Dataset.from_dict(rows, features=features)
    if is_split:
        secret = {"image": [image_bytes(5)] * 2, "label": [-1, 0]}
        test = library.Dataset.from_dict(secret, features=features)
        dataset = library.DatasetDict({"train": dataset, "test": test})
    dataset.save_to_disk(str(tmp_path / "saved"))
    data = read_saved(tmp_path / "saved", tmp_path / "home", "classification")
    assert data.classes == ("dog", "cat")
    assert sizes(data) == ((16, 4, 1) if is_split else (12, 4, 4))
    for source in (data.full, data.test):
        x, y = source.take(torch.arange(len(source)), 0)
        assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        rows_of = [(int(v) // 10) % 2 for v in x[:, 0, 0, 0]]
        assert y.tolist() == rows_of
    assert any("1 images have no label" in warning for warning in data.warnings) == is_split


def test_boxes_of_a_saved_dataset_are_those_of_voc(library: Any, tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    inner = {"bbox": library.Sequence(library.Value("float32"), length=4)}
    inner["category"] = library.ClassLabel(names=["blue", "red"])
    features = library.Features({"image": library.Image(), "objects": library.Sequence(inner)})
    scenes = box_files.make_scenes(20)
    objects = [
        {
            "bbox": [[x, y, r - x, b - y] for _, (x, y, r, b) in scene],
            "category": [["blue", "red"].index(name) for name, _ in scene],
        }
        for scene in scenes
    ]
    images = [str(root / "images" / f"{i:02d}.png") for i in range(20)]
    features["who"] = library.Value("int64")
    rows = library.Dataset.from_dict(
        {"image": images, "objects": objects, "who": [i % 10 for i in range(20)]},
        features=features,
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    data = read_saved(tmp_path / "saved", tmp_path / "home", "detection")
    same = plugins.load_plugin("data", "voc")(
        tmp_path / "home", SPEC, "detection", path=str(root), image=ImageOptions()
    )
    assert data.classes == ("blue", "red") and data.digest == same.digest
    grouped = read_saved(tmp_path / "saved", tmp_path / "home", "detection", group="who")
    assert grouped.digest == read_grouped("voc", "detection", root, tmp_path / "home").digest


def test_masks_of_a_saved_dataset_are_those_of_files(library: Any, tmp_path: Path) -> None:
    root = mask_files.write_images_and_masks(tmp_path / "masks", 16, 3)
    files = {
        "image": [str(path) for path in sorted((root / "images").iterdir())],
        "annotation": [str(path) for path in sorted((root / "masks").iterdir())],
    }
    features = library.Features(
        {"image": library.Image(), "annotation": library.Image(), "who": library.Value("string")}
    )
    files["who"] = [str(i % 10) for i in range(16)]
    library.Dataset.from_dict(files, features=features).save_to_disk(str(tmp_path / "saved"))
    data = read_saved(tmp_path / "saved", tmp_path / "home", "segmentation")
    same = plugins.load_plugin("data", "masks")(
        tmp_path / "home", SPEC, "segmentation", path=str(root), image=ImageOptions()
    )
    assert data.digest == same.digest
    grouped = read_saved(tmp_path / "saved", tmp_path / "home", "segmentation", group="who")
    assert grouped.digest == read_grouped("masks", "segmentation", root, tmp_path / "home").digest


def read_grouped(source: str, task: str, root: Path, home: Path) -> Dataset:
    """The files that a saved dataset was made of, grouped by the last digit of their names."""
    image = ImageFileOptions(group=r"(\d)\.png$")
    dataset: Dataset = plugins.load_plugin("data", source)(
        home, SPEC, task, path=str(root), image=image
    )
    return dataset


def test_texts_of_a_saved_dataset(library: Any, tmp_path: Path) -> None:
    small_transformers.write_model_folder(tmp_path, "bert")
    spec = TextInputSpec(str(tmp_path / "bert"), 16)
    features = library.Features(
        {"text": library.Value("string"), "label": library.ClassLabel(names=["ham", "spam"])}
    )
    rows = {"text": [f"text {i}" for i in range(20)], "label": [i % 2 for i in range(20)]}
    train = library.Dataset.from_dict(rows, features=features)
    test = library.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, -1, 0]}, features=features
    )
    for name, dataset in (("one", train), ("two", library.DatasetDict(train=train, test=test))):
        dataset.save_to_disk(str(tmp_path / name))
        data = read_saved(tmp_path / name, tmp_path / "home", "text_classification", spec)
        assert data.classes == ("ham", "spam")
        assert len(data.test) == (2 if name == "two" else 4), name
    data = read_saved(tmp_path / "one", tmp_path / "home", "text_generation", spec)
    assert sum(sizes(data)) == 20
    packed = read_saved(tmp_path / "one", tmp_path / "home", "text_generation", spec, pack=True)
    assert packed.digest != data.digest and sum(sizes(packed)) < 20
    with pytest.raises(SpaceError, match=r"data\.pack.*the task is text_classification"):
        read_saved(tmp_path / "one", tmp_path / "home", "text_classification", spec, pack=True)


def test_what_is_wrong_with_a_saved_dataset(library: Any, tmp_path: Path) -> None:
    library.Dataset.from_dict({"words": ["a", "b"], "n": [1, 2]}).save_to_disk(
        str(tmp_path / "saved")
    )
    with pytest.raises(DataError, match=r"which column of .*saved.*it has 'words', 'n'"):
        read_saved(tmp_path / "saved", tmp_path, "classification")
    with pytest.raises(DataError, match=r"no column 'word'; did you mean 'words'"):
        read_saved(tmp_path / "saved", tmp_path, "classification", column="word")
    with pytest.raises(DataError, match=r"the column 'words' holds .*, no images"):
        read_saved(tmp_path / "saved", tmp_path, "classification", column="words", label="n")
    with pytest.raises(DataError, match=r"expected a folder that `dataset\.save_to_disk` wrote"):
        read_saved(tmp_path, tmp_path, "classification")
    with (
        forbid_downloads(True),
        pytest.raises(DataError, match=r"not downloaded from the hub yet; .*save_to_disk"),
    ):
        huggingface.load(tmp_path, SPEC, "classification", path="beans", image=ImageOptions())
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read .*save it anew"):
        read_saved(tmp_path / "saved", tmp_path, "classification")


def test_a_hub_that_is_not_there_says_how_to_do_without(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr(library, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"beans: no such folder.*ConnectionError: no route to the hub\); where"
    ):
        huggingface.load(tmp_path, SPEC, "classification", path="beans", image=ImageOptions())
    assert not [path for path in (tmp_path / "unpacked").iterdir() if path.is_dir()]


# -- torchvision


def write_idx(path: Path, values: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.tobytes())


def test_a_data_set_of_torchvision_is_fetched_checked_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets.utils import calculate_md5

    resources = []
    for part, count in (("train", 30), ("t10k", 10)):
        pixels = (
            np.zeros((count, 28, 28), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None]
        )
        for kind, values in (
            ("images-idx3", pixels),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 10),
        ):
            file = tmp_path / "www" / f"{part}-{kind}-ubyte.gz"
            write_idx(file, values)
            resources.append((file.name, calculate_md5(file)))
    kind = torchvision_datasets.FashionMNIST

    def read() -> Dataset:
        return torchvision_source.load(
            tmp_path / "home", SPEC, "classification", dataset="fashionmnist", image=ImageOptions()
        )

    with serve_folder(tmp_path / "www") as url:
        monkeypatch.setattr(kind, "mirrors", [url if url.endswith("/") else f"{url}/"])
        monkeypatch.setattr(kind, "resources", [(name, "0" * 32) for name, _ in resources])
        with pytest.raises(DataError, match=r"FashionMNIST cannot be downloaded .*download=True"):
            read()
        monkeypatch.setattr(kind, "resources", resources)
        with forbid_downloads(True), pytest.raises(DataError, match="`tuner run` downloads it"):
            read()
        data = read()
    assert data.classes[:2] == ("T-shirt/top", "Trouser") and len(data.classes) == 10
    assert (len(data.full), len(data.test)) == (30, 10)
    x, y = data.test.take(torch.arange(10), 0)
    assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    assert [int(v) % 10 for v in x[:, 0, 0, 0]] == y.tolist()
    assert read().digest == data.digest  # without the server


def test_files_of_torchvision_are_not_decoded_twice(tmp_path: Path) -> None:
    """EuroSAT lies in folders of classes, as torchvision unpacks it."""
    for i in range(20):
        path = tmp_path / "sat" / "eurosat" / "2750" / ("Lake" if i % 2 else "Road") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i * 10, 0, 0)).save(path)
    data = torchvision_source.load(
        tmp_path,
        SPEC,
        "classification",
        dataset="EuroSAT",
        path=str(tmp_path / "sat"),
        image=ImageOptions(),
    )
    assert data.classes == ("Lake", "Road") and sizes(data) == (12, 4, 4)


@pytest.mark.parametrize("name", sorted(torchvision_source.PARTS))
def test_torchvision_knows_the_names_and_their_parts(name: str, tmp_path: Path) -> None:
    kind = getattr(torchvision_datasets, name)
    for keys in torchvision_source.PARTS[name].values():
        with pytest.raises((RuntimeError, FileNotFoundError)):  # it is not there; no wrong argument
            kind(str(tmp_path), **keys)


def test_an_unknown_name_of_torchvision(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'Flowers102'"):
        torchvision_source.load(
            tmp_path, SPEC, "classification", dataset="Flower102", image=ImageOptions()
        )


# -- from the file to a prediction


@pytest.mark.slow
def test_a_saved_dataset_of_real_images_through_export_and_prediction(
    library: Any, shared: Path, tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    contents: dict[str, list[bytes]] = {"0": [], "1": []}
    with tarfile.open(shared / "signdigits.tar") as archive:
        for member in archive:
            digit = Path(member.name).parent.name
            if member.isfile() and len(contents.get(digit, [b""] * 40)) < 40:
                file = archive.extractfile(member)
                assert file is not None
                contents[digit].append(file.read())
    features = library.Features(
        {"image": library.Image(), "label": library.ClassLabel(names=["zero", "one"])}
    )
    rows = {
        "image": [{"bytes": image} for images in contents.values() for image in images],
        "label": [int(digit) for digit, images in contents.items() for _ in images],
    }
    library.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "digits"))
    (tmp_path / "s.yaml").write_text(
        "task: classification\ndata: {name: huggingface, path: digits, size: 64}\n"
        "model: {name: resnet18_slim}\nrecipe: {epochs: 2}\n"
        "search: {trials: 1}\nengine: {name: inline, device: cpu}\nexport: [safetensors]\n"
    )
    result = tuner("run", tmp_path / "s.yaml")
    assert result.code == 0, result.err
    (tmp_path / "new.jpg").write_bytes(contents["1"][0])
    result = tuner("predict", "s", "new.jpg", "--json")
    assert result.code == 0 and '"one"' in result.out
