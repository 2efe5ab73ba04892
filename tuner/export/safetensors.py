"""Weights under the model's own names, without code.

The normalisation is stored beside them as `tuner.mean` and `tuner.std`.
"""

from collections.abc import Callable
from pathlib import Path

from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree

FILE = "model.safetensors"


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.export_state(), path, metadata={"format": "pt"})
    path.chmod(0o644)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The export as a function. `blank` builds the model that the weights belong to."""
    model = blank()
    restore(path, model)
    return model.eval()


def restore(path: Path, model: ExportModule) -> None:
    """Load the weights in `path` into the model that they belong to."""
    from safetensors.torch import load_file

    model.load_export_state(load_file(path))
