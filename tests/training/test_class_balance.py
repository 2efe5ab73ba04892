"""Classes that are rare: weights in the loss, an order with as many examples of each, and what both buy."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tests.helpers import imbalanced_digits
from tuner.config import parsing, yaml_document
from tuner.config.data_options import ImageOptions
from tuner.config.run import EngineSettings, Run
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import Source
from tuner.files.cache_entries import list_entries
from tuner.training.class_balance import balanced_order, count_classes, read_labels
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import TrainingContext, shuffle_into_batches
from tuner.training.preparation import MemorySource, prepare_training
from tuner.training.training_loop import fit, predict_source

SPACE = f"""
task: classification
data: {{name: '{imbalanced_digits.__name__}:load', size: 32}}
model: {{name: resnet18_slim, weights: bundled}}
"""


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def run(text: str = SPACE, **recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(text, "space.yaml"))
    return space.make_run({("recipe", key): value for key, value in recipe.items()}, seed=3)


def balanced_accuracy(context: TrainingContext) -> float:
    return context.task.score(predict_source(context, context.valid, 64))["balanced_accuracy"]


@pytest.mark.parametrize("sizes", [(50, 3, 7), (1, 40, 1, 1), (5, 5)])
def test_a_balanced_order_has_as_many_of_each_class_and_as_many_in_all(
    sizes: tuple[int, ...],
) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    order = balanced_order(labels, torch.Generator().manual_seed(0))
    drawn = torch.bincount(labels[order], minlength=len(sizes))
    assert len(order) == len(labels) and int(drawn.max() - drawn.min()) <= 1
    for label in range(len(sizes)):  # and no example of a class is left behind another
        times = torch.bincount(order, minlength=len(labels))[labels == label]
        assert int(times.max() - times.min()) <= 1


def test_what_one_epoch_leaves_out_another_has() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    seen: set[int] = set()
    for epoch in range(1, 6):
        batches = shuffle_into_batches(100, 16, seed=1, epoch=epoch, labels=labels)
        seen |= set(torch.cat(batches).tolist())
    assert len(seen) > 95


def test_balanced_batches_are_as_many_and_follow_seed_and_epoch() -> None:
    labels, lengths = torch.tensor([0] * 90 + [1] * 10), torch.arange(100)

    def batches(seed: int, epoch: int, **more: Any) -> list[list[int]]:
        return [b.tolist() for b in shuffle_into_batches(100, 16, seed, epoch, **more)]

    first = batches(1, 1, labels=labels)
    assert [len(b) for b in first] == [len(b) for b in batches(1, 1)]
    assert first == batches(1, 1, labels=labels)
    assert first != batches(1, 2, labels=labels) and first != batches(2, 1, labels=labels)
    by_length = batches(1, 1, labels=labels, lengths=lengths)
    assert sorted(chain(*by_length)) == sorted(chain(*first))
    assert all(batch == sorted(batch) for batch in by_length)


def test_labels_are_read_without_pixels_and_counted(here: DeviceContext) -> None:
    data = imbalanced_digits.load(
        here.home,
        ImageInputSpec(32, 32, "bilinear", (0.0,) * 3, (1.0,) * 3),
        "classification",
        image=ImageOptions(),
    )
    for source in (data.train, data.full):
        in_batch = source.take(torch.arange(len(source)), 0).y
        assert torch.equal(read_labels(source), in_batch)
    assert count_classes(data.train, 10).tolist() == [60] * 5 + [6] * 5
    assert count_classes(data.full, 10).tolist() == [90] * 5 + [36] * 5


def test_a_source_that_knows_no_targets_alone_is_read_as_a_whole() -> None:
    masks = torch.tensor([[[0, 1], [255, 1]], [[1, 1], [1, 0]]], dtype=torch.uint8)
    source: Source = MemorySource(torch.zeros(2, 3), masks, "masks of a test")
    assert count_classes(source, 3).tolist() == [2, 5, 0]


@pytest.mark.parametrize(
    "recipe",
    [
        {"class_weights": "balanced"},
        {"class_weights": "effective_number"},
        {"sampling": "balanced"},
    ],
)
def test_each_key_finds_rare_digits_that_plain_training_misses(
    recipe: dict[str, Any], here: DeviceContext
) -> None:
    scores = []
    for keys in ({}, recipe):
        r = run(head="fresh", freeze_depth=5, epochs=3, lr=0.01, **keys)
        context = prepare_training(r, here, "accuracy")
        epochs = list(fit(context, r.recipe, r.seed))
        scores.append(epochs[-1].epoch.scores["balanced_accuracy"])
    plain, balanced = scores
    assert balanced > plain + 0.05, scores


def test_the_probe_weighs_classes_as_the_run_does_and_is_kept_for_each_weighting(
    here: DeviceContext,
) -> None:
    plain = balanced_accuracy(prepare_training(run(freeze_depth=5), here, "accuracy"))
    weighted, sampled = (
        balanced_accuracy(prepare_training(run(freeze_depth=5, **keys), here, "accuracy"))
        for keys in ({"class_weights": "balanced"}, {"sampling": "balanced"})
    )
    assert weighted == sampled > plain  # sampling weighs the classes alike on average
    assert len(list_entries(here.home / "probes")) == 2


def test_weights_follow_the_training_examples_alone(here: DeviceContext) -> None:
    keys = {"head": "fresh", "freeze_depth": 5, "class_weights": "balanced"}
    task = prepare_training(run(**keys), here, "accuracy").task
    expected = [330 / 10 / 60] * 5 + [330 / 10 / 6] * 5
    assert task.class_weights.tolist() == pytest.approx(expected)  # type: ignore[attr-defined]
    both = prepare_training(run(fit="train+valid", **keys), here, "accuracy").task
    expected = [630 / 10 / 90] * 5 + [630 / 10 / 36] * 5
    assert both.class_weights.tolist() == pytest.approx(expected)  # type: ignore[attr-defined]
    drawn_alike = prepare_training(run(sampling="balanced", **keys), here, "accuracy")
    assert drawn_alike.task.class_weights is None  # type: ignore[attr-defined]


def test_the_default_recipe_trains_as_without_these_keys(here: DeviceContext) -> None:
    context = prepare_training(run(SMALL, freeze_depth=5, epochs=1), here, "accuracy")
    assert context.labels is None and context.task.class_weights is None  # type: ignore[attr-defined]
