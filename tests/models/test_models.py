"""The cut and partition laws, for members of every family, at every depth; models as a table."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.ops import StochasticDepth

from tests.conftest import CommandResult
from tests.helpers.split_laws import check_partition, check_split
from tuner.config import plugins
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.core.types import StagedModel, split_sequential
from tuner.errors import SpaceError
from tuner.training.building import build_model, input_spec_of
from tuner.training.model_summary import shorten_stages, summarize_model

# small enough to be computed here; the others differ from them in widths and counts, and are cut by the same lines
COMPUTED = [
    "resnet18_slim",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg11",
    "vgg11_bn",
]


def built(name: str, outputs: int = 3, **keys: float) -> StagedModel:
    part = PluginConfig(name, keys if ":" in name else {"weights": "none", **keys})
    return build_model(
        Run(PluginConfig("classification", {}), PluginConfig("synthetic", {}), part, Recipe(), 0),
        Path(),
        outputs,
    )


def filled(name: str) -> StagedModel:
    """The model with numbers everywhere, also where a fresh one has zeros and ones that would hide a layer left out."""
    with torch.device("meta"):
        staged = built(name)
    staged.model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    # repeated, because a hundred million numbers take seconds to draw; a prime, so that no rows are alike
    drawn = torch.empty(999_983).uniform_(-1, 1, generator=generator)
    for value in staged.model.state_dict().values():
        if value.dim() > 1:
            bound = math.sqrt(3 / value[0].numel())
            for part in value.view(-1).split(len(drawn)):
                torch.mul(drawn[: len(part)], bound, out=part)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.zero_()
    return staged


INCEPTION = {
    name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")
}


@pytest.mark.parametrize("name", [*COMPUTED, "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_the_cut_law(name: str) -> None:
    check_split(filled(name), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


CLASSIFIERS = [
    name
    for name in plugins.list_names("model")
    if "*" not in name
    and "classification" in plugins.list_tasks("model", name)
    and name != "regnet_y_128gf"  # of 645 M parameters in the blocks of its smaller sisters
]


# torchvision's, cut by the generic cutter: one small member of each kind, and the others if slow
CUT = {
    "alexnet": 8,
    "convnext_tiny": 9,
    "densenet121": 9,
    "efficientnet_b0": 10,
    "googlenet": 13,
    "maxvit_t": 7,
    "mnasnet0_5": 11,
    "mobilenet_v2": 20,
    "mobilenet_v3_small": 15,
    "regnet_x_400mf": 6,
    "shufflenet_v2_x0_5": 6,
    "squeezenet1_1": 10,
    "swin_t": 9,
    "vit_b_32": 14,
}
LONG = ("densenet121", "maxvit_t")  # they take seconds
CLASSIFIERS = [
    name
    if (name in CUT and name not in LONG)
    or plugins.find_model_family(name) != "torchvision_classifiers"
    else pytest.param(name, marks=pytest.mark.slow)
    for name in CLASSIFIERS
]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_model_is_cut_into_all_its_parameters(name: str) -> None:
    with torch.device("meta"):
        staged = built(name)
        check_partition(staged)
        assert staged.uncut_reason is None
        assert len(staged.stages) == CUT.get(name, len(staged.stages))
        side = input_spec_of(PluginConfig(name, {})).dummy_input().shape[-1]  # type: ignore[union-attr]
        x = torch.zeros(2, 3, side, side)
        prefix, suffix = staged.split(staged.max_depth)
        assert suffix(prefix(x)).shape == (2, 3)
        if name != "resnet18_slim":  # native names, so that weights and exports fit elsewhere
            # RegNet reads numbers while it is built, and meta has none
            with torch.device("cpu" if name.startswith("regnet_") else "meta"):
                plain = get_model(name, num_classes=3, **INCEPTION.get(name, {}))
            assert list(staged.model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vgg11"])
def test_dropout_reaches_the_model(name: str) -> None:
    with torch.device("meta"):
        rates = [
            [m.p for m in built(name, **keys).model.modules() if isinstance(m, nn.Dropout)]
            for keys in ({}, {"dropout": 0.35})
        ]
    assert set(rates[1]) == {0.35} and len(rates[0]) == len(rates[1])
    assert set(rates[0]).isdisjoint(rates[1])


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "swin_t"])
def test_drop_path_reaches_the_residual_blocks(name: str) -> None:
    with torch.device("meta"):
        modules = built(name, drop_path=0.35).model.modules()
    rates = [module.p for module in modules if isinstance(module, StochasticDepth)]
    assert rates == sorted(rates) and (rates[0], rates[-1]) == (0.0, 0.35) and rates[1] > 0


def test_a_model_without_stochastic_depth_says_so() -> None:
    with (
        torch.device("meta"),
        pytest.raises(SpaceError, match=r"model\.drop_path: 0\.2, but alexnet has none; leave"),
    ):
        built("alexnet", drop_path=0.2)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18_slim", ["stem", "layer1", "layer2", "layer3", "layer4", "head"]),
        ("vgg11", ["block1", "block2", "block3", "block4", "block5", "fc1", "fc2", "head"]),
    ],
)
def test_stages_have_names(name: str, stages: list[str]) -> None:
    with torch.device("meta"):
        assert list(built(name).stages) == stages


# the number of stages, which existing studies rely on, of models that take any size
TIMM = {
    "efficientnet_b0": 10,
    "tf_efficientnet_lite0": 10,
    "mobilenetv2_050": 10,
    "mobilenetv3_small_050": 9,
    "mobilenetv4_conv_small_035": 8,
    "mnasnet_small": 10,
    "resnet10t": 6,
    "resnet26d": 6,
    "seresnet18": 6,
    "regnetx_002": 6,
    "convnext_atto": 6,
    "densenet121": 9,
    "ghostnet_050": 13,
    "test_vit": 8,
}


# the others take seconds, and each family is also cut by tests/models/test_timm_stages.py
QUICK_OF_TIMM = (
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "resnet10t",
    "regnetx_002",
    "convnext_atto",
    "test_vit",
)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        pytest.param(*item, marks=[] if item[0] in QUICK_OF_TIMM else pytest.mark.slow)
        for item in TIMM.items()
    ],
)
def test_models_of_timm_are_cut_by_both_laws(name: str, stages: int) -> None:
    timm = pytest.importorskip("timm")
    staged = built(f"timm/{name}")
    assert staged.uncut_reason is None
    check_partition(staged)
    side = 160 if "vit" in name else 64
    generator = torch.Generator().manual_seed(1)
    check_split(staged, torch.randn(2, 3, side, side, generator=generator))
    assert len(staged.stages) == stages
    with torch.device("meta"):  # which draws no numbers
        native = timm.create_model(name, num_classes=3)
    assert list(staged.model.state_dict()) == list(native.state_dict())


def test_what_a_deeply_frozen_convolutional_model_gives_is_a_vector() -> None:
    pytest.importorskip("timm")
    for name in (
        "timm/tf_efficientnet_lite0",
        "timm/mobilenetv3_small_050",
        "timm/resnet10t",
        "resnet18",
        "vgg11",
    ):
        with torch.device("meta"):  # which has shapes alone
            staged = built(name)
            prefix, _ = staged.split(staged.max_depth)
            assert prefix(torch.zeros(2, 3, 64, 64)).dim() == 2, name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm/efficientnet_lite00", "did you mean 'efficientnet_lite0'"),
        ("timm/resnet50.a9_in1k", "timm has no such weights.*resnet50.a1_in1k"),
    ],
)
def test_a_name_that_timm_does_not_have_gets_the_nearest(name: str, said: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(SpaceError, match=said):
        built(name)


def test_without_timm_the_way_to_have_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SpaceError, match=r"pip install 'timm"):
        built("timm/resnet18")


def test_training_a_suffix_trains_the_model_and_leaves_the_prefix_still() -> None:
    staged = filled("resnet18_slim")
    before = {k: v.clone() for k, v in staged.model.state_dict().items()}
    prefix, suffix = staged.split(3)
    suffix.train()
    optimizer = torch.optim.SGD(suffix.parameters(), lr=0.1)
    suffix(prefix(torch.randn(4, 3, 32, 32))).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in staged.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[0] for k in changed} == {"layer3", "layer4", "fc"}
    assert {"layer3.0.bn1.running_mean", "fc.weight"} <= changed


# -- a user's own


OWN = """
import torch
from torch import nn

