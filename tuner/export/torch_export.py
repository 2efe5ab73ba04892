"""A `torch.export` program (.pt2): weights and graph, batch size free; runs without tuner and without the model's code."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tuner.core import Normalised

FILE = "model.pt2"


def save(model: Normalised, example: Tensor, path: Path) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65_536)},))
    torch.export.save(program, path)


def load(path: Path, blank: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    """A function of RGB in 0..1. Loading may unpickle: for files of your own only."""
    module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module
