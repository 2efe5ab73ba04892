"""What a recipe says of the loss reaches the loss of each task, or is refused for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import SMALL
from tuner.config import parsing, plugins, yaml_document
from tuner.config.run import Recipe
from tuner.core.types import Batch
from tuner.errors import SpaceError

LOSS_KEYS: dict[str, Any] = {
    "label_smoothing": 0.3,
    "focal_gamma": 2.0,
    "class_weights": "balanced",
}
COUNTS = torch.tensor([5, 20, 75])
DRAW = torch.Generator().manual_seed(0)


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAW)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=DRAW)


CLASSES = Batch(logits(8, 3), classes(8))
LABELS = Batch(logits(8, 3), classes(8, 3).clamp(max=1).float())
TOKENS = {"input_ids": classes(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
NEXT_TOKENS = logits(2, 6, 3)

# of each task whose loss has such keys: a batch, and a net for it
CASES: dict[str, tuple[Batch, Callable[[Any], Any]]] = {
    "classification": (CLASSES, lambda x: x),
    "text_classification": (CLASSES, lambda x: x),
    "multilabel": (LABELS, lambda x: x),
    "text_multilabel": (LABELS, lambda x: x),
    "segmentation": (Batch(logits(2, 3, 4, 4), classes(2, 4, 4).byte()), lambda x: x),
    "token_classification": (Batch(logits(8, 3), classes(8).short()), lambda x: x),
    "text_generation": (Batch(TOKENS, classes(2)), lambda _: NEXT_TOKENS),
}


def is_used(task: str, key: str) -> bool:
    if key == "label_smoothing":
        return key not in plugins.read_task_names(task, "REFUSED_RECIPE_KEYS")
    return key in plugins.read_task_names(task, "RECIPE_KEYS")


USED = [(task, key) for task in plugins.list_names("task") for key in LOSS_KEYS]


@pytest.mark.parametrize(("task", "key"), [pair for pair in USED if is_used(*pair)])
def test_a_key_of_the_loss_changes_the_loss_of_its_task(task: str, key: str) -> None:
    batch, net = CASES[task]
    build = plugins.load_plugin("task", task)
    counts = {"class_counts": COUNTS} if key == "class_weights" else {}
    names = () if task == "text_generation" else ("a", "b", "c")
    if task == "token_classification":
        names = ("O", "B-X", "I-X")
    plain = build(names, Recipe()).loss(net, batch)
    changed = build(names, Recipe(**{key: LOSS_KEYS[key]}), **counts).loss(net, batch)
    assert torch.isfinite(changed) and not torch.isclose(plain, changed, rtol=1e-3)


@pytest.mark.parametrize(("task", "key"), [pair for pair in USED if not is_used(*pair)])
def test_a_key_that_the_loss_of_a_task_does_not_have_is_refused(task: str, key: str) -> None:
    text = SMALL.replace("task: classification", f"task: {task}")
    text = text.replace("batch_size: 16", f"batch_size: 16\n  {key}: {LOSS_KEYS[key]}")
    with pytest.raises(SpaceError, match=rf"recipe\.{key}: {task} has no such key"):
        parsing.parse_space(yaml_document.parse_document(text, "small.yaml"))