def sequential(outputs):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
    )

class Whole(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.flat, self.fc = nn.Flatten(), nn.Linear(3 * 32 * 32, outputs)
    def forward(self, x):
        return self.fc(self.flat(x))

def nothing(outputs):
    return "a model"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A module of the user's in the current folder."""
    (tmp_path / "own_models_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: f"own_models_of_a_test:{name}"
    plugins.read_keys.cache_clear()


def test_a_sequential_is_cut_at_its_children(own: Callable[[str], str]) -> None:
    staged = built(own("sequential"))
    assert list(staged.stages) == ["0", "1", "2", "3", "4", "5", "6"]
    assert staged.max_depth == 6
    for value in staged.model.state_dict().values():
        torch.nn.init.uniform_(value, 0.5, 1.5) if value.is_floating_point() else None
    check_split(staged, torch.randn(2, 3, 32, 32))
    check_partition(staged)


def test_any_other_module_is_one_stage(own: Callable[[str], str]) -> None:
    staged = built(own("Whole"))
    assert (list(staged.stages), staged.max_depth) == (["model"], 0)
    check_partition(staged)


def test_nested_sequentials_share_no_parameter() -> None:
    check_partition(
        split_sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)))
    )


# -- models as a table


@pytest.mark.parametrize(
    ("name", "millions", "gflops"),
    [
        ("resnet18", 11.69, 3.63),
        ("resnet50", 25.56, 8.18),
        ("vgg16", 138.36, 30.94),
        ("resnext50_32x4d", 25.03, 8.46),
    ],
)
def test_numbers_agree_with_torchvisions_own(name: str, millions: float, gflops: float) -> None:
    """torchvision states multiply-adds (resnet18: 1.81 G), which count as two here."""
    found = summarize_model(name)
    meta = (
        plugins.import_plugin("model", name)
        .torchvision_preprocess.__globals__["get_model_weights"](name)
        .DEFAULT.meta
    )
    assert found.parameters == meta["num_params"]
    assert round(found.parameters / 1e6, 2) == millions
    assert found.flops / 1e9 == pytest.approx(gflops, abs=0.006)
    assert found.flops / 2e9 == pytest.approx(meta["_ops"], rel=0.01)
    assert found.example == "224 x 224 image"


