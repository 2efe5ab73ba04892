"""The cross-entropy that several tasks share: PyTorch's own, but for batches of which nothing counts."""

import pytest
import torch
import torch.nn.functional as F

from tuner.config import plugins
from tuner.config.run import Recipe
from tuner.core.losses import class_cross_entropy, mean_cross_entropy, weights_of_classes
from tuner.core.types import Batch
from tuner.training.linear_probe import LayerExamples, solve_output_layer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6,), (4, 5), (2, 3, 7)])
def test_where_something_counts_it_is_pytorchs(shape: tuple[int, ...], smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], 4, *shape[1:], generator=generator, requires_grad=True)
    targets = torch.randint(0, 4, shape, generator=generator)
    targets.view(-1)[:2] = -100
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    loss = mean_cross_entropy(logits, targets, -100, smoothing)
    assert torch.allclose(loss, expected, rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (0,)])
def test_where_nothing_counts_it_is_0_with_gradients_of_0(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 4, requires_grad=True)
    loss = mean_cross_entropy(logits, torch.full(shape, -100), -100, 0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not gradient.any()


def some_examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 3, generator=generator, requires_grad=True)
    return logits, torch.randint(0, 3, (12,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_gamma_of_0_and_equal_weights_are_cross_entropy(smoothing: float) -> None:
    logits, targets = some_examples()
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    assert torch.equal(class_cross_entropy(logits, targets, smoothing), expected)
    weighted = class_cross_entropy(logits, targets, smoothing, class_weights=torch.ones(3))
    assert torch.allclose(weighted, expected, rtol=1e-6)


def test_the_focal_loss_is_that_of_its_paper() -> None:
    logits, targets = some_examples()
    p = logits.softmax(1).gather(1, targets[:, None])
    expected = (-((1 - p) ** 2) * p.log()).mean()
    assert torch.allclose(class_cross_entropy(logits, targets, focal_gamma=2.0), expected)


@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_the_focal_loss_of_an_example_that_is_surely_right_has_finite_gradients(
    gamma: float,
) -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = class_cross_entropy(logits, torch.tensor([0]), focal_gamma=gamma)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("balanced", [0.5 / 0.9, 0.5 / 0.1]),  # n / (classes x examples of the class)
        ("effective_number", [0.65639, 4.09252]),
    ],
)
def test_weights_are_as_published_and_their_mean_over_the_examples_is_1(
    kind: str, expected: list[float]
) -> None:
    counts = torch.tensor([900, 100])
    weights = weights_of_classes(counts, kind)
    assert weights is not None
    if kind == "effective_number":  # Cui et al., equation 2
        effective = [(1 - 0.999**n) / (1 - 0.999) for n in (900, 100)]
        assert float(weights[1] / weights[0]) == pytest.approx(effective[0] / effective[1])
    assert weights.tolist() == pytest.approx(expected, rel=1e-3)
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1)
    assert weights_of_classes(counts, "none") is None


def test_a_class_without_examples_has_a_finite_weight() -> None:
    weights = weights_of_classes(torch.tensor([9, 0, 1]), "balanced")
    assert weights is not None and weights.isfinite().all()


def test_the_weighted_loss_of_pixels_is_a_mean_over_those_that_count() -> None:
    logits, targets = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    targets[0, 0] = 255
    weights = torch.tensor([0.5, 1.0, 3.0])
    loss = mean_cross_entropy(logits, targets, 255, class_weights=weights)
    counted = targets != 255
    each = F.cross_entropy(logits, targets, ignore_index=255, reduction="none")[counted]
    assert torch.allclose(loss, (each * weights[targets[counted]]).mean())
    alike = mean_cross_entropy(logits, targets, 255, class_weights=torch.ones(3))
    assert torch.allclose(alike, mean_cross_entropy(logits, targets, 255))


def test_the_weighted_loss_of_a_batch_in_parts_is_that_of_the_whole_batch() -> None:
    logits, targets = some_examples()
    keys = {"class_weights": torch.tensor([0.2, 1.0, 4.0]), "focal_gamma": 1.5}
    whole = class_cross_entropy(logits, targets, 0.1, **keys)  # type: ignore[arg-type]
    parts = [
        class_cross_entropy(logits[i : i + 4], targets[i : i + 4], 0.1, **keys) for i in (0, 4, 8)
    ]  # type: ignore[arg-type]
    assert torch.allclose(whole, torch.stack(parts).mean())


def test_the_weights_of_examples_count_in_the_loss_of_a_classifier_and_in_its_probe() -> None:
    logits, targets = some_examples()
    weights = torch.rand(len(targets)) * 2
    task = plugins.load_plugin("task", "classification")(("a", "b", "c"), Recipe())
    y = {"target": targets, "example_weight": weights}
    loss = task.loss(torch.nn.Identity(), Batch(logits, y))
    each = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(loss, (each * weights).sum() / len(targets))
    logits = logits.detach()
    kept = targets != 0  # examples that weigh nothing are as good as absent
    layers = [torch.nn.Linear(3, 3) for _ in range(2)]
    weighted = {"target": targets, "example_weight": kept.float()}
    judged = LayerExamples(logits, targets)
    solve_output_layer(layers[0], task.loss, LayerExamples(logits, weighted), judged)
    solve_output_layer(layers[1], task.loss, LayerExamples(logits, targets), judged)
    shares = [layer(logits).softmax(1)[:, 0].mean() for layer in layers]
    assert shares[0] < 0.1 < shares[1]
