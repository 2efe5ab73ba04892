"""Predictions for images, folders and globs; what cannot be read does not keep the others from being predicted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import CommandResult
from tests.helpers.png_headers import png_header
from tuner.config.data_options import ImageOptions
from tuner.core.export_module import ExportModule
from tuner.data import synthetic
from tuner.errors import DataError, SpaceError, StorageError
from tuner.manifest import PublishedExport
from tuner.preprocessing.example_files import find_images
from tuner.training import exported_models, publishing
from tuner.training.building import input_spec_of
from tuner.training.inference import NamedPrediction, find_export, predict_examples

Tuner = Callable[..., CommandResult]
SPACE = """
task: classification
data: {name: synthetic, examples: 90, classes: 3, size: 32, noise: 0.1}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: adamw, lr: 0.003, epochs: 8, batch_size: 16, fit: train+valid}
search: {name: stripes}
engine: {name: inline, device: cpu}
export: [safetensors]
"""


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of studies with one in it, `stripes`, that is exported."""
    from tuner.cli import train

    folder = tmp_path_factory.mktemp("predict")
    (folder / "stripes.yaml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNER_HOME", str(folder / "home"))
        train(folder / "stripes.yaml", out=folder / "studies" / "stripes" / "export", quiet=True)
    return folder / "studies"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Stripes of class0, class1, class2 as files, one in a folder of its own, with a text file among them."""
    data = synthetic.load(
        tmp_path,
        wants_slim(),
        "classification",
        examples=90,
        classes=3,
        noise=0.1,
        image=ImageOptions(size=32),
    )
    x, y = data.test.take(torch.arange(len(data.test)), 0)
    folder = tmp_path / "my photos"
    (folder / "more").mkdir(parents=True)
    for label, name in enumerate(["a [1].png", "b{}.png", "more/c.png"]):
        pixels = x[y == label][0]
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def wants_slim() -> Any:
    from tuner.config.run import PluginConfig

    return input_spec_of(PluginConfig("resnet18_slim", {"weights": "bundled"}))


def test_each_image_gets_its_class(tuner: Tuner, studies: Path, photos: Path) -> None:
    said = tuner("predict", "stripes", photos, "--json", "--studies", studies)
    assert said.code == 0
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [Path(one["image"]).name for one in found] == ["a [1].png", "b{}.png", "c.png"]
    assert [max(one["classes"], key=one["classes"].get) for one in found] == [
        "class0",
        "class1",
        "class2",
    ]
    assert all(
        list(one["classes"].values()) == sorted(one["classes"].values(), reverse=True)
        for one in found
    )
    assert all(abs(sum(one["classes"].values()) - 1) < 1e-5 for one in found)


def test_plain_lines_show_the_likeliest(tuner: Tuner, studies: Path, photos: Path) -> None:
    said = tuner("predict", studies / "stripes", photos / "more/c.png")
    path, *answers = said.out.rstrip("\n").split("  ")
    assert path == str(photos / "more/c.png") and len(answers) == 3
    name, probability = answers[0].split()
    assert name == "class2" and 1 / 3 < float(probability) <= 1


def test_a_bad_image_among_good_ones(tuner: Tuner, studies: Path, photos: Path) -> None:
    (photos / "b2.png").write_text("not an image")
    said = tuner("predict", "stripes", photos, photos / "gone.png", "--json", "--studies", studies)
    assert (said.code, said.out) == (3, "")  # a misspelt path is found before anything is predicted
    (photos / "gone.png").symlink_to("nowhere")
    (photos / "huge.png").write_bytes(png_header(10_000, 9_500))  # Pillow would warn
    said = tuner("predict", "stripes", photos, "--json", "--studies", studies)
    assert said.code == 3
    assert len(said.out.splitlines()) == 3
    assert said.err.splitlines() == [
        f"tuner: error: {photos}/b2.png: cannot identify image file its content",
        f"tuner: error: {photos}/gone.png: No such file or directory",
        f"tuner: error: {photos}/huge.png: 10000 x 9500 pixels, more than 50,000,000",
        "tuner: error: 3 images cannot be read; the others were predicted",
    ]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["{}"], ["a [1].png", "b{{}}.png", "more/c.png"]),
        (["{}/*"], ["a [1].png", "b{{}}.png", "more/c.png"]),
        (["{}/**/*.png"], ["a [1].png", "b{{}}.png", "more/c.png"]),
        (["{}/a [1].png"], ["a [1].png"]),
        (["{}/more/c.png", "{}", "{}/more"], ["more/c.png", "a [1].png", "b{{}}.png"]),
        (["{}/notes.txt"], ["notes.txt"]),  # named in person
    ],
)
def test_folders_and_globs(photos: Path, patterns: list[str], expected: list[str]) -> None:
    found = find_images([pattern.replace("{}", str(photos)) for pattern in patterns])
    assert [str(path.relative_to(photos)) for path in found] == [
        name.replace("{{}}", "{}") for name in expected
    ]


@pytest.mark.parametrize("pattern", ["nothing/*.png", "nothing", "my photos/empty", "x" * 300])
def test_a_pattern_without_an_image(
    photos: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="no image there") as error:
        find_images([pattern])
    assert "did you mean" not in str(error.value)  # nothing but the name that was given is near


def test_a_batch_is_no_limit(studies: Path, photos: Path) -> None:
    published = find_export(studies, "stripes")
    together = list(predict_examples(published, [str(photos)]))
    alone = predict_examples(published, [str(photos)], batch_size=1)
    for a, b in zip(alone, together, strict=True):
        assert isinstance(a, NamedPrediction) and isinstance(b, NamedPrediction)
        assert (a.name, list(a.prediction.values["classes"])) == (
            b.name,
            list(b.prediction.values["classes"]),
        )
        assert list(a.prediction.values["classes"].values()) == pytest.approx(
            list(b.prediction.values["classes"].values()), abs=1e-5
        )


@pytest.mark.parametrize(
    ("exported", "wanted", "used"),
    [
        (["onnx", "torch_export", "safetensors"], None, "safetensors"),
        (["onnx", "torch_export"], None, "torch_export"),
        (["own:format"], None, "own:format"),
        (["onnx", "safetensors"], "onnx", "onnx"),
    ],
)
def test_the_format_that_is_used(
    studies: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    exported: list[str],
    wanted: str | None,
    used: str,
) -> None:
    published = find_export(studies, "stripes")
    opened = []

    def record(
        _: PublishedExport, kind: str, device: torch.device
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        opened.append(kind)
        return lambda x: torch.zeros(len(x), 3)

    monkeypatch.setattr("tuner.training.inference.open_export", record)
    asked = PublishedExport(
        published.folder, {**published.manifest, "exports": {kind: {} for kind in exported}}
    )
    assert len(list(predict_examples(asked, [str(photos)], wanted, trust=True))) == 3
    assert opened == [used]


def test_an_export_that_takes_anothers_place_meanwhile_is_the_one_that_predicts(
    studies: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer one names its file otherwise, so that it and the older one's manifest do not go together."""
    folder = Path(shutil.copytree(studies / "stripes" / "export", tmp_path / "export"))
    newer = Path(shutil.copytree(folder, tmp_path / "newer"))
    text = json.loads((newer / "manifest.json").read_text())
    (newer / "model.safetensors").rename(newer / "renamed.safetensors")
    text["exports"]["safetensors"]["file"] = "renamed.safetensors"
    text["files"]["renamed.safetensors"] = text["files"].pop("model.safetensors")
    (newer / "manifest.json").write_text(json.dumps(text))
    published, real = find_export(tmp_path, str(folder)), exported_models.open_export
    opened: list[str] = []

    def late(published: PublishedExport, kind: str, device: torch.device) -> Any:
        if not opened:
            publishing.replace_folder(newer, folder)
        opened.append(published.manifest["exports"][kind]["file"])
        return real(published, kind, device)

    monkeypatch.setattr("tuner.training.inference.open_export", late)
    assert len(list(predict_examples(published, [str(photos)]))) == 3
    assert opened == ["model.safetensors", "renamed.safetensors"]


