"""Weights from anywhere fit their model exactly, or a message names what does not; nothing in them is ever executed."""

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights, get_model

from tests.helpers.http_server import serve_folder
from tuner.core.input_spec import ImageInputSpec
from tuner.core.weights import (
    StateDict,
    fetch_weights,
    is_path,
    load_matching_state,
    read_state_dict,
    torchvision_model,
    torchvision_preprocess,
)
from tuner.errors import DataError, SpaceError
from tuner.files.atomic import file_sha256
from tuner.models import resnet


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(body=nn.Linear(5, 4), norm=nn.BatchNorm1d(4), fc=nn.Linear(4, classes))
    )


def state(classes: int = 3) -> StateDict:
    torch.manual_seed(0)
    return {k: v.clone() for k, v in net(classes).state_dict().items()}


def adopted(found: StateDict) -> tuple[nn.Module, tuple[str, ...]]:
    model = net()
    return model, load_matching_state(model, found, head="fc", source_name="weights: w.pth")


# -- fitting a state dict to a model


def test_weights_are_taken_name_by_name() -> None:
    model, notes = adopted(state())
    assert all(torch.equal(v, state()[k]) for k, v in model.state_dict().items())
    assert notes == ()


@pytest.mark.parametrize(
    "found", [state(2), {k: v for k, v in state().items() if not k.startswith("fc.")}]
)
def test_another_head_is_new_and_said_so(found: StateDict) -> None:
    model, notes = adopted(found)
    assert torch.equal(model.state_dict()["body.weight"], state()["body.weight"])
    assert notes == ("fc: new, the weights have none for these classes",)


def test_half_precision_becomes_float32() -> None:
    model, _ = adopted({k: v.half() if v.is_floating_point() else v for k, v in state().items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"body.weight": torch.zeros(2, 4)},
            "weights: w.pth: body.weight has shape (2,4), model wants (4,5)",
        ),
        ({"body.bias": None}, "weights: w.pth: body.bias is missing"),
        ({"neck.weight": torch.zeros(1)}, "weights: w.pth: neck.weight is not part of the model"),
        (
            {"norm.running_var": torch.tensor([1.0, 2.0, float("nan"), 4.0])},
            "weights: w.pth: norm.running_var holds NaN or infinite values",
        ),
        (
            {"fc.bias": torch.full((3,), float("inf"))},
            "weights: w.pth: fc.bias holds NaN or infinite values",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], problem: str) -> None:
    found = {k: v for k, v in (state() | change).items() if v is not None}
    with pytest.raises(DataError) as error:
        adopted(found)
    assert error.value.problems == (
        problem,
        "weights: w.pth: these are another model's weights, or damaged",
    )


def test_another_architecture_lists_the_first_ten_and_the_count() -> None:
    with torch.device("meta"):
        model, other = get_model("resnet18", num_classes=3), get_model("vgg11", num_classes=3)
    with pytest.raises(DataError) as error:
        load_matching_state(
            model, dict(other.state_dict()), head="fc", source_name="weights: w.pth"
        )
    assert len(error.value.problems) == 12
    assert error.value.problems[0] == "weights: w.pth: conv1.weight is missing"
    assert error.value.problems[10].endswith("more")


# -- reading files


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(state(), path)
        elif name == "wrapped.pth":
            torch.save(
                {"state_dict": {f"module.{k}": v for k, v in state().items()}, "epoch": 3}, path
            )
        else:
            torch.save(state(), path, _use_new_zipfile_serialization=name != "old.pth")
        return path

    return write


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "old.pth", "wrapped.pth"])
def test_every_kind_of_file_gives_the_same(written: Callable[[str], Path], name: str) -> None:
    found = read_state_dict(written(name))
    assert found.keys() == state().keys()
    assert all(torch.equal(v, state()[k]) for k, v in found.items())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "old.pth"])
