"""Mixup and CutMix: what is mixed, its loss, and that nothing but (seed, epoch, step) decides."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Recipe
from tuner.core.types import Batch
from tuner.errors import SpaceError
from tuner.tasks.classification import Classification
from tuner.training.batch_mixing import BatchMixing, draw_mixing
from tuner.training.devices import DeviceContext, select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit


def take_apart(mixing: BatchMixing, x: Any, y: Tensor) -> tuple[Any, dict[str, Tensor], Tensor]:
    """What the net saw, the loss, and the targets of the partners."""
    seen: list[Any] = []
    targets: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, x: Any) -> Tensor:
            seen.append(x)
            return F.one_hot(y, 3).float()

    def loss_of(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(batch.y, Tensor)
        targets.append(batch.y)
        return {"loss": F.cross_entropy(net(batch.x), batch.y)}

    loss = mixing.loss_parts(loss_of, Net(), Batch(x, y))
    assert len(seen) == 1 and torch.equal(targets[0], y)
    return seen[0], loss, targets[1]


def test_mixup_is_a_weighted_mean_of_inputs_and_of_losses() -> None:
    x, y = torch.arange(5.0)[:, None].repeat(1, 4), torch.tensor([0, 1, 2, 1, 0])
    mixed, loss, partners = take_apart(BatchMixing(0.75, None, 3), x, y)
    other = (mixed - 0.75 * x) / 0.25
    order = other[:, 0].round().long()
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4] and order.tolist() != [0, 1, 2, 3, 4]
    assert torch.equal(partners, y[order])
    logits = F.one_hot(y, 3).float()
    soft = 0.75 * F.one_hot(y, 3) + 0.25 * F.one_hot(partners, 3)
    assert float(loss["loss"]) == pytest.approx(float(F.cross_entropy(logits, soft)))


def test_the_loss_is_that_of_soft_targets_whatever_the_smoothing() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 8), torch.tensor([0, 1, 2, 1, 0, 2])
    task, net = Classification(("a", "b", "c"), 0.1), nn.Linear(8, 3)
    mixing = BatchMixing(0.6, None, 1)
    loss = mixing.loss_parts(task.loss_parts, net, Batch(x, y))["loss"]
    mixed, _, partners = take_apart(mixing, x, y)
    soft = 0.6 * F.one_hot(y, 3) + 0.4 * F.one_hot(partners, 3)
    expected = F.cross_entropy(net(mixed), soft, label_smoothing=0.1)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))


def test_cutmix_pastes_a_rectangle_whose_area_is_the_share_of_the_loss() -> None:
    x = torch.arange(4.0)[:, None, None, None].repeat(1, 2, 10, 10)
    y = torch.tensor([0, 1, 2, 0])
    mixed, loss, partners = take_apart(BatchMixing(0.5, (0.2, 0.0, 0.7, 0.4), 2), x, y)
    order = mixed[:, 0, 0, 3].long()
    assert torch.equal(partners, y[order])
    pasted = torch.zeros(10, 10, dtype=torch.bool)
    pasted[0:4, 2:7] = True
    for i, partner in enumerate(order.tolist()):
        assert (mixed[i][:, pasted] == partner).all() and (mixed[i][:, ~pasted] == i).all()
    soft = 0.8 * F.one_hot(y, 3) + 0.2 * F.one_hot(partners, 3)
    expected = F.cross_entropy(F.one_hot(y, 3).float(), soft)
    assert float(loss["loss"]) == pytest.approx(float(expected))


def test_maps_of_several_sizes_are_cut_alike_and_vectors_are_blended() -> None:
    y = torch.tensor([0, 1, 2, 0])
    maps = {"a": torch.randn(4, 3, 8, 8), "b": torch.randn(4, 5, 4, 4)}
    mixing = BatchMixing(0.4, (0.0, 0.5, 0.5, 1.0), 0)
    mixed, _, _ = take_apart(mixing, maps, y)
    for name, side in (("a", 8), ("b", 4)):
        changed = (mixed[name] != maps[name]).any(0).any(0)
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[side // 2 :, : side // 2] = True
        assert torch.equal(changed, expected)
    vectors = torch.eye(4)
    mixed, _, _ = take_apart(mixing, vectors, y)
    assert torch.allclose(mixed.diagonal(), torch.tensor(0.4)) or (mixed.diagonal() == 1).any()
    assert torch.allclose(mixed.sum(1), torch.ones(4))


def test_a_mixed_text_is_as_long_as_the_longer_one() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    hidden = torch.ones(2, 3, 4)
    hidden[0, 2] = 99  # padding
    for seed in range(9):  # until the two are each other's partners
        mixing = BatchMixing(0.7, None, seed)
        mixed, _, partners = take_apart(
            mixing, {"hidden": hidden, "attention_mask": mask}, torch.tensor([0, 1])
        )
        if partners.tolist() == [1, 0]:
            break
    assert mixed["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert mixed["hidden"][0, :, 0].tolist() == pytest.approx([1, 1, 0.3])
    assert mixed["hidden"][1, :, 0].tolist() == pytest.approx([1, 1, 0.7])


def test_token_ids_are_not_mixed() -> None:
    x = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(SpaceError, match="input_ids cannot be mixed"):
        take_apart(BatchMixing(0.7, None, 0), x, torch.tensor([0, 1]))


def test_what_is_drawn_follows_seed_epoch_and_step() -> None:
    recipe = Recipe(mixup=0.4, cutmix=1.0)
    draws = [draw_mixing(recipe, seed, epoch, step) for seed, epoch, step in
             [(1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]]  # fmt: skip
    assert draws[0] == draws[1] and len({repr(draw) for draw in draws}) == 4
    assert draw_mixing(Recipe(), 1, 1, 1) is None
    many = [draw_mixing(recipe, 0, 1, step) for step in range(400)]
    cuts = sum(draw is not None and draw.rectangle is not None for draw in many)
    assert 150 < cuts < 250
    shares = [
        draw.share for step in range(400) if (draw := draw_mixing(Recipe(mixup=2.0), 0, 1, step))
    ]
    assert sum(shares) / 400 == pytest.approx(0.5, abs=0.05)
    assert sum((share - 0.5) ** 2 for share in shares) / 400 == pytest.approx(0.05, abs=0.01)


def losses(home: Path, depth: int, cache: str = "auto", **recipe: Any) -> list[float]:
    words = [
        "recipe.optimizer=sgd",
        "recipe.lr=0.01",
        "recipe.momentum=0.9",
        "recipe.epochs=2",
        f"recipe.freeze_depth={depth}",
        *(f"recipe.{key}={value}" for key, value in recipe.items()),
    ]
    document = yaml_document.parse_document(SMALL, "small.yaml")
    run = parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=5)
    engine = EngineSettings.model_validate({"device": "cpu", "cache": cache})
    device: DeviceContext = select_device(engine, home)
    context = prepare_training(run, device, "accuracy")
    return [progress.epoch.loss for progress in fit(context, run.recipe, run.seed)]


@pytest.mark.parametrize("depth", [0, 3])
def test_a_mixup_of_0_is_none_to_the_bit(depth: int, tmp_path: Path) -> None:
    plain = losses(tmp_path, depth)
    assert losses(tmp_path, depth, mixup=0, cutmix=0) == plain
    mixed = losses(tmp_path, depth, mixup=1.0)
    assert mixed != plain and losses(tmp_path, depth, mixup=1.0) == mixed
    cut = losses(tmp_path, depth, cutmix=1.0)
    assert cut not in (plain, mixed)


def test_cached_activations_are_mixed_as_uncached_ones(tmp_path: Path) -> None:
    cached, live = (losses(tmp_path, 3, cache, mixup=0.5) for cache in ("always", "never"))
    assert cached == pytest.approx(live, rel=1e-3)


TEXTS = "task: text_classification\nmodel: bert-base-uncased\ndata: {name: text, path: x}\n"


@pytest.mark.parametrize(
    ("head", "recipe", "problem"),
    [
        (
            "task: detection\nmodel: yolox_s\ndata: {name: coco, path: x}\n",
            "{mixup: 0.2}",
            "recipe.mixup: detection cannot use it: two mixed images have no common boxes",
        ),
        (
            "task: segmentation\nmodel: unet_resnet18\ndata: {name: masks, path: x}\n",
            "{cutmix: {low: 0.1, high: 1.0}}",
            "recipe.cutmix: segmentation cannot use it: a pixel of two mixed images has two classes",
        ),
        (
            TEXTS,
            "{cutmix: [0, 1.0], freeze_depth: 2}",
            "recipe.cutmix: text_classification cannot use it: texts have no rectangles; use mixup",
        ),
        (TEXTS, "{mixup: 0.2}", "recipe.mixup: token ids cannot be mixed, only what frozen"),
        (TEXTS, "{mixup: 0.2, freeze_depth: {low: 0, high: 2}}", "recipe.mixup: token ids"),
        (TEXTS, "{mixup: 0.2, freeze_depth: {low: 1, high: 2}}", ""),
        (
            TEXTS,
            "{mixup: {choices: [0, 0.2], when: {freeze_depth: [1, 2]}}, freeze_depth: [0, 1, 2]}",
            "",
        ),
        (TEXTS, "{mixup: 0}", ""),
        (TEXTS, "{mixup: -1}", "recipe.mixup: must be at least 0, got -1"),
    ],
)
def test_what_a_task_cannot_mix_is_refused_with_the_reason(
    head: str, recipe: str, problem: str
) -> None:
    document = yaml_document.parse_document(f"{head}recipe: {recipe}\n", "space.yaml")
    try:
        parsing.parse_space(document)
        problems: tuple[str, ...] = ()
    except SpaceError as error:
        problems = error.problems
    about = [line for line in problems if ": recipe." in line]
    assert len(about) == bool(problem) and all(f"space.yaml:4: {problem}" in line for line in about)
