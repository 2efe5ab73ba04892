"""What the sources of data list: own folders in every shape that a disk holds, CIFAR-10 found or fetched, made-up stripes."""

import hashlib
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from tests.helpers.http_server import serve_folder
from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import Dataset
from tuner.data import cifar10, digits, folder, synthetic
from tuner.errors import DataError

WANTED = ImageInputSpec(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)


def paint(root: Path, tree: Mapping[str, int]) -> Path:
    """Folder -> how many images in it, each of its own shade."""
    shade = 0
    for place, n in tree.items():
        (root / place).mkdir(parents=True)
        for i in range(n):
            shade += 1
            Image.new("L", (16, 16), shade).save(root / place / f"{i}.png")
    return root


def load(root: Path, **options: Any) -> Dataset:
    return folder.load(
        root.parent / "home",
        WANTED,
        "classification",
        path=str(root),
        image=ImageOptions(**options),
    )


def sizes(data: Dataset) -> tuple[int, int, int, int]:
    return len(data.train), len(data.valid), len(data.test), len(data.full)


# -- folders


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"cat": 10, "dog": 10}, (14, 4, 2, 18)),
        ({"train/cat": 10, "train/dog": 10}, (14, 4, 2, 18)),
        ({"train/cat": 10, "train/dog": 10, "val/cat": 2, "val/dog": 3}, (18, 5, 2, 23)),
        ({"Train/cat": 10, "Train/dog": 10, "test/cat": 2, "test/dog": 3}, (16, 4, 5, 20)),
        (
            {
                "train/cat": 4,
                "train/dog": 4,
                "valid/cat": 2,
                "valid/dog": 2,
                "test/cat": 1,
                "test/dog": 1,
            },
            (8, 4, 2, 12),
        ),
        ({"bus": 5, "car": 5, "train": 5}, (9, 3, 3, 12)),  # 'train' is a class here
        ({"cat/2023": 3, "cat/2024/may": 2, "dog": 5, ".hidden": 0}, (6, 2, 2, 8)),
    ],
)
def test_layouts(
    tmp_path: Path, tree: Mapping[str, int], expected: tuple[int, int, int, int]
) -> None:
    assert sizes(load(paint(tmp_path / "photos", tree), valid=0.2, test=0.1)) == expected


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    assert load(paint(tmp_path / "photos", {"zebra": 5, "Ant": 5, "bee": 5})).classes == (
        "Ant",
        "bee",
        "zebra",
    )


@pytest.mark.parametrize(
    "name",
    ["Kätzchen ünd 猫", "a b", "{}", "100 %", "#1", "%s%d", "q'uote\"", "x" * 255, "new\nline"],
)
def test_odd_names(tmp_path: Path, name: str) -> None:
    try:
        root = paint(tmp_path / (name[:250] if len(name) > 250 else name), {name: 5, "dog": 5})
    except OSError:
        pytest.skip("this file system has no such names")
    file = name if len(name) < 250 else name[:251] + ".png"
    Image.new("L", (16, 16), 255).save(
        root / name / (file if file.endswith(".png") else f"{file}.png")
    )
    assert set(load(root).classes) == {name, "dog"}
    assert sum(sizes(load(root))[:3]) == 11


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", {"cat": 3, "dog": 3})
    away = paint(tmp_path / "away", {"more": 4, "birds": 5})
    (root / "cat" / "more").symlink_to(away / "more")
    (root / "bird").symlink_to(away / "birds")
    (root / "dog" / "one.png").symlink_to(away / "more" / "0.png")
    data = load(root)
    assert data.classes == ("bird", "cat", "dog")
    assert sum(sizes(data)[:3]) == 3 + 3 + 4 + 5 + 1
    assert not any("links to itself" in warning for warning in data.warnings)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/up", ".."),
        ("cat/self.png", "self.png"),
        ("cat/here", "."),
        ("loop", "."),
        ("loop", "loop"),
        ("cat/top", "../.."),
        ("cat/dup", "../cat/in"),
    ],
)
def test_endless_links_are_reported_and_left_out(tmp_path: Path, link: str, target: str) -> None:
    root = paint(tmp_path / "photos", {"cat": 3, "cat/in": 1, "dog": 3})
    (root / link).symlink_to(target)
    data = load(root)
    assert sum(sizes(data)[:3]) == 7
    assert data.classes == ("cat", "dog")
    (warning,) = data.warnings
    assert warning.endswith("links to itself, or to a folder that is read anyway; left out")


