"""Pictures are decoded once, whoever asks and however often; what a crash leaves is never taken for whole."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.core.input_spec import ImageInputSpec
from tuner.errors import DataError, StorageError
from tuner.preprocessing import image_decoding
from tuner.preprocessing import image_store as storing
from tuner.preprocessing.image_decoding import PathOrPixels, Pixels
from tuner.preprocessing.image_store import ImageStore, open_image_store

SMALL = ImageInputSpec(8, 8, "bilinear", (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[PathOrPixels]:
    """Every picture that is decoded from here on."""
    seen: list[PathOrPixels] = []
    real = image_decoding.try_decode

    def counted(picture: PathOrPixels, preprocess: ImageInputSpec) -> Pixels | str:
        seen.append(picture)
        return real(picture, preprocess)

    monkeypatch.setattr(image_decoding, "try_decode", counted)
    return seen


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str, int], list[Path]]:
    def write(folder: str, n: int) -> list[Path]:
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / f"{i}.png" for i in range(n)]
        for i, path in enumerate(paths):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(
                path, "BMP"
            )  # its size does not depend on the content
        return paths

    return write


def test_the_second_time_nothing_is_decoded(
    tmp_path: Path, files: Callable[[str, int], list[Path]], decoded: list[PathOrPixels]
) -> None:
    pictures = files("a", 5)
    first = open_image_store(tmp_path, pictures, SMALL, "error")
    second = open_image_store(tmp_path, pictures, SMALL, "error")
    assert len(decoded) == 5
    assert first.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert second.pixels.equal(first.pixels)
    assert second.digest == first.digest


def test_rows_of_equal_pixels_are_known_the_first_time_and_later(
    tmp_path: Path, files: Callable[[str, int], list[Path]]
) -> None:
    a, b, c = files("a", 3)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    for _ in range(2):
        made = open_image_store(tmp_path, [a, b, bad, a, c, b, *[c] * 94], SMALL, "skip")
        assert made.equal_rows[:3].tolist() == [
            [2, 0],
            [4, 1],
            [5, 3],
        ]  # rows of what could be read


def test_a_changed_file_and_another_size_are_decoded_anew(
    tmp_path: Path, files: Callable[[str, int], list[Path]], decoded: list[PathOrPixels]
) -> None:
    pictures = files("a", 2)
    before = open_image_store(tmp_path, pictures, SMALL, "error")
    Image.new("RGB", (8, 8), (99, 0, 0)).save(pictures[0], "BMP")
    os.utime(pictures[0], ns=(1, 1))
    assert open_image_store(tmp_path, pictures, SMALL, "error").digest != before.digest
    open_image_store(
        tmp_path, pictures, ImageInputSpec(16, 16, "bilinear", SMALL.mean, SMALL.std), "error"
    )
    assert len(decoded) == 6


def test_equal_pixels_have_an_equal_digest_wherever_they_lie(
    tmp_path: Path, files: Callable[[str, int], list[Path]]
) -> None:
    here, there = files("here", 3), files("there", 3)
    arrays = [np.asarray(Image.open(path)) for path in here]
    digests = {
        open_image_store(tmp_path, pictures, SMALL, "error").digest
        for pictures in (here, there, arrays)
    }
    assert len(digests) == 1
    assert open_image_store(tmp_path, here[::-1], SMALL, "error").digest not in digests


def test_bad_images_are_counted_and_the_first_ten_named(
    tmp_path: Path, files: Callable[[str, int], list[Path]]
) -> None:
    pictures = files("a", 30)
    for path in pictures[:12]:
        path.write_bytes(b"")
    with pytest.raises(DataError) as error:
        open_image_store(tmp_path, pictures, SMALL, "error")
    *named, more, total = error.value.problems
    assert [line.split(": ")[0] for line in named] == [str(path) for path in pictures[:10]]
    assert more == "… and 2 more"
    assert (
        total
        == "data: 12 of 30 images cannot be read; mend or remove them, or set data.on_bad_image: skip"
    )
    with pytest.raises(
        DataError, match=r"12 of 30 images cannot be read; skip leaves out 1 % at most"
    ):
        open_image_store(tmp_path, pictures, SMALL, "skip")
    assert [p.name for p in (tmp_path / "images").iterdir() if p.is_dir()] == []


def test_skip_leaves_out_one_percent_and_keeps_the_list(
    tmp_path: Path, files: Callable[[str, int], list[Path]], decoded: list[PathOrPixels]
) -> None:
    pictures = files("a", 200)
    pictures[3].write_text("text")
    pictures[5].unlink()
    found = open_image_store(tmp_path, pictures, SMALL, "skip")
    assert found.readable.tolist() == [i for i in range(200) if i not in (3, 5)]
    assert len(found.pixels) == 198
    place = next((tmp_path / "images").glob("*/unreadable.txt"))
    assert (
        found.warnings[0]
        == f"data: 2 of 200 images cannot be read and are left out; {place} lists them"
    )
    assert place.read_text().splitlines() == list(found.warnings[1:])
    assert open_image_store(tmp_path, pictures, SMALL, "skip").warnings == found.warnings
    with pytest.raises(
        DataError, match="2 of 200"
    ):  # the same store does not satisfy who wants every image
        open_image_store(tmp_path, pictures, SMALL, "error")
    assert len(decoded) == 200


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing is cleaned up."""


