"""Faults 12 to 19, 24 and 25 through the command line: message, exit code, and that nothing was made."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

from tests.conftest import CommandResult
from tests.helpers.http_server import serve_folder
from tests.helpers.png_headers import png_header
from tuner.models.resnet import build_slim_resnet

Tuner = Callable[..., CommandResult]
Write = Callable[[Path], None]

SPACE = """
task: classification
data: {name: folder, path: photos, size: 16}
model: {name: resnet18_slim, weights: none}
recipe: {epochs: 1, batch_size: 4}
search: {name: mine}
engine: {name: inline, device: cpu}
export: [safetensors]
"""


def paint(folder: Path, n: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        shade = (i, sum(map(ord, folder.name)) % 256, 0)  # no two pictures alike
        Image.new("RGB", (16, 16), shade).save(folder / f"{i}.png")


def classes(*counts: int, root: str = "photos") -> Write:
    def write(here: Path) -> None:
        for name, n in zip("abcdefgh", counts, strict=False):
            paint(here / root / name, n)

    return write


def both(*writes: Write) -> Write:
    return lambda here: [write(here) for write in writes] and None


def content(name: str, data: bytes) -> Write:
    return lambda here: (here / name).write_bytes(data) and None


def header(width: int, height: int) -> Write:
    """An image that is all promise."""
    return both(classes(5, 5), content("photos/a/huge.png", png_header(width, height)))


def truncated(here: Path) -> None:
    noise = Image.effect_noise((64, 64), 90)
    noise.save(here / "photos/a/cut.jpg")
    os.truncate(here / "photos/a/cut.jpg", 900)


def unlike(here: Path) -> None:
    for part, names in (("train", ("cat", "dog")), ("valid", ("cat", "fox"))):
        for name in names:
            paint(here / "photos" / part / name, 3)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Write:
    def write(here: Path) -> None:
        state = build_slim_resnet(3).state_dict()
        torch.save(change(state), here / "w.pth")

    return both(classes(5, 5, 5), write)


def cut_weights(here: Path) -> None:
    weights(lambda state: state)(here)
    os.truncate(here / "w.pth", 100_000)


def evil_weights(here: Path) -> None:
    (here / "w.pth").write_bytes(pickle.dumps({"fc.weight": Malicious()}, protocol=2))


BY_PATH = "model.weights=./w.pth"

REFUSED = {
    "12 missing": (
        lambda here: (here / "photoz").mkdir(),
        "data.path=photos",
        "data.path: photos does not exist (looked in {here}); did you mean 'photoz'?",
    ),
    "12 a file": (
        content("photos", b"x"),
        "",
        "data.path: photos is a file; expected a folder with one folder of images per class",
    ),
    "13 empty class": (
        classes(5, 0, 5, 0),
        "",
        "data.path: photos: classes with 0 images: 'b', 'd'; add images (",
    ),
    "13 no classes": (
        lambda here: paint(here / "photos", 3),
        "",
        "data.path: photos has no class folders; 3 images lie directly in it; put each",
    ),
    "13 no classes in parts": (
        lambda here: paint(here / "photos/train", 3),
        "",
        "data.path: photos/train has no class folders; 3 images lie",
    ),
    "14 one class": (
        classes(5),
        "",
        "data: classification needs at least 2 classes, found 1 ('a')",
    ),
    "15 classes differ": (
        unlike,
        "",
        "train has 'cat', 'dog'; valid has 'cat', 'fox' (only in train: 'dog'; only in valid: 'fox')",
    ),
    "16 class of 1": (
        classes(5, 1, 5),
        "",
        "data: each class needs at least 3 examples to be split, but 'b' has 1; add some or give",
    ),
    "17 corrupt": (
        both(classes(5, 5), content("photos/a/text.jpg", b"hello")),
        "",
        "photos/a/text.jpg: cannot identify image file its content\n",
    ),
    "17 truncated": (
        both(classes(5, 5), truncated),
        "",
        "photos/a/cut.jpg: image file is truncated",
    ),
    "17 empty": (
        both(classes(5, 5), content("photos/a/empty.png", b"")),
        "",
        "data: 1 of 11 images cannot be read; mend or remove them, or set data",
    ),
    "17 bomb": (
        header(50_000, 50_000),
        "",
        "photos/a/huge.png: Image size (2500000000 pixels) exceeds limit",
    ),
    "17 large": (
        header(10_000, 9_500),
        "",
        "photos/a/huge.png: 10000 x 9500 pixels, more than 50,000,000",
    ),
    "18 shape": (
        weights(lambda state: state | {"layer1.0.conv1.weight": torch.zeros(2, 4)}),
        BY_PATH,
        "weights: ./w.pth: layer1.0.conv1.weight has shape (2,4), model wants (16,16,3,3)\n",
    ),
    "18 architecture": (
        weights(lambda state: torch.nn.Linear(2, 2).state_dict()),
        BY_PATH,
        "weights: ./w.pth: conv1.weight is missing\n",
    ),
    "18 truncated": (cut_weights, BY_PATH, "weights: w.pth is damaged or truncated ("),
    "18 page": (
        both(classes(5, 5), content("w.pth", b"<!doctype html>")),
        BY_PATH,
        "it is an HTML page, so the download link led to a web page",
    ),
    "18 pickle": (
        both(classes(5, 5), evil_weights),
        BY_PATH,
        "w.pth refused: it is damaged or would run code when loaded",
    ),
    "18 nan": (
        weights(lambda state: state | {"bn1.weight": torch.full((16,), float("nan"))}),
        BY_PATH,
        "bn1.weight holds NaN or infinite values",
    ),
    "18 missing": (
        classes(5, 5),
        BY_PATH,
        "weights: w.pth does not exist; give a .safetensors or .pth file",
    ),
}


@pytest.mark.parametrize(("write", "override", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_made(
    tuner: Tuner, tmp_path: Path, write: Write, override: str, message: str
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = tuner("run", "space.yaml", *filter(None, [override]))
    assert (said.code, said.out) == (3, "")
    assert all(line.startswith("tuner: error: ") for line in said.err.splitlines())
    assert message.replace("{here}", str(tmp_path)) in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_19_without_a_network(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "space.yaml").write_text(SPACE)
    classes(5, 5)(tmp_path)
    with serve_folder(tmp_path) as address:
        monkeypatch.setattr(
            ResNet18_Weights.IMAGENET1K_V1.value, "url", f"{address}/resnet18-f37072fd.pth"
        )
    said = tuner("run", "space.yaml", "model={name: resnet18, weights: default}")
    assert said.code == 3
    assert f"weights: cannot download {address}/resnet18-f37072fd.pth: " in said.err
    place = tmp_path / "home" / "weights" / "resnet18-f37072fd.pth"
    assert (
        f"fetch it elsewhere (its SHA-256 begins with f37072fd) and place it at {place}\n"
        in said.err
    )
    assert not (tmp_path / "studies").exists()
    assert [p.name for p in (tmp_path / "home" / "weights").iterdir() if p.suffix != ".lock"] == []


def test_16_fewer_images_than_a_batch_is_said_and_trained(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    classes(3, 4)(tmp_path)
    said = tuner("train", "space.yaml", "recipe.batch_size=512")
    assert said.code == 0
    assert (
        "recipe.batch_size: 512, but there are 3 training examples; each epoch is one batch of 3"
        in said.err
    )


def test_16_a_last_batch_of_one_is_trained(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    classes(5, 4)(tmp_path)
    assert (
        tuner("train", "space.yaml", "recipe.batch_size=4").code == 0
    )  # 5 images to train on: 4 and 1


def odd_modes(here: Path) -> None:
    classes(4, 4)(here)
    for i, mode in enumerate(("CMYK", "I;16", "RGBA", "LA", "P", "1", "L")):
        Image.new("L", (16, 16), 30 * i + 30).convert(mode).save(
            here / "photos/a" / f"odd{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        )


def loops(here: Path) -> None:
    classes(5, 5)(here)
    (here / "photos/a/up").symlink_to("..")
    (here / "photos/round").symlink_to("round")


def odd_names(here: Path) -> None:
    for name in ("Kätzchen 猫", "{} % #", "x" * 255):
        paint(here / "photos" / name, 4)


GOES_ON = {
    "17 skip": (
        both(classes(50, 60), content("photos/a/text.jpg", b"hello")),
        "data.on_bad_image=skip",
        "1 of 111 images cannot be read and are left out; ",
    ),
    "17 odd modes": (odd_modes, "", ""),
    "18 another head": (
        weights(lambda state: {k: v for k, v in state.items() if k != "fc.bias"}),
        BY_PATH,
        "",
    ),
    "25 loops": (
        loops,
        "",
        "data.path: photos/a/up links to itself, or to a folder that is read anyway; left out",
    ),
    "25 names": (odd_names, "search.name='Kätzchen {} % #'", ""),
}


@pytest.mark.parametrize(("write", "override", "warning"), GOES_ON.values(), ids=GOES_ON)
def test_said_and_trained(
    tuner: Tuner, tmp_path: Path, write: Write, override: str, warning: str
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    write(tmp_path)
    said = tuner("train", "space.yaml", *filter(None, [override]))
    assert (said.code, warning in said.err) == (0, True), said.err
    assert bool(said.err) == bool(warning)
    assert ("fc: new, the weights have none for these classes" in said.out) == ("w.pth" in override)
    (export,) = (tmp_path / "studies").glob("*/train/manifest.json")
    said = tuner("predict", export.parent, "photos", "--json")
    assert said.code == (3 if "skip" in override else 0)
    assert said.out.count("\n") >= 8


def test_24_a_cache_that_cannot_be_written(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    classes(5, 5)(tmp_path)
    (tmp_path / "file").touch()
    results = []
    for home in ("home", "file"):  # below a file nothing can be written, not even by root
        monkeypatch.setenv("TUNER_HOME", str(tmp_path / home / "cache"))
        said = tuner("train", "space.yaml", "--studies", home + "-studies", "--quiet")
        assert said.code == 0
        results.append(
            ((tmp_path / f"{home}-studies/mine/train/model.safetensors").read_bytes(), said.err)
        )
    assert results[0][0] == results[1][0]
    assert results[0][1] == ""
    (warning,) = results[1][1].splitlines()
    assert warning.startswith(
        f"tuner: warning: the cache folder {tmp_path}/file/cache cannot be written"
    )
    assert warning.endswith("for this run only")
