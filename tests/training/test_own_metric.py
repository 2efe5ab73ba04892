"""A metric of the user's own: what it is called with, and what is said when it fails."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.errors import SpaceError
from tuner.training.own_metric import join_batches, metric_key, score_own_metric

PAIRS = [
    (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])),
    (torch.tensor([[0.0, 1.0]]), torch.tensor([1])),
]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module with a function `cost` of this body; returns the metric's name."""

    def make(body: str) -> str:
        name = f"metric_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(f"def cost(predictions, targets):\n    {body}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"{name}:cost"

    return make


def test_it_is_called_with_all_examples_together(own: Callable[[str], str]) -> None:
    metric = own("return (predictions.argmax(1) == targets).sum() / len(targets)")
    assert score_own_metric(metric, PAIRS) == {metric: pytest.approx(2 / 3)}
    assert score_own_metric("accuracy", PAIRS) == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return float('nan')", "returned nan; expected a finite number"),
        ("return float('inf')", "returned inf; expected a finite number"),
        ("return 'good'", r"float32 \(3, 2\) and int64 \(3,\) failed \(ValueError: could not"),
        ("return targets[7]", r"float32 \(3, 2\) and int64 \(3,\) failed \(IndexError: index 7"),
    ],
)
def test_what_it_does_wrong_is_said(own: Callable[[str], str], body: str, says: str) -> None:
    metric = own(body)
    with pytest.raises(SpaceError, match=f"search.metric: {metric}.*{says}"):
        score_own_metric(metric, PAIRS)


def test_its_key_follows_its_file_and_its_direction(own: Callable[[str], str]) -> None:
    metric = own("return 0.0")
    first, downwards = metric_key(metric, "maximise"), metric_key(metric, "minimise")
    changed = metric_key(own("return 1.0"), "maximise")
    assert len({first, downwards, changed}) == 3
    assert metric_key("accuracy", "maximise") == "accuracy"


@pytest.mark.parametrize(
    ("batches", "joined"),
    [
        ([{"a": torch.ones(2, 3)}, {"a": torch.ones(1, 3)}], {"a": (3, 3)}),
        ([{"a": torch.ones(2, 3)}, {"a": torch.ones(1, 4)}], [{"a": (2, 3)}, {"a": (1, 4)}]),
        ([torch.ones(2, 3), torch.ones(1, 4)], [(2, 3), (1, 4)]),
    ],
)
def test_batches_of_different_shapes_stay_batches(batches: Any, joined: Any) -> None:
    def shapes(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shapes(part) for name, part in value.items()}
        if isinstance(value, list):
            return [shapes(part) for part in value]
        return tuple(value.shape)

    assert shapes(join_batches(batches)) == joined
