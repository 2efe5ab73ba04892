"""Temperature scaling: a known temperature is found, and what has none to find gets a sensible one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.config.run import Recipe
from tuner.messages import mean_temperature
from tuner.tasks import _temperature, classification, segmentation, text_classification
from tuner.tasks._classification_scores import classification_scores
from tuner.tasks._temperature import TEMPERATURES, fit_temperature


def calibrated(count: int = 4000, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits, and true classes drawn from their own probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator)
    truth = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits, truth


def objective(logits: Tensor, truth: Tensor, temperature: float) -> float:
    loss = F.cross_entropy(logits.double() / temperature, truth, reduction="sum")
    return float(loss) + math.log(temperature) ** 2 / 2


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_a_known_temperature_is_found(factor: float) -> None:
    logits, truth = calibrated()
    temperature = fit_temperature(factor * logits, truth)
    assert temperature == pytest.approx(factor, rel=0.04)
    least = objective(factor * logits, truth, temperature)
    for other in (0.99, 1.01):
        assert least < objective(factor * logits, truth, other * temperature)
    before, after = (classification_scores(factor * logits / t, truth) for t in (1.0, temperature))
    assert after["accuracy"] == before["accuracy"] and after["log_loss"] <= before["log_loss"]
    if factor != 1:
        assert after["expected_calibration_error"] < before["expected_calibration_error"] / 3


def test_a_perfect_score_of_few_examples_does_not_drive_it_to_0() -> None:
    truth = torch.arange(12) % 3
    logits = 5 * F.one_hot(truth, 3).float()
    assert 0.7 < fit_temperature(logits, truth) < 0.9
    assert 0.85 < fit_temperature(logits[:2], truth[:2]) < 1
    assert fit_temperature(logits[:1] * 0, truth[:1]) == 1  # it knows nothing, and never will


@pytest.mark.parametrize(("factor", "limit"), [(0.001, TEMPERATURES[0]), (1000.0, TEMPERATURES[1])])
def test_it_stays_within_its_limits(factor: float, limit: float) -> None:
    logits, truth = calibrated()
    assert fit_temperature(factor * logits, truth) == pytest.approx(limit, rel=1e-3)


def test_classes_without_a_share_and_other_dtypes_are_no_problem() -> None:
    logits, truth = calibrated(400)
    wider = torch.cat([logits, torch.full((400, 1), -torch.inf)], 1)
    assert fit_temperature(wider, truth) == fit_temperature(logits, truth)
    assert math.isfinite(fit_temperature(logits.bfloat16(), truth))


def test_of_very_many_logits_every_so_many_examples_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, truth = calibrated()
    every_fourth = fit_temperature(logits[::4], truth[::4])
    monkeypatch.setattr(_temperature, "MAX_LOGITS", logits.numel() // 4)
    assert fit_temperature(logits, truth) == every_fourth


@pytest.mark.parametrize("task", [classification, text_classification])
def test_the_loss_of_a_recipe_does_not_change_it(task: object) -> None:
    logits, truth = calibrated(400)
    pairs = [(logits[:150], truth[:150]), (logits[150:], truth[150:])]
    recipe = Recipe(focal_gamma=2.0, label_smoothing=0.1, class_weights="balanced")
    counts = torch.tensor([5, 10, 20, 40, 80])
    built = task.build(tuple("abcde"), recipe, counts)  # type: ignore[attr-defined]
    assert built.fit_temperature(pairs) == fit_temperature(logits, truth)


def test_a_task_without_one_class_for_each_example_has_none() -> None:
    assert segmentation.build(("a", "b"), Recipe()).fit_temperature([]) is None


def test_the_mean_is_geometric() -> None:
    assert mean_temperature([0.5, 2.0]) == 1 and mean_temperature([None, None]) is None
    assert mean_temperature([None, 1.25]) == 1.25
