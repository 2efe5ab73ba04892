"""The cross-entropy that several tasks share: PyTorch's own, but for batches of which nothing counts."""

import pytest
import torch
import torch.nn.functional as F

from tuner.core.losses import mean_cross_entropy


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