def test_a_device_that_is_not_there_or_that_the_format_cannot_use(
    studies: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = find_export(studies, "stripes")

    def predict(format_: str, device: str) -> None:
        list(predict_examples(published, [str(photos)], format_, device))

    with pytest.raises(SpaceError, match=r"--device 'gpu': use auto, cpu or cuda"):
        predict("safetensors", "gpu")
    with pytest.raises(SpaceError, match=r"onnx runs on the CPU; use --format safetensors"):
        predict("onnx", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StorageError, match=r"--device cuda: torch .* sees no GPU here"):
        predict("safetensors", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, format_, device in (
        ("auto", "safetensors", "cuda"),
        ("auto", "onnx", "cpu"),
        ("cpu", "safetensors", "cpu"),
    ):
        assert exported_models.select_prediction_device(name, format_).type == device


def test_a_model_on_another_device_is_asked_with_what_lies_there(studies: Path) -> None:
    """The meta device stands for a GPU: a tensor that was left on the CPU would be an error."""
    published = find_export(studies, "stripes")
    on_cpu = exported_models.open_export(published, "safetensors")
    assert isinstance(on_cpu, ExportModule)
    asked: list[torch.device] = []
    on_cpu.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].device))
    there = exported_models.compute_on(torch.device("meta"), on_cpu)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        there(torch.zeros(1, 3, 32, 32))
    assert asked == [torch.device("meta")]


def test_a_format_that_was_not_exported(studies: Path, photos: Path) -> None:
    with pytest.raises(SpaceError) as error:
        list(predict_examples(find_export(studies, "stripes"), [str(photos)], "safetensor"))
    assert str(error.value) == (
        "--format 'safetensor' was not exported; did you mean 'safetensors'? (allowed: safetensors); make it with `tuner export`"
    )


def test_an_unknown_study(tuner: Tuner, studies: Path, photos: Path) -> None:
    said = tuner("predict", "strips", photos, "--studies", studies)
    assert said.code == 3
    assert said.err == (
        f"tuner: error: no export under 'strips': neither a study in {studies} nor a folder with manifest.json; "
        "did you mean 'stripes'? (allowed: stripes)\n"
    )
    assert tuner("predict", "x" * 300, photos).code == 3
    said = tuner("predict", "stripes", photos)
    assert said.code == 3
    assert "make one with `tuner run FILE`" in said.err


def test_an_unfinished_study(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "space.yaml").touch()
    with pytest.raises(
        DataError,
        match=r"study 'half' has no export yet; finish it with `tuner run`, or call `tuner export half`",
    ):
        find_export(tmp_path, "half")


def test_a_changed_export_is_refused(tmp_path: Path, studies: Path) -> None:
    shutil.copytree(studies / "stripes" / "export", tmp_path / "moved")
    assert find_export(tmp_path, str(tmp_path / "moved")).folder == tmp_path / "moved"
    with open(tmp_path / "moved" / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2")
    with pytest.raises(DataError, match="changed since it was exported"):
        find_export(tmp_path, str(tmp_path / "moved"))