def test_shares_grow_with_depth_from_nothing_to_less_than_all() -> None:
    rows = summarize_model("resnet18_slim", outputs=10).depths
    assert [(row.depth, row.stage) for row in rows] == [
        (0, "(nothing)"),
        *enumerate(["stem", "layer1", "layer2", "layer3", "layer4"], 1),
    ]
    assert rows[0].parameters == rows[0].flops == 0
    assert all(
        a.parameters < b.parameters < 1 and a.flops < b.flops < 1
        for a, b in itertools.pairwise(rows)
    )
    assert summarize_model("resnet18_slim", outputs=10).parameters == 703_386


def test_a_users_model_is_described_at_a_size_that_passes(own: Callable[[str], str]) -> None:
    found = summarize_model(own("Whole"), outputs=10)
    assert (found.example, found.parameters, found.flops) == ("32 x 32 image", 30_730, 2 * 30_720)
    assert summarize_model(own("sequential"), outputs=10).depths[1].parameters == pytest.approx(
        112 / (112 + 8 + 50)
    )


def test_what_builds_no_model_is_named(own: Callable[[str], str]) -> None:
    with pytest.raises(SpaceError, match=r"returned str; expected an nn.Module"):
        summarize_model(own("nothing"))


def test_the_command_lists_and_describes(tuner: Callable[..., CommandResult]) -> None:
    assert tuner("models").out.splitlines() == plugins.list_names("model")
    said = tuner("models", "resnet18")
    assert said.code == 0
    first, header, *rows = said.out.splitlines()
    assert first == "resnet18: 11.69 M parameters, 3.628 GFLOPs a 224 x 224 image (1000 classes)"
    assert header.split() == ["depth", "frozen", "up", "to", "parameters", "FLOPs"]
    assert rows[-1].split() == ["5", "layer4", "95.6%", "100.0%"]


def test_the_command_lists_those_that_match(tuner: Callable[..., CommandResult]) -> None:
    pytest.importorskip("timm")
    said = tuner("models", "timm/test_vi?")
    assert said.code == 0, said.err
    header, line = said.out.splitlines()
    assert header.split() == ["model", "parameters", "size", "depths", "stages"]
    name, millions, _, size, depths, stages = line.split(maxsplit=5)
    assert (name, size, depths) == ("timm/test_vit", "160", "7")
    assert 0 < float(millions) < 1 and stages == "stem, blocks0..5, head"


def test_stages_of_one_kind_are_listed_as_a_range() -> None:
    assert shorten_stages(["stem", "blocks0", "blocks1", "blocks2"]) == "stem, blocks0..2"
    assert shorten_stages(["conv1", "layer1", "head"]) == "conv1, layer1, head"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet99*", "'resnet99*' matches no model"),
        ("resnet81", "'resnet81' is not known; did you mean 'resnet18'? (allowed: "),
        (
            "no_such_package_of_mine:build",
            "importing no_such_package_of_mine failed (ModuleNotFoundError: ",
        ),
    ],
)
def test_an_unknown_model_ends_with_2(
    tuner: Callable[..., CommandResult], name: str, message: str
) -> None:
    said = tuner("models", name)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
