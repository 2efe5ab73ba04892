"""Results of single examples: the scores of any draw of examples follow from them, for every task."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.config import plugins
from tuner.config.run import Recipe
from tuner.core.detectors import pad_objects
from tuner.core.example_results import ExampleResults, join_pairs, repeat_pair
from tuner.core.types import Task
from tuner.training.tested_runs import TestedRun, choose_score, plain_score

EXAMPLES, CLASSES = 24, ("a", "b", "c", "never")
Pairs = list[tuple[Any, Any]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_classes(count: int) -> Pairs:
    truth = torch.randint(0, 3, (count,), generator=generator())
    logits = torch.randn(count, 4, generator=generator(1)) + 2 * torch.eye(4)[truth]
    logits[:, 3] = -9
    return [(row[None], label[None]) for row, label in zip(logits, truth, strict=True)]


def make_masks(count: int) -> Pairs:
    truth = torch.randint(0, 3, (count, 1, 6, 6), generator=generator(), dtype=torch.uint8)
    truth[:, :, 0] = 255
    noise = torch.randint(0, 3, truth.shape, generator=generator(1), dtype=torch.uint8)
    predicted = truth.where((torch.rand(truth.shape, generator=generator(2)) < 0.6), noise)
    return list(zip(predicted.clamp(max=2), truth, strict=True))


def make_texts(count: int) -> Pairs:
    tokens = torch.randint(3, 9, (count, 1), generator=generator())
    likelihood = -tokens * torch.rand(count, 1, generator=generator(1))
    rows = zip(likelihood, tokens, strict=True)
    return [({"log_likelihood": value, "tokens": number}, number) for value, number in rows]


def make_objects(count: int) -> Pairs:
    """Detections near true objects, some of them twice or of another class, and some of nothing."""
    g, pairs = generator(), []
    for _ in range(count):
        corner = torch.rand(4, 2, generator=g) * 40
        boxes = torch.cat([corner, corner + 8 + torch.rand(4, 2, generator=g) * 20], 1)
        labels = torch.randint(0, 3, (4,), generator=g)
        near = boxes.repeat(3, 1) + torch.randn(12, 4, generator=g) * 1.5
        near[:, 2:] = near[:, 2:].maximum(near[:, :2] + 1)
        guessed = labels.repeat(3)
        guessed[::5] = 1
        scores = torch.rand(12, generator=g).sort(descending=True).values
        objects = {"boxes": near, "scores": scores, "labels": guessed}
        pairs.append((pad_objects([objects], 14), {"boxes": boxes[None], "labels": labels[None]}))
    return pairs


def make_label_sets(count: int) -> Pairs:
    truth = (torch.rand(count, 4, generator=generator()) < 0.4).float()
    truth[:, 3] = 0
    logits = torch.randn(count, 4, generator=generator(1)) + 2 * truth - 1
    return [(row[None], labels[None]) for row, labels in zip(logits, truth, strict=True)]


def make_numbers(count: int) -> Pairs:
    truth = torch.randn(count, 4, generator=generator())
    predicted = truth + torch.randn(count, 4, generator=generator(1))
    return [(row[None], numbers[None]) for row, numbers in zip(predicted, truth, strict=True)]


def make_instances(count: int) -> Pairs:
    """The objects of `make_objects` with masks that fill most of their boxes."""
    g, pairs = generator(2), []
    for predicted, truth in make_objects(count):
        cells = torch.rand(*predicted["labels"].shape, 28, 28, generator=g) / 2 + 0.48
        layers = torch.zeros(1, 4, 72, 72, dtype=torch.uint8)
        for i, (left, top, right, bottom) in enumerate(truth["boxes"][0].int().tolist()):
            layers[0, i, top:bottom, left:right] = i + 1
            layers[0, i, top : top + 5, left : left + 5] = 0
        pairs.append(({**predicted, "masks": cells}, {**truth, "layers": layers}))
    return pairs


TAGS = ("O", "B-a", "I-a", "B-b", "I-b")


def make_tags(count: int) -> Pairs:
    """Tags of which three in four are right, where a third of the tokens do not count."""
    truth = torch.randint(0, 5, (count, 1, 9), generator=generator(), dtype=torch.int16)
    noise = torch.randint(0, 5, truth.shape, generator=generator(1), dtype=torch.int16)
    predicted = truth.where(torch.rand(truth.shape, generator=generator(2)) < 0.75, noise)
    truth[torch.rand(truth.shape, generator=generator(3)) < 0.3] = -100
    return list(zip(predicted.long(), truth, strict=True))


MADE = {
    "multilabel": make_label_sets,
    "text_multilabel": make_label_sets,
    "regression": make_numbers,
    "text_regression": make_numbers,
    "classification": make_classes,
    "instance_segmentation": make_instances,
    "text_classification": make_classes,
    "segmentation": make_masks,
    "text_generation": make_texts,
    "detection": make_objects,
    "token_classification": make_tags,
}


def build(name: str) -> Task:
    fixed = (
        {"thresholds": 0.5} if name.endswith("multilabel") else {}
    )  # those of a draw would differ
    classes = TAGS if name == "token_classification" else CLASSES
    task: Task = plugins.load_plugin("task", name)(classes, Recipe(), **fixed)
    return task


def drawn(pairs: Sequence[tuple[Any, Any]], counts: Tensor) -> Pairs:
    return [pair for pair, count in zip(pairs, counts.tolist(), strict=True) for _ in range(count)]


SLOW_METRICS = {
    "auroc",
    "average_precision",
    "mean_average_precision",
}  # scored by the task's whole `score` in each draw


def agrees(task: Task, results: ExampleResults, counts: Tensor, pairs: Pairs) -> None:
    """The scores of counted examples are those of a list with each example so often."""
    expected = task.score(pairs)
    quick = task.score_results(results, counts)
    assert quick == pytest.approx({n: v for n, v in expected.items() if n in quick}, abs=1e-5)
    missing = expected.keys() - quick.keys()
    assert missing <= SLOW_METRICS
    if missing:
        assert Task.score_results(task, results, counts) == pytest.approx(expected, abs=1e-5)


def test_every_task_is_tried() -> None:
    assert set(plugins.list_names("task")) == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_the_scores_of_any_draw_follow_from_the_results(name: str) -> None:
    task, pairs = build(name), MADE[name](EXAMPLES)
    results = task.example_results(pairs)
    ones = torch.ones(EXAMPLES, dtype=torch.int64)
    agrees(task, results, ones, pairs)
    for seed in range(3):
        rows = torch.randint(0, EXAMPLES, (EXAMPLES,), generator=generator(seed))
        counts = torch.bincount(rows, minlength=EXAMPLES)
        draw = drawn(pairs, counts)
        agrees(task, results, counts, draw)
        assert task.score(draw) != pytest.approx(task.score(pairs), abs=1e-5)


def test_a_metric_that_needs_all_logits_is_scored_in_the_plain_way() -> None:
    task, pairs = build("classification"), make_classes(EXAMPLES)
    tested = TestedRun("r", "d", task.score(pairs), {}, EXAMPLES, task.example_results(pairs))
    assert choose_score(task, "auroc", tested.results, tested.count) is plain_score
    assert choose_score(task, "accuracy", tested.results, tested.count) is not plain_score


@pytest.mark.parametrize("name", ["classification", "segmentation", "text_generation"])
def test_a_task_of_ones_own_needs_nothing_for_it(name: str) -> None:
    """Predictions and targets are kept as they are, and scored again."""
    task, pairs = build(name), MADE[name](EXAMPLES)
    results, counts = Task.example_results(task, pairs), torch.arange(EXAMPLES) % 3
    found = Task.score_results(task, results, counts)
    assert found == pytest.approx(task.score(drawn(pairs, counts)), abs=1e-6)


def test_predictions_that_are_no_table_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = [(torch.zeros(1, 2), torch.zeros(1)), (torch.zeros(1, 3), torch.zeros(1))]
    assert join_pairs(ragged) == {}
    pairs = make_classes(4)
    kept = join_pairs(pairs)
    prediction, target = repeat_pair(kept, torch.tensor([0, 2, 0, 1]))
    assert isinstance(prediction, Tensor) and isinstance(target, Tensor)
    assert torch.equal(target, torch.cat([pairs[i][1] for i in (1, 1, 3)]))
    monkeypatch.setattr("tuner.core.example_results.MAX_BYTES", 8)
    assert join_pairs(pairs) == {}


def test_classes_that_nobody_has_or_that_all_have() -> None:
    task = build("text_classification")
    sure = [(torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([0]))] * 3
    results = task.example_results(sure)
    agrees(task, results, torch.tensor([1, 0, 2]), sure)


def test_images_without_objects_or_detections() -> None:
    task = build("detection")
    pairs = make_objects(6)
    empty = torch.tensor([0, 1, 0, 0, 0, 0])
    pairs[1][0]["labels"].fill_(-1)
    pairs[1][1]["labels"].fill_(-1)
    assert set(task.score_results(task.example_results(pairs), empty).values()) == {0.0}
    nothing = [pairs[1]]
    alone = task.score_results(task.example_results(nothing), torch.ones(1, dtype=torch.int64))
    assert alone == task.score(nothing) == dict.fromkeys(alone, 0.0)