def test_links_that_fork_at_every_level_are_read_once(tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", {"cat": 3, "dog": 3})
    for i in range(20):  # 2^20 ways lead to the last one
        (tmp_path / f"level{i}").mkdir()
        for side in "ab":
            (tmp_path / f"level{i}" / side).symlink_to(tmp_path / f"level{i + 1}")
    paint(tmp_path / "level20", {"end": 1})
    (root / "cat" / "maze").symlink_to(tmp_path / "level0")
    assert sum(sizes(load(root))[:3]) == 7


def test_the_same_picture_in_two_parts_and_under_two_classes_is_named(tmp_path: Path) -> None:
    tree = {"train/cat": 4, "train/dog": 4, "valid/cat": 2, "valid/dog": 2}
    root = paint(tmp_path / "photos", {**tree, "test/cat": 2, "test/dog": 2})
    assert load(root).warnings == ()
    shutil.copy(root / "train/cat/0.png", root / "test/cat/again.png")
    Image.open(root / "train/cat/1.png").save(
        root / "train/dog/9.png", optimize=True
    )  # not the same file
    shutil.copy(root / "train/dog/3.png", root / "train/dog/again.png")  # no harm
    assert load(root).warnings == (
        f"data: 1 image lies in two classes with the same content, so that one of the two labels is wrong: "
        f"{root}/train/cat/1.png ('cat') and {root}/train/dog/9.png ('dog')",
        f"data: 1 image lies in two parts with the same content, so that scores may be too good: "
        f"{root}/train/cat/0.png (training) and {root}/test/cat/again.png (test)",
    )
    shutil.copy(root / "train/cat/1.png", root / "valid/dog/again.png")
    (classes, parts) = load(root, limit=12).warnings  # from the cache, and as the limit leaves them
    assert classes.startswith("data: 2 images lie") and parts.startswith("data: 2 images lie")


def test_a_test_part_that_is_the_training_part_is_told(tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", {"train/cat": 8, "train/dog": 8})
    shutil.copytree(root / "train", root / "test")
    (warning,) = load(root).warnings
    assert warning.startswith("data: 16 images lie in two parts with the same content")


def test_copies_that_the_drawn_split_parts_are_told_without_reading_the_files_again(
    tmp_path: Path,
) -> None:
    root = paint(tmp_path / "photos", {"cat": 20, "dog": 20})
    for name in ("cat", "dog"):
        for path in list((root / name).iterdir()):
            shutil.copy(path, root / name / f"copy {path.name}")
    (warning,) = load(root).warnings
    assert (
        " images lie in two parts with the same content, so that scores may be too good" in warning
    )
    for path in root.rglob("*.png"):  # equal to the eye of the store, and worthless to a reader
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(root).warnings == (warning,)


def test_a_broken_link_is_an_unreadable_image(tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", {"cat": 3, "dog": 3})
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(
        DataError, match=r"gone.png: No such file or directory\n(.|\n)*1 of 7 images cannot be read"
    ):
        load(root)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = paint(tmp_path / "photos", {"cat": 3, "dog": 3})
    real = os.scandir

    def denied(path: Any) -> Any:
        if Path(path) == root / "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError) as error:
        load(root)
    assert str(error.value) == f"data.path: {root / 'dog'}: Permission denied; mend or remove it"


def test_the_same_photographs_elsewhere_are_the_same_data(tmp_path: Path) -> None:
    here, there = (
        load(paint(tmp_path / place / "photos", {"cat": 6, "dog": 6}))
        for place in ("here", "there")
    )
    assert here.digest == there.digest


def test_real_photographs_as_they_lie_on_a_disk(tmp_path: Path, shared: Path) -> None:
    """The first hundred test images of two of CIFAR-10's classes."""
    with tarfile.open(shared / "cifar10.tar.gz") as tar:
        wanted = ("cifar10/test/airplane/000", "cifar10/test/frog/000")
        members = []
        for member in tar:
            if member.name.startswith(wanted):
                members.append(member)
                tar.extract(member, tmp_path, filter="data")
            if len(members) >= 198:
                break
    data = load(tmp_path / "cifar10" / "test", size=32)
    assert data.classes == ("airplane", "frog")
    x, y = data.train.take(torch.arange(len(data.train)), 0)
    assert isinstance(x, torch.Tensor)
    blue = x[:, 2].float().mean((1, 2)) - x[:, 0].float().mean((1, 2))
    assert blue[y == 0].mean() > blue[y == 1].mean() + 10  # the sky is bluer than a frog


# -- digits and stripes


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    data = digits.load(tmp_path, WANTED, "classification", image=ImageOptions(size=8))
    assert sizes(data) == (1259, 269, 269, 1528)
    assert data.classes == tuple("0123456789")
    x, y = data.full.take(torch.arange(len(data.full)), 0)
    assert isinstance(x, torch.Tensor)
    assert int(x.max()) == 255 and int(x.min()) == 0
    assert sorted(set(y.tolist())) == list(range(10))


def test_stripes_follow_their_seed(tmp_path: Path) -> None:
    def made(seed: int, **options: Any) -> Dataset:
        return synthetic.load(
            tmp_path, WANTED, "classification", image=ImageOptions(seed=seed), **options
        )

    assert made(0).digest == made(0).digest != made(1).digest
    assert sizes(made(0, examples=40, classes=4)) == (24, 8, 8, 32)
    assert made(0, examples=40, classes=4).classes == ("class0", "class1", "class2", "class3")


# -- CIFAR-10, in miniature


def batch(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return pickle.dumps(
        {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": [i % 10 for i in range(20)]}
    )


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive in CIFAR-10's layout with 20 images a batch, which torchvision takes for the real one."""
    files = {f"data_batch_{i}": batch(i) for i in range(1, 6)} | {
        "test_batch": batch(6),
        "batches.meta": pickle.dumps({"label_names": NAMES}),
    }
    path = tmp_path / "web" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]},
    )
    return path


def check_cifar(data: Dataset) -> None:
    assert sizes(data) == (80, 20, 20, 100)
    assert data.classes == tuple(NAMES)
    x, y = data.test.take(torch.arange(20), 0)
    expected = pickle.loads(batch(6))
    assert torch.equal(x, torch.from_numpy(expected["data"]).view(20, 3, 32, 32))
    assert y.tolist() == expected["labels"]


@pytest.fixture
def cifar(tmp_path: Path) -> Callable[..., Dataset]:
    return lambda path=None: cifar10.load(
        tmp_path / "home",
        ImageInputSpec(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3),
        "classification",
        path=path,
        image=ImageOptions(),
    )


def test_cifar10_whose_test_part_is_a_training_part_is_told(
    archive: Path, cifar: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/none")
    monkeypatch.setattr(CIFAR10, "test_list", CIFAR10.train_list[:1])
    (warning,) = cifar(str(archive.parent)).warnings
    assert warning.startswith("data: 20 images lie in two parts with the same content")
    assert "number 0 (" in warning and "number 100 (test)" in warning


def test_cifar10_is_downloaded_once(
    archive: Path, cifar: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve_folder(archive.parent) as address:
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{archive.name}")
        check_cifar(cifar())
    check_cifar(cifar())  # the server is gone
    check_cifar(cifar(str(tmp_path / "home" / "data")))
    check_cifar(cifar(str(tmp_path / "home" / "data" / "cifar-10-batches-py")))


def test_an_archive_placed_by_hand_is_unpacked(
    archive: Path, cifar: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/none")
    check_cifar(cifar(str(archive.parent)))


def test_offline_the_message_says_where_to_place_the_archive(
    archive: Path, cifar: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve_folder(archive.parent) as address:
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{archive.name}")
    with pytest.raises(DataError) as error:
        cifar(str(tmp_path / "place"))
    assert str(error.value).startswith(f"data: cannot download {address}/{archive.name}: ")
    assert str(error.value).endswith(
        f"fetch it elsewhere (its MD5 begins with {CIFAR10.tgz_md5}) and place it at {tmp_path / 'place' / archive.name}"
    )


def test_another_archive_is_not_kept(
    archive: Path, cifar: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with serve_folder(archive.parent) as address:
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{archive.name}")
        with pytest.raises(
            DataError, match=r"has MD5 [0-9a-f]{32}, expected 0{32}…; nothing was kept"
        ):
            cifar(str(tmp_path / "place"))
    assert not (tmp_path / "place" / archive.name).exists()


def test_a_file_for_a_folder(archive: Path, cifar: Callable[..., Dataset]) -> None:
    with pytest.raises(
        DataError,
        match="is a file; expected the folder that holds or shall hold cifar-10-batches-py",
    ):
        cifar(str(archive))
