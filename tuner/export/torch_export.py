"""A `torch.export` program (.pt2) with weights, graph and a free batch size.

It runs without tuner and without the code of the model.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from tuner.core.export_module import ExportModule, dynamic_shapes, quiet_export
from tuner.core.input_spec import TensorTree

FILE = "model.pt2"


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    with quiet_export():
        program = torch.export.export(
            model, (example,), dynamic_shapes=(dynamic_shapes(model, example),)
        )
    torch.export.save(program, path)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The export as a function. Loading may unpickle, so load only your own files."""
    module: Callable[[TensorTree], TensorTree] = torch.export.load(path).module()
    return module
