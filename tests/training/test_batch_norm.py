"""BatchNorm's statistics: replaced without a change of what a network computes, frozen or adapting, and new ones left alone."""

import pytest
import torch
from torch import nn

from tuner.config.run import Recipe
from tuner.training import batch_norm
from tuner.training.epoch import describe_divergence


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    for module in (net[1], net[4]):
        assert isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        module.running_mean.normal_()
        module.running_var = torch.rand(module.num_features) + 0.5
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    return net


def test_new_statistics_and_equal_outputs() -> None:
    net, x = network().eval(), 3 * torch.randn(32, 3, 8, 8) + 1
    expected = net(x)
    norms = batch_norm.pretrained_norms(net)
    batch_norm.adopt_statistics(net, norms, lambda: [net(part) for part in x.split(10)])
    assert torch.allclose(net(x), expected, atol=1e-4)
    inputs = net[0](x)
    assert isinstance(net[1], nn.BatchNorm2d) and net[1].running_mean is not None
    assert torch.allclose(net[1].running_mean, inputs.mean((0, 2, 3)), atol=1e-4)
    assert net[1].running_var is not None
    assert torch.allclose(net[1].running_var, inputs.var((0, 2, 3), unbiased=False), rtol=1e-3)
    # a batch's own statistics are now the running ones, so train mode computes the same
    net.train()
    assert torch.allclose(net(x), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("policy", "batch_size", "is_training"),
    [
        ("frozen", 64, False),
        ("adapt", 2, True),
        ("auto", 15, False),
        ("auto", 16, True),
    ],
)
def test_pretrained_statistics_follow_the_recipe_and_new_ones_always_train(
    policy: str, batch_size: int, is_training: bool
) -> None:
    net = nn.Sequential(*network(), nn.BatchNorm2d(4))
    norms = batch_norm.pretrained_norms(net)
    assert norms == (net[1], net[4])
    recipe = Recipe.model_validate({"batchnorm": policy, "batch_size": batch_size})
    batch_norm.set_train_mode(net, norms, recipe, steps=10)
    assert [module.training for module in norms] == [is_training] * 2
    assert net[5].training and net[0].training


def test_a_divergence_names_its_step_and_the_part_of_the_loss() -> None:
    good = {"boxes": torch.tensor(1.0), "classes": torch.tensor(2.0)}
    bad = {"boxes": torch.tensor(float("nan")), "classes": torch.tensor(2.0)}
    assert describe_divergence([good, good, bad], 50) == "loss nan (boxes nan) at step 52"
    assert describe_divergence([{"loss": torch.tensor(float("inf"))}], 3) == "loss inf at step 3"
