"""A `torch.export` program (.pt2): weights and graph, batch size free; runs without tuner and without the model's code."""

from collections.abc import Callable
from pathlib import Path

import torch

from tuner.core.export_module import Portable, free, tracing
from tuner.core.input_spec import Tree

FILE = "model.pt2"


def save(model: Portable, example: Tree, path: Path) -> None:
    with tracing():
        program = torch.export.export(model, (example,), dynamic_shapes=(free(model, example),))
    torch.export.save(program, path)


def load(path: Path, blank: Callable[[], Portable]) -> Callable[[Tree], Tree]:
    """A function of what the export takes. Loading may unpickle: for files of your own only."""
    module: Callable[[Tree], Tree] = torch.export.load(path).module()
    return module
