"""The generic cutter: what it takes for units, where it cuts, and what it refuses with a reason."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.split_laws import check_partition, check_split
from tuner.core.module_digests import module_digest
from tuner.core.types import StagedModel
from tuner.models._cutter import cut_model
from tuner.models._forward_pass import UncutModel
from tuner.models._graph_stage import pack_values, unpack_values
from tuner.models._model_units import find_units

IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cut(model: nn.Module) -> StagedModel:
    """The model cut, after the laws of the cut were checked."""
    torch.manual_seed(0)
    for value in model.parameters():
        nn.init.normal_(value, std=0.5)
    stages, reason = cut_model(model, IMAGE)
    assert reason is None
    staged = StagedModel(model, stages)
    check_partition(staged)
    check_split(staged, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return staged


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(self.norm(x))
        return x + (y if scale is None else y * scale)


class Transformer(nn.Module):
    """Patches, a class token, blocks that share a scale, a norm, and dropout as a function."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 2, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.register_buffer("table", torch.arange(4.0))
        self.scale = nn.Linear(4, 4)
        block = Block()
        self.blocks = nn.ModuleList([block if shared else Block() for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        scale = self.scale(self.table)
        for block in self.blocks:
            x = block(x, scale)
        x = F.dropout(self.norm(x)[:, 0], 0.3, training=self.training)
        return self.head(x)


def test_a_transformer_is_cut_at_its_blocks_and_the_head_takes_a_vector() -> None:
    staged = cut(Transformer())
    assert list(staged.stages) == ["stem", "blocks0", "blocks1", "blocks2", "head"]
    features = staged.split(staged.max_depth)[0](torch.zeros(2, 3, 8, 8))
    assert features.shape == (2, 4)  # type: ignore[union-attr]
    assert [m.p for m in staged.stages["head"].modules() if isinstance(m, nn.Dropout)] == [0.3]


def test_what_every_block_uses_belongs_to_the_first_stage_that_uses_it() -> None:
    staged = cut(Transformer())
    owners = [
        name for name, stage in staged.stages.items() if "scale" in dict(stage.named_children())
    ]
    assert owners == ["blocks0"]
    prefix, _ = staged.split(2)
    assert not staged.model.scale.weight.requires_grad  # type: ignore[union-attr]
    assert any(value is staged.model.scale.weight for value in prefix.parameters())  # type: ignore[union-attr]


def test_stages_are_copied_and_sent_with_their_model() -> None:
    staged = cut(Transformer())
    x = torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(staged), pickle.loads(pickle.dumps(staged))):
        own = {id(value) for value in twin.model.parameters()}
        assert own == {id(v) for stage in twin.stages.values() for v in stage.parameters()}
        with torch.no_grad():
            twin.model.eval().head.bias.add_(1.0)
            assert torch.equal(twin.split(1)[1].eval()(twin.split(1)[0](x)), twin.model(x))


def test_blocks_that_are_one_module_are_one_stage() -> None:
    assert list(cut(Transformer(shared=True)).stages) == ["patch_embed", "blocks", "head"]


def test_another_order_of_steps_is_another_digest() -> None:
    class Reordered(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).transpose(1, 2).relu()
            scale = self.scale(self.table)
            for block in self.blocks:
                x = block(x, scale)
            return self.head(self.norm(x)[:, 0]) + self.cls_token.mean()

    stems = [cut(model).stages["stem"] for model in (Transformer(), Reordered())]
    assert len({module_digest(stem) for stem in stems}) == 2


class Pair(nn.Module):
    """Two maps that meet at the end, as in networks of several resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, 2)
        self.layer3, self.head = nn.Conv2d(4, 4, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.layer1(x)
        maps = [fine, self.layer3(self.layer2(fine))]
        return self.head(torch.cat([each.mean((2, 3)) for each in maps], dim=1))


def test_two_tensors_cross_under_names_of_their_own() -> None:
    staged = cut(Pair())
    assert list(staged.stages) == ["layer1", "layer2", "layer3", "head"]
    between = staged.split(2)[0](torch.zeros(2, 3, 8, 8))
    assert sorted(between) == ["model_layer1", "model_layer2"]  # type: ignore[arg-type]


def test_lists_of_tensors_are_numbered_and_come_back_as_lists() -> None:
    values = {"a": torch.ones(2), "b": [torch.zeros(2), torch.ones(2)]}
    tree = pack_values(values, {"a": None, "b": 2})
    assert sorted(tree) == ["a", "b.0", "b.1"]
    assert isinstance(unpack_values(tree, {"a": None, "b": 2})["b"], list)


class Branching(Pair):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return super().forward(x)


class Sized(Pair):
    """A number is used before and behind layer3, so there is no cut before it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(x)
        height = x.shape[2]
        x = self.layer2(x) * height
        return self.head(torch.cat([self.layer3(x).mean((2, 3))] * 2, dim=1) + height)


def test_parts_that_stay_together_are_told() -> None:
    stages, reason = cut_model(Sized(), IMAGE)
    assert list(stages) == ["layer1", "layer2", "head"]  # layer3 belongs to the stage of layer2
    assert reason is not None and "not cut: layer3" in reason


class Auxiliary(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branching(), "cannot be read .*control flow"),
        (Auxiliary(), "another one while it trains"),
    ],
)
def test_what_cannot_be_cut_says_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(UncutModel, match=reason):
        cut(model)


def test_a_wide_classifier_does_not_make_it_the_trunk() -> None:
    model = nn.Module()
    model.features = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)])
    model.classifier = nn.Sequential(nn.Linear(30, 400), nn.ReLU(), nn.Linear(400, 2))
    units = find_units(model)
    assert units.trunk == {f"features.{i}" for i in range(4)}
    assert units.heads == ("classifier.2",)
    assert "classifier.0" in units.paths


def test_numbered_children_are_stages_and_are_not_opened() -> None:
    model = nn.Module()
    model.conv1 = nn.Conv2d(3, 4, 1)
    for i in (1, 2):
        setattr(model, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    model.fc = nn.Linear(4, 2)
    assert find_units(model).paths == ("conv1", "layer1", "layer2", "fc")
