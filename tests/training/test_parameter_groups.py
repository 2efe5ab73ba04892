"""Rates and weight decay by group of parameters: which parameter has which, and that one rate is one group."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Recipe, Run
from tuner.core.types import StagedModel
from tuner.training import training_loop
from tuner.training.devices import DeviceContext, select_device
from tuner.training.optimizers import is_decayed, make_optimizer, stage_rates
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit


def staged(*names: str) -> StagedModel:
    stages = {name: nn.Linear(2, 2) for name in names}
    return StagedModel(nn.Sequential(*stages.values()), stages)


@pytest.mark.parametrize(
    ("names", "recipe", "expected"),
    [
        (("stem", "body", "head"), {}, [1, 1, 1]),
        (("stem", "body", "head"), {"layer_decay": 0.5}, [0.25, 0.5, 1]),
        (("stem", "body", "head"), {"head_lr": 10}, [1, 1, 10]),
        (("stem", "body", "head"), {"backbone_lr": 0.1}, [0.1, 0.1, 1]),
        (("stem", "neck", "head"), {"backbone_lr": 0.1}, [0.1, 1, 1]),
        (("stem", "fpn", "extra", "head"), {"backbone_lr": 0.1}, [0.1, 1, 1, 1]),
        (("model",), {"backbone_lr": 0.1, "layer_decay": 0.5}, [1]),
        (
            ("stem", "neck", "head"),
            {"backbone_lr": 0.1, "layer_decay": 0.5, "head_lr": 3},
            [0.025, 0.5, 3],
        ),
    ],
)
def test_the_rate_of_each_stage(
    names: tuple[str, ...], recipe: dict[str, Any], expected: list[float]
) -> None:
    assert list(stage_rates(staged(*names), Recipe(**recipe)).values()) == pytest.approx(expected)


def test_each_parameter_gets_the_rate_of_its_stage_also_behind_a_cut() -> None:
    model, recipe = staged("stem", "body", "head"), Recipe(lr=0.1, layer_decay=0.5, head_lr=2)
    rates = stage_rates(model, recipe)
    for depth in (0, 1, 2):
        _, net = model.split(depth)
        groups = make_optimizer(net, recipe, rates).param_groups
        by_parameter = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert by_parameter == {
            id(p): pytest.approx(0.1 * rates[name])
            for name, stage in net.named_children()
            for p in stage.parameters()
        }


class Transformer(nn.Module):
    """One parameter of each kind, under the names of timm, torchvision and transformers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("pos_embed", "cls_token", "weight", "logit_scale", "gamma"):
            shape = {"logit_scale": (), "gamma": (4,)}.get(name, (1, 2, 4))
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
        self.position_embeddings = nn.Embedding(3, 4)
        self.embed_positions = nn.Embedding(3, 4)  # OPT's and BART's name
        self.wpe = nn.Embedding(3, 4)  # GPT-2's
        self.word_embeddings = nn.Embedding(3, 4)
        self.norm = nn.BatchNorm2d(4)
        self.position_wise = nn.Linear(4, 4)


def test_weight_decay_is_for_matrices_and_kernels_alone() -> None:
    net = nn.Sequential(Transformer())
    decayed = {name for name, value in net.named_parameters() if is_decayed(name, value)}
    assert decayed == {"0.weight", "0.word_embeddings.weight", "0.position_wise.weight"}
    recipe = Recipe(weight_decay=0.1)
    groups = {group["weight_decay"]: group for group in make_optimizer(net, recipe).param_groups}
    assert len(groups[0.1]["params"]) == 3
    assert len(groups[0.0]["params"]) == len(list(net.parameters())) - 3
    all_decayed = make_optimizer(net, recipe.model_copy(update={"decay_norms": True}))
    assert [group["weight_decay"] for group in all_decayed.param_groups] == [0.1]


def test_a_parameter_that_two_stages_share_is_in_one_group() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    groups = make_optimizer(net, Recipe(lr=0.1), {"0": 0.5, "1": 1.0}).param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(1, 0.05)]


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def run(**recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {"epochs": 2, "lr": 0.01, "freeze_depth": 0, "weight_decay": 0.1} | recipe
    return space.make_run({("recipe", key): value for key, value in chosen.items()}, seed=3)


def trained(r: Run, here: DeviceContext) -> tuple[list[float], dict[str, torch.Tensor]]:
    context = prepare_training(r, here, "accuracy")
    losses = [progress.epoch.loss for progress in fit(context, r.recipe, r.seed)]
    return losses, context.net.state_dict()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_rate_in_several_groups_trains_as_in_one_group_to_the_bit(
    optimizer: str, here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = run(optimizer=optimizer, decay_norms=True)
    losses, weights = trained(r, here)
    assert len(prepare_groups(r, here)) == 1
    one_rate = stage_rates
    monkeypatch.setattr(  # factors that are 1, and yet another group for each stage
        training_loop,
        "stage_rates",
        lambda *words: {n: Unequal(r) for n, r in one_rate(*words).items()},
    )
    assert len(prepare_groups(r, here)) == 6
    again, same = trained(r, here)
    assert again == losses and all(torch.equal(same[name], weights[name]) for name in weights)


class Unequal(float):
    """A number that is equal to no other."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def prepare_groups(r: Run, here: DeviceContext) -> list[dict[str, Any]]:
    context = prepare_training(r, here, "accuracy")
    return training_loop.start_training(context, r.recipe, r.seed).optimizer.param_groups


@pytest.mark.parametrize(
    "recipe",
    [{"head_lr": 3.0}, {"backbone_lr": 0.3}, {"layer_decay": 0.5}, {"decay_norms": True}],
    ids=lambda recipe: next(iter(recipe)),
)
def test_each_key_reaches_the_training(recipe: dict[str, Any], here: DeviceContext) -> None:
    assert trained(run(**recipe), here)[0] != trained(run(), here)[0]


def test_the_groups_follow_one_schedule(here: DeviceContext) -> None:
    r = run(layer_decay=0.5, epochs=1, schedule="linear", warmup=0.0)
    training = training_loop.start_training(prepare_training(r, here, "accuracy"), r.recipe, r.seed)
    first = [group["lr"] for group in training.optimizer.param_groups]
    training.optimizer.step()
    training.schedule.step()
    later = [group["lr"] for group in training.optimizer.param_groups]
    assert max(first) == pytest.approx(0.01) and min(first) == pytest.approx(0.01 / 32)
    assert later == pytest.approx([rate * later[-1] / first[-1] for rate in first])
    assert later[-1] < first[-1]