def test_truncated_anywhere_it_is_refused(written: Callable[[str], Path], name: str) -> None:
    path = written(name)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 25)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"weights: {path} "):
            read_state_dict(path)


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, how: str) -> None:
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    content = {"fc.weight": Malicious(proof)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(
        DataError,
        match=r"evil.pth refused: it is damaged or would run code when loaded .*; save the state dict as safetensors",
    ):
        read_state_dict(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "page.pth",
            b"<!DOCTYPE html><html>404</html>",
            "it is an HTML page, so the download link led to a web page",
        ),
        (
            "page.safetensors",
            b"\n<html>404</html>",
            "it is an HTML page, so the download link led to a web page",
        ),
        ("empty.pth", b"", "it is empty"),
        ("empty.safetensors", b"", "it is empty"),
        ("list.pth", [torch.zeros(2)], "holds no state dict (a mapping of names to tensors)"),
        ("none.pth", {}, "holds no state dict (a mapping of names to tensors)"),
    ],
)
def test_what_is_no_state_dict_is_called_what_it_is(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(DataError) as error:
        read_state_dict(tmp_path / name)
    assert message in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.pth does not exist; give a .safetensors or .pth file"):
        read_state_dict(tmp_path / "a.pth")
    with pytest.raises(DataError, match="is a folder"):
        read_state_dict(tmp_path)


# -- torchvision's weights, by name


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ResNet-18 weights, under a name that begins their SHA-256."""
    path = tmp_path_factory.mktemp("random") / "new.pth"
    torch.save(get_model("resnet18").state_dict(), path)
    return path.rename(path.with_name(f"resnet18-{file_sha256(path)[:8]}.pth"))


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: Path) -> Path:
    """A folder that holds only the random weights; and nothing in torch's own folders."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / random_weights.name).hardlink_to(random_weights)
    return tmp_path / "web"


def linked(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", url)


def test_named_weights_are_downloaded_once_pinned_and_checked(
    tmp_path: Path, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = web.iterdir()
    with serve_folder(web) as address:
        linked(monkeypatch, f"{address}/{file.name}")
        model, notes = torchvision_model(tmp_path, "resnet18", 7, "default", head="fc")
    assert torch.equal(
        model.state_dict()["layer4.1.conv2.weight"], torch.load(file)["layer4.1.conv2.weight"]
    )
    assert model.state_dict()["fc.weight"].shape == (7, 512)
    assert notes == ("fc: new, the weights have none for these classes",)
    assert json.loads((tmp_path / "weights" / "pins.json").read_text()) == {
        file.name: file_sha256(file)
    }

    kept = tmp_path / "weights" / file.name  # the server is gone: from here on nothing is fetched
    torchvision_model(tmp_path, "resnet18", 7, "IMAGENET1K_V1", head="fc")
    with open(kept, "r+b") as damaged:
        damaged.seek(20_000_000)
        byte = damaged.read(1)[0]
        damaged.seek(20_000_000)
        damaged.write(bytes([byte ^ 1]))
    with pytest.raises(
        DataError,
        match=rf"{kept} has SHA-256 [0-9a-f]{{64}}, expected {file_sha256(file)}; delete the file so that",
    ):
        torchvision_model(tmp_path, "resnet18", 7, "default", head="fc")


def test_a_wrong_hash_keeps_nothing(tmp_path: Path, web: Path) -> None:
    (file,) = web.iterdir()
    file.rename(web / "resnet18-00000000.pth")
    with (
        serve_folder(web) as address,
        pytest.raises(
            DataError, match=r"has SHA-256 [0-9a-f]{64}, expected 00000000…; nothing was kept"
        ),
    ):
        fetch_weights(tmp_path, f"{address}/resnet18-00000000.pth")
    assert [p.name for p in (tmp_path / "weights").iterdir() if p.suffix != ".lock"] == []


def test_offline_the_message_says_what_to_place_where(
    tmp_path: Path, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = web.iterdir()
    with serve_folder(web) as address:
        linked(monkeypatch, f"{address}/{file.name}")
    with pytest.raises(DataError) as error:
        torchvision_model(tmp_path, "resnet18", 7, "default", head="fc")
    place = tmp_path / "weights" / file.name
    assert str(error.value).startswith(f"weights: cannot download {address}/{file.name}: ")
    assert str(error.value).endswith(
        f"fetch it elsewhere (its SHA-256 begins with {file.stem[-8:]}) and place it at {place}"
    )
    place.write_bytes(file.read_bytes())
    torchvision_model(tmp_path, "resnet18", 7, "default", head="fc")


def test_torchs_own_downloads_are_used(tmp_path: Path, web: Path) -> None:
    (file,) = web.iterdir()
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    there = file.rename(tmp_path / "torch" / "hub" / "checkpoints" / file.name)
    assert fetch_weights(tmp_path, f"http://127.0.0.1:9/{file.name}") == there


def test_a_file_without_a_hash_in_its_name_is_pinned_too(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "own.pth").write_bytes(b"first")
    fetch_weights(tmp_path, "http://127.0.0.1:9/own.pth")
    (tmp_path / "weights" / "own.pth").write_bytes(b"other")
    with pytest.raises(DataError, match=r"own.pth has SHA-256"):
        fetch_weights(tmp_path, "http://127.0.0.1:9/own.pth")
    (tmp_path / "weights" / "pins.json").write_text("{")
    with pytest.raises(DataError, match=r"pins.json is damaged; delete it"):
        fetch_weights(tmp_path, "http://127.0.0.1:9/own.pth")


def test_preprocessing_is_the_weights_own() -> None:
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert torchvision_preprocess("resnet18", "default") == ImageInputSpec(
        224, 256, "bilinear", **imagenet
    )
    assert torchvision_preprocess("resnet50", "IMAGENET1K_V2") == ImageInputSpec(
        224, 232, "bilinear", **imagenet
    )
    assert torchvision_preprocess("resnet50", "own.pth") == torchvision_preprocess(
        "resnet50", "none"
    )


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(SpaceError) as error:
        torchvision_preprocess("resnet50", "IMAGENET1K_V3")
    assert str(error.value) == (
        "model.weights: 'IMAGENET1K_V3' is not known for resnet50; did you mean 'IMAGENET1K_V2'? "
        "(allowed: default, none, IMAGENET1K_V1, IMAGENET1K_V2); or give a path to a .safetensors or .pth file"
    )
    with pytest.raises(
        SpaceError, match=r"'bundle' is not known for resnet18_slim; did you mean 'bundled'"
    ):
        resnet.build(Path(), "resnet18_slim", "classification", 3, weights="bundle")


# -- none, bundled, a path


def test_the_bundled_weights_are_those_of_the_card(tmp_path: Path) -> None:
    folder = Path(resnet.__file__).parent
    assert (
        file_sha256(folder / "resnet18_slim.safetensors")
        in (folder / "resnet18_slim.md").read_text()
    )
    first, second = (
        resnet.build(tmp_path, "resnet18_slim", "classification", 5, weights=w).model.state_dict()
        for w in ("bundled", "default")
    )
    fresh = resnet.build(
        tmp_path, "resnet18_slim", "classification", 5, weights="none"
    ).model.state_dict()
    assert torch.equal(first["conv1.weight"], second["conv1.weight"])
    assert not torch.equal(first["conv1.weight"], fresh["conv1.weight"])
    assert first["fc.weight"].shape == (5, 128)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_by_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    fresh = resnet.build(
        tmp_path, "resnet18_slim", "classification", 5, weights="none"
    ).model.state_dict()
    exported = {
        **fresh,
        "tuner.mean": torch.zeros(1, 3, 1, 1),
    }  # as an export holds it beside the weights
    save_file(exported, path) if suffix == ".safetensors" else torch.save(exported, path)
    assert is_path(str(path))
    for outputs, notes in ((5, ()), (6, ("fc: new, the weights have none for these classes",))):
        staged = resnet.build(
            tmp_path, "resnet18_slim", "classification", outputs, weights=str(path)
        )
        assert torch.equal(staged.model.state_dict()["conv1.weight"], fresh["conv1.weight"])
        assert staged.notes == notes
