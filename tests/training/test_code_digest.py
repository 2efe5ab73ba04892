"""The name of a stage knows the code that computes it: a library's version, the source of anything else."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from tuner.models._feature_maps import FeatureMapStage
from tuner.models._smp_stages import WholeEncoderStage
from tuner.training.code_digest import code_digest, name_code
from tuner.training.frozen_prefix import stage_digests

SOURCE = """
from torch import nn

def scale(x):
    return 2 * x

class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(scale(x))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("scaled_linear", None)


def made(folder: Path, source: str) -> nn.Module:
    """A linear layer of equal weights whose class is in a file of its own."""
    (folder / "scaled_linear.py").write_text(source)
    sys.modules.pop("scaled_linear", None)
    importlib.invalidate_caches()
    torch.manual_seed(0)
    layer: nn.Module = importlib.import_module("scaled_linear").Scaled(2, 2)
    return nn.Sequential(layer)


def test_other_code_of_ones_own_is_another_stage(folder: Path) -> None:
    first, same, other = (
        stage_digests([made(folder, source)], "start")
        for source in (SOURCE, SOURCE, SOURCE.replace("2 * x", "3 * x"))
    )
    assert first == same != other


def install(folder: Path, version: str) -> None:
    """The metadata that an installer leaves beside a package."""
    for old in folder.glob("scaled_linear-*.dist-info/*"):
        old.unlink()
        old.parent.rmdir()
    metadata = folder / f"scaled_linear-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: scaled-linear\nVersion: {version}\n"
    )


def test_another_version_of_a_library_is_another_stage(folder: Path) -> None:
    digests = []
    for version, source in (("1.0", SOURCE), ("1.0", SOURCE + "# as is"), ("1.1", SOURCE)):
        install(folder, version)
        digests.append(code_digest(made(folder, source)))
    assert digests[0] == digests[1] != digests[2]


def test_a_file_that_has_the_name_of_a_library_is_ones_own(folder: Path) -> None:
    """A distribution `pluggy` is installed; this file is not from it."""
    (folder / "pluggy.py").write_text(SOURCE)
    before = sys.modules.pop("pluggy")
    try:
        name = name_code(importlib.import_module("pluggy").Scaled)
    finally:
        sys.modules["pluggy"] = before
    assert name.startswith("Scaled ")


def test_libraries_are_known_by_their_versions_and_tuner_by_its_files() -> None:
    resnet = torchvision.models.resnet18()
    names = {name_code(cls) for part in resnet.modules() for cls in type(part).__mro__}
    assert names == {"", f"torch torch {torch.__version__.partition('+')[0]}"} | {
        f"torchvision torchvision {torchvision.__version__.partition('+')[0]}"
    }
    assert name_code(FeatureMapStage).startswith("FeatureMapStage ")


def test_a_class_without_any_source_still_has_a_name() -> None:
    members: dict[str, type] = {}
    exec("class Made: pass", {"__name__": "nowhere"}, members)
    assert name_code(members["Made"]).startswith("Made ")


class Factor(nn.Module):
    """A module of one's own: what it does follows from an attribute that `repr` does not show."""

    def __init__(self, factor: object) -> None:
        super().__init__()
        self.factor = factor


@pytest.mark.parametrize(
    ("one", "other"),
    [(1.0, 2.0), ("mean", "max"), ([1, 2], [2, 1]), ({"a": 1}, {"a": 2}), (torch.relu, torch.tanh)],
)
def test_what_only_an_attribute_says_is_another_stage(one: object, other: object) -> None:
    first, same, second = (stage_digests([Factor(v), Factor(0)], "s") for v in (one, one, other))
    assert first == same
    assert first[0] != second[0]


@pytest.mark.parametrize("is_buffer", [False, True])
def test_tensors_that_are_no_part_of_the_state_are_another_stage(is_buffer: bool) -> None:
    digests = []
    for value in (1.0, 2.0):
        module = nn.Identity()
        if is_buffer:
            module.register_buffer("table", torch.tensor([value]), persistent=False)
        else:
            module.table = torch.tensor([value])
        digests.append(stage_digests([module, nn.Identity()], "s")[0])
    assert digests[0] != digests[1]


def test_the_heads_of_an_attention_are_part_of_its_name() -> None:
    digests = []
    for heads in (2, 4):
        torch.manual_seed(0)
        digests.append(stage_digests([nn.MultiheadAttention(8, heads), nn.Identity()], "s")[0])
    assert digests[0] != digests[1]


def test_an_encoder_that_gives_other_maps_is_another_stage() -> None:
    """U-Nets and FPNs over one encoder that is not cut: the second takes no map of half the size."""
    maps = (("f1", "f2"), ("f2",))
    stages = [WholeEncoderStage(nn.Identity(), taps) for taps in maps]
    assert len({stage_digests([stage, nn.Identity()], "s")[0] for stage in stages}) == 2
