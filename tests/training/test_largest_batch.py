"""The largest batch that a GPU trains at once; memory that ends is made up on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.instant_engine import make_space
from tuner.commands.plan import batch_lines
from tuner.config.run import EngineSettings
from tuner.messages import DepthCost, TrainingProfile
from tuner.training.devices import select_device
from tuner.training.largest_batch import find_largest, largest_batch, trains_within
from tuner.training.preparation import load_run


@pytest.mark.parametrize(
    ("fitting", "start", "limit", "expected"),
    [
        (100, 16, 1000, 64),
        (16, 16, 1000, 16),
        (5, 16, 1000, 4),
        (0, 16, 1000, None),
        (999, 16, 60, 60),
    ],
)
def test_sizes_are_doubled_or_halved(
    fitting: int, start: int, limit: int, expected: int | None
) -> None:
    assert find_largest(lambda size: size <= fitting, start, limit) == expected


class Full(nn.Module):
    """A memory that ends where more examples come than fit."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return x


def test_a_batch_fits_where_it_is_trained_in_one_part(tmp_path: Path) -> None:
    run = make_space().make_run({})
    device = select_device(EngineSettings(name="inline", device="cpu"), tmp_path, 0)
    loaded = load_run(run, device, "accuracy", "maximise")
    assert trains_within(loaded, 5, 12)
    *_, head = loaded.staged_model.stages.values()
    memory = Full()
    head.register_forward_pre_hook(lambda module, given: (memory(given[0]),))
    assert [trains_within(loaded, 5, size) for size in (4, 6, 8)] == [True, True, False]
    assert largest_batch(loaded, 5, 1) is None  # on the CPU nobody asks


def test_the_plan_names_it() -> None:
    depths = (DepthCost(2, 0.1, 0.1, 0.0, 0.0, is_cached=False),)
    sizes = {"train": 300, "valid": 10, "test": 10}
    said = [
        batch_lines(TrainingProfile(depths, 1.0, 1.0, sizes, 1, size)) for size in (None, 64, 300)
    ]
    assert said[0] == []
    assert said[1][0].startswith("batch   up to 64 examples at once at freeze depth 2;")
    assert said[2][0].startswith("batch   up to all training examples at once")
