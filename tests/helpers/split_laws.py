"""The cut and partition laws as functions: a model cut at any depth computes what it computes whole."""

import pytest
import torch
from torch import nn

from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.types import StagedModel


def check_split(staged: StagedModel, x: TensorTree) -> None:
    """suffix(prefix(x)) == model(x) at every depth; with nothing frozen also while training, dropout and all.

    At every depth prefix and suffix are the same stages in a row, which is checked by identity. So all depths compute
    the same, and the numbers are compared at the least depth and at the greatest.
    """
    suffix = staged.split(0)[1].train()
    staged.model.train()
    if (
        staged.native_forward is None
    ):  # where it is not model(x), its answer while training is of another kind
        outputs = []
        for whole in (staged.model, suffix):
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(whole(x))
        assert trees_equal(*outputs)
    staged.model.eval()
    with torch.no_grad():
        expected = staged.reference_output(x)
        assert all(leaf.isfinite().all() for leaf in tree_to_dict(expected).values())
        assert all(
            leaf.std() > 0 for leaf in tree_to_dict(expected).values() if leaf.is_floating_point()
        )  # all objects may be of one class
        for depth in range(staged.max_depth + 1):
            prefix, suffix = staged.split(depth)
            assert type(prefix) is type(suffix) is nn.Sequential
            in_a_row = [*map(id, prefix), *map(id, suffix)]
            assert len(prefix) == depth and in_a_row == list(map(id, staged.stages.values()))
            if depth in (0, staged.max_depth):
                # on some processors PyTorch computes with frozen weights by another kernel
                expected = staged.reference_output(x)
                assert trees_equal(suffix.eval()(prefix(x)), expected), depth


def trees_equal(a: TensorTree, b: TensorTree) -> bool:
    return tree_to_dict(a).keys() == tree_to_dict(b).keys() and all(
        torch.equal(leaf, tree_to_dict(b)[name]) for name, leaf in tree_to_dict(a).items()
    )


def check_partition(staged: StagedModel) -> None:
    """Each parameter and buffer lies in exactly one stage; a prefix is frozen and still, a suffix is all trainable.

    What `split` does to a stage does not depend on the depth, so that of deep models three depths are tried.
    """
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        own = sorted(id(v) for _, v in kind(staged.model))
        inside = sorted(id(v) for stage in staged.stages.values() for _, v in kind(stage))
        assert inside == own
    for depth in sorted({0, staged.max_depth // 2, staged.max_depth}):
        staged.model.train()
        prefix, suffix = staged.split(depth)
        assert not any(p.requires_grad for p in prefix.parameters())
        assert not any(module.training for module in prefix.modules())
        assert all(p.requires_grad for p in suffix.parameters())
        assert all(module.training for module in suffix.modules() if module is not suffix)
        assert next(suffix.parameters(), None) is not None
    with pytest.raises(ValueError, match=rf"freeze depth must be in 0\.\.{staged.max_depth}, got"):
        staged.split(staged.max_depth + 1)