def test_a_kill_half_way_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, files: Callable[[str, int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = files("a", 600)
    real = image_decoding.try_decode

    def dying(picture: PathOrPixels, preprocess: ImageInputSpec) -> Pixels | str:
        if picture == pictures[550]:
            raise Killed
        return real(picture, preprocess)

    with monkeypatch.context() as patch:
        patch.setattr(image_decoding, "try_decode", dying)
        patch.setattr("tuner.files.removal.shutil.rmtree", lambda *a, **k: None)
        with pytest.raises(Killed):
            open_image_store(tmp_path, pictures, SMALL, "error")
    (left,) = (tmp_path / "images").glob(".*.tmp")
    assert (left / "pixels.bin").stat().st_size > 0
    open_image_store(tmp_path, pictures[:2], SMALL, "error")  # another build sweeps it
    assert not left.exists()
    assert len(open_image_store(tmp_path, pictures, SMALL, "error").pixels) == 600


@pytest.mark.parametrize("damage", ["cut", "no pixels", "no meta", "empty meta"])
def test_a_damaged_store_is_built_again(
    tmp_path: Path, files: Callable[[str, int], list[Path]], damage: str
) -> None:
    pictures = files("a", 3)
    whole = open_image_store(tmp_path, pictures, SMALL, "error").digest
    (pixels,) = (tmp_path / "images").glob("*/pixels.bin")
    if damage == "cut":
        os.truncate(pixels, 100)
    elif damage == "empty meta":
        (pixels.parent / "meta.json").write_text("")
    else:
        (pixels if damage == "no pixels" else pixels.parent / "meta.json").unlink()
    assert open_image_store(tmp_path, pictures, SMALL, "error").digest == whole


def test_a_store_unused_for_long_goes_when_another_is_built(
    tmp_path: Path, files: Callable[[str, int], list[Path]]
) -> None:
    pictures = files("a", 3)
    open_image_store(tmp_path, pictures[:1], SMALL, "error")
    open_image_store(tmp_path, pictures[:2], SMALL, "error")
    old, _ = (p for p in (tmp_path / "images").iterdir() if p.is_dir())
    os.utime(old, (time.time() - 61 * 86_400,) * 2)
    open_image_store(tmp_path, pictures, SMALL, "error")
    assert len([p for p in (tmp_path / "images").iterdir() if p.is_dir()]) == 2
    assert not old.exists()


def test_a_full_disk_is_named(
    tmp_path: Path, files: Callable[[str, int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> ImageStore:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storing, "_decode_all", full)
    with pytest.raises(StorageError, match="disk full while writing"):
        open_image_store(tmp_path, files("a", 1), SMALL, "error")
    assert not list((tmp_path / "images").glob(".*.tmp"))


RACER = """
import sys, time
from pathlib import Path
from tuner.preprocessing import image_decoding as decoding
from tuner.core.input_spec import ImageInputSpec
from tuner.preprocessing.image_store import open_image_store
home, me = Path(sys.argv[1]), sys.argv[2]
real = decoding.try_decode
def slow(picture, preprocess):
    time.sleep(0.01)
    with open(home / "decoded", "a") as log: log.write(f"{me}\\n")
    return real(picture, preprocess)
decoding.try_decode = slow
(home / f"ready-{me}").touch()
while len(list(home.glob("ready-*"))) < 2: time.sleep(0.005)
print(open_image_store(home, sorted((home / "a").iterdir()), ImageInputSpec(8, 8, "bilinear", (0.0,) * 3, (1.0,) * 3), "error").digest)
"""


@pytest.mark.slow
def test_two_processes_build_one_store(
    tmp_path: Path, files: Callable[[str, int], list[Path]]
) -> None:
    files("a", 40)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), me], stdout=subprocess.PIPE, text=True
        )
        for me in "ab"
    ]
    digests = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert digests[0] == digests[1]
    by = (tmp_path / "decoded").read_text().split()
    assert len(by) == 40 and len(set(by)) == 1


def test_images_that_would_not_fit_the_disk_are_decoded_each_time(
    tmp_path: Path,
    files: Callable[[str, int], list[Path]],
    decoded: list[PathOrPixels],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = files("a", 5)
    stored = open_image_store(tmp_path / "home", pictures, SMALL, "error")
    monkeypatch.setattr(storing, "fits_disk", lambda folder, byte_count: False)
    decoded.clear()
    for attempt in range(2):
        streamed = open_image_store(tmp_path / "other", pictures, SMALL, "error", may_stream=True)
        assert len(decoded) == 5 + 2 * attempt  # what is known of them is kept
        assert isinstance(streamed.pixels, storing.StreamedPixels)
        assert (
            streamed.digest == stored.digest
            and "decoded anew in each epoch" in streamed.warnings[0]
        )
        rows = torch.tensor([4, 1])
        assert streamed.pixels.take(rows).equal(storing.stored_pixels(stored)[rows])
    assert not list((tmp_path / "other").rglob("pixels.bin"))
    pictures[4].write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"4\.png: .*it could be read before"):
        streamed.pixels.take(torch.tensor([4]))
    again = open_image_store(tmp_path / "home", pictures[:4], SMALL, "error", may_stream=False)
    assert len(storing.stored_pixels(again)) == 4


def test_what_fits_the_disk_is_stored(tmp_path: Path) -> None:
    assert storing.fits_disk(tmp_path / "images", 1_000_000)
    assert not storing.fits_disk(tmp_path / "images", 10**18)
