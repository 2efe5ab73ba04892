"""timm's families are cut at their blocks: small members with numbers, and the published ones by their sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import CommandResult
from tests.helpers.benchmark_modules import load_benchmark
from tests.helpers.small_image_models import SMALL_TIMM
from tests.helpers.split_laws import check_partition, check_split
from tuner.core.types import StagedModel
from tuner.core.weights import load_matching_state
from tuner.errors import SpaceError
from tuner.models import timm as ours
from tuner.models._timm import convert_state
from tuner.models._timm_stages import classifier_names, stages_of

timm = pytest.importorskip("timm")


def small_member(name: str) -> tuple[StagedModel, int]:
    """A small member of a family, cut, with numbers in all its parameters; and its images' side."""
    arguments, side, _ = SMALL_TIMM[name]
    model: nn.Module = timm.create_model(name, num_classes=3, **arguments)
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data.normal_(0, 0.2, generator=generator)
    stages, reason = stages_of(model, model.pretrained_cfg, side)
    assert reason is None
    return StagedModel(model, stages), side


@pytest.mark.parametrize("name", SMALL_TIMM)
def test_a_small_member_of_each_shape_is_cut_by_both_laws(name: str) -> None:
    staged, side = small_member(name)
    assert list(staged.stages) == SMALL_TIMM[name][2]
    check_partition(staged)
    generator = torch.Generator().manual_seed(1)
    check_split(staged, torch.randn(2, 3, side, side, generator=generator))


def test_the_features_before_the_head_are_vectors() -> None:
    for name in ("swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2"):
        staged, side = small_member(name)
        prefix, _ = staged.split(staged.max_depth)
        assert prefix(torch.zeros(2, 3, side, side)).shape == (2, staged.model.num_features)


# -- sizes and weights (V6 and V7 of the review)


def built(name: str, size: int | None = None) -> StagedModel:
    with torch.device("meta"):
        return ours.build(Path(), name, "classification", 3, size, weights="none")


def test_a_model_of_fixed_size_is_built_for_the_size_of_the_data() -> None:
    staged = built("timm/vit_tiny_patch16_224", 96)
    assert staged.model.pos_embed.shape == (1, 1 + 6 * 6, 192)  # type: ignore[union-attr]
    with torch.device("meta"):
        assert staged.model(torch.zeros(2, 3, 96, 96)).shape == (2, 3)


def test_a_size_that_a_model_does_not_take_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"data\.size: 50, but .* is made for 224 pixels"):
        built("timm/nest_tiny", 50)


@pytest.mark.parametrize("name", ["mixer_s32_224", "levit_128s", "pit_ti_224"])
def test_a_size_for_which_weights_are_not_resampled_is_refused_before_a_download(
    name: str, tmp_path: Path
) -> None:
    said = rf"data\.size: 256, but timm/{name} is made for 224 pixels and timm does not resample"
    with torch.device("meta"), pytest.raises(SpaceError, match=said):
        ours.build(tmp_path, f"timm/{name}", "classification", 3, 256)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_compute_the_size_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"data\.size: 272, but .* is made for 240 pixels"):
        built("timm/crossvit_tiny_240", 272)


def test_the_check_refuses_a_size_before_anything_is_made(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(
        "task: classification\ndata: {name: digits, size: 50}\n"
        "model: {name: timm/nest_tiny, weights: none}\nengine: {name: inline, device: cpu}\n"
    )
    result = tuner("check", tmp_path / "s.yaml")
    assert result.code == 2 and "Traceback" not in result.err
    assert "data.size: 50, but timm/nest_tiny is made for 224 pixels" in result.err
    assert "leave data.size out or write 224" in result.err
    assert not (tmp_path / "studies").exists()


SHALLOW = {"depth": 1, "embed_dim": 32, "num_heads": 2}
WINDOWED = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", SHALLOW),
        ("beit_base_patch16_224", SHALLOW),
        ("swin_tiny_patch4_window7_224", WINDOWED),
        ("test_maxvit", {}),
    ],
)
def test_positions_of_other_weights_are_resampled(name: str, arguments: dict[str, Any]) -> None:
    """Absolute ones, and the tables of relative ones; the model then takes images of the other size."""
    small, large = (
        timm.create_model(name, img_size=side, num_classes=3, **arguments) for side in (32, 64)
    )
    own, other = large.state_dict(), small.state_dict()
    resized = {key for key in own if key in other and own[key].shape != other[key].shape}
    assert resized
    state = convert_state(large, other)
    assert load_matching_state(large, state, head="head", source_name="weights") == ()
    for key in resized & set(state):
        assert state[key].shape == own[key].shape
    assert large.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_both_classifiers_of_a_distilled_model_are_new() -> None:
    arguments, _, _ = SMALL_TIMM["deit_tiny_distilled_patch16_224"]
    old, new = (
        timm.create_model("deit_tiny_distilled_patch16_224", num_classes=n, **arguments)
        for n in (10, 3)
    )
    heads = ("head", "head_dist")
    notes = load_matching_state(new, old.state_dict(), head=heads, source_name="weights")
    assert notes == ("head, head_dist: new, the weights have none for these classes",)


# -- all families


@pytest.mark.parametrize(
    ("name", "classifiers"),
    [
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("levit_128s", ("head.linear", "head_dist.linear")),
        ("efficientformer_l1", ("head", "head_dist")),
        ("crossvit_tiny_240", ("head.0", "head.1")),
        ("inception_v3", ("fc",)),
        ("vgg11", ("head.fc",)),
    ],
)
def test_weights_of_other_classes_leave_every_classifier_new(
    name: str, classifiers: tuple[str, ...]
) -> None:
    """By names and shapes alone: what timm publishes for 1,000 classes, in a model of three."""
    with torch.device("meta"):
        published = timm.create_model(name).state_dict()
        model = timm.create_model(name, num_classes=3)
    heads = classifier_names(model.pretrained_cfg)
    assert heads == classifiers
    own = model.state_dict()
    assert own.keys() == published.keys()
    differing = {key for key in own if own[key].shape != published[key].shape}
    assert differing == {key for key in own if key.startswith(tuple(f"{h}." for h in heads))}


@pytest.mark.slow
def test_a_member_of_each_third_family_is_cut_as_the_page_says() -> None:
    """On the meta device, where tensors have sizes and no numbers: the stages and the partition.

    A family takes a second; benchmarks/stages.py, which writes the page, cuts all 109.
    """
    stages = load_benchmark("stages")
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for name in stages.TIMM[::3]:
        if name == "sequencer2d_s":  # its recurrent layers take minutes on this device
            continue
        staged = stages.build_image_model(f"timm/{name}", "meta")
        row = stages.table_row(f"timm/{name}", staged, "sizes")
        assert row.rpartition("|")[0].rpartition("|")[0] in page, name
        if staged.max_depth > 1:
            check_partition(staged)
