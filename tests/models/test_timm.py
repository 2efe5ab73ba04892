"""timm's models from download to prediction, as a user runs them."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import CommandResult
from tests.helpers.http_server import serve_folder
from tests.helpers.split_laws import check_split
from tuner.core.types import StagedModel
from tuner.errors import DataError, SpaceError
from tuner.models import timm as ours
from tuner.training.frozen_prefix import stage_digests

timm = pytest.importorskip("timm")
NAME, HUB = "timm/mobilenetv3_small_050", "timm/mobilenetv3_small_050.lamb_in1k"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder laid out as the hub is, with weights of 1,000 classes in it."""
    torch.manual_seed(5)
    model = timm.create_model("mobilenetv3_small_050", pretrained=False)
    file = tmp_path / "hub" / HUB / "resolve" / "main" / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(model.state_dict(), file)
    return tmp_path / "hub"


def test_default_weights_are_fetched_once_and_all_but_the_head_is_taken(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_folder(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        staged = ours.build(tmp_path / "home", NAME, "classification", 3)
    torch.manual_seed(5)
    given = timm.create_model("mobilenetv3_small_050", pretrained=False).state_dict()
    found = staged.model.state_dict()
    assert all(
        torch.equal(found[k], v) for k, v in given.items() if not k.startswith("classifier.")
    )
    assert found["classifier.weight"].shape[0] == 3 and staged.notes == (
        "classifier: new, the weights have none for these classes",
    )
    again = ours.build(tmp_path / "home", NAME, "classification", 3)  # the server is gone
    assert torch.equal(again.model.state_dict()["conv_stem.weight"], given["conv_stem.weight"])


def test_without_a_network_the_address_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_folder(tmp_path) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(DataError) as error:
        ours.build(tmp_path / "home", NAME, "classification", 3)
    assert f"{address}/{HUB}/resolve/main/model.safetensors" in str(error.value)


@pytest.mark.slow
def test_a_study_of_it_ends_in_exports_that_predict(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    Path("mobile.yaml").write_text(
        f"task: classification\ndata: {{name: synthetic, size: 32, examples: 40}}\nmodel: {{name: {NAME}, weights: none}}\n"
        "recipe: {lr: {low: 1e-3, high: 1e-1, log: true}, freeze_depth: {low: 0, high: 7}, epochs: 1}\n"
        "search: {trials: 2, compare: none}\nengine: {name: inline, device: cpu}\nexport: [safetensors, onnx]\n"
    )
    said = tuner("run", "mobile.yaml")
    assert said.code == 0, said.err
    manifest = json.loads(Path("studies/mobile/export/manifest.json").read_text())
    assert set(manifest["exports"]) == {"safetensors", "onnx"}
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 30, 30)).save("red.png")
    (answer,) = tuner("predict", "mobile", "red.png", "--json").out.splitlines()
    assert sum(json.loads(answer)["classes"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_real_weights_on_real_photographs(
    shared: Path, tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    with tarfile.open(shared / "cifar10.tar.gz") as archive:
        seen: dict[str, int] = {}
        for member in archive:
            parts = Path(member.name).parts
            if (
                member.isfile()
                and len(parts) == 4
                and parts[1] == "train"
                and seen.setdefault(parts[2], 0) < 60
            ):
                seen[parts[2]] += 1
                target = tmp_path / "photos" / parts[2] / parts[3]
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())
    said = tuner(
        "run",
        Path(__file__).parents[2] / "search_spaces" / "timm.yaml",
        f"model.weights={shared / 'tf_efficientnet_lite0.safetensors'}",
        "recipe.freeze_depth.low=8",
        "search.trials=2",
        "search.compare=none",
        "export=[safetensors]",
    )
    assert said.code == 0, said.err
    scores = json.loads(Path("studies/timm/export/manifest.json").read_text())["scores"]
    assert scores["test"]["accuracy"] > 0.5  # 10 classes, 420 images of 32 pixels, enlarged


def build_efficientnet(tmp_path: Path, **keys: float) -> StagedModel:
    return ours.build(
        tmp_path, "timm/tf_efficientnet_lite0", "classification", 3, weights="none", **keys
    )


def test_dropout_and_drop_path_reach_the_model(tmp_path: Path) -> None:
    staged = build_efficientnet(tmp_path, dropout=0.4, drop_path=0.3)
    rates = [m.p for m in staged.stages["head"].modules() if isinstance(m, nn.Dropout)]
    paths = [m.drop_prob for m in staged.model.modules() if type(m).__name__ == "DropPath"]
    assert rates == [0.4] and max(paths) == pytest.approx(0.3, abs=0.05)
    plain = build_efficientnet(tmp_path)
    assert not [m for m in plain.model.modules() if type(m).__name__ == "DropPath"]
    check_split(staged, torch.randn(2, 3, 64, 64))


def test_a_model_without_stochastic_depth_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"model\.drop_path: 0\.2, but timm/vgg11 has none; leave"):
        ours.build(tmp_path, "timm/vgg11", "classification", 3, weights="none", drop_path=0.2)


def test_trials_with_other_rates_share_what_frozen_stages_compute(tmp_path: Path) -> None:
    digests = []
    for rates in ({"dropout": 0.1, "drop_path": 0.1}, {"dropout": 0.4, "drop_path": 0.3}):
        torch.manual_seed(0)
        stages = list(build_efficientnet(tmp_path, **rates).stages.values())
        digests.append(stage_digests(stages, "start"))
    assert digests[0][:-1] == digests[1][:-1]
    assert digests[0][-1] != digests[1][-1]  # the head is trained, and its probe may see them
