"""Weights under the model's native names (no code inside); the normalisation beside them as `tuner.mean`, `tuner.std`."""

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
    """A function of what the export takes. `blank` builds the model that the weights belong to."""
    model = blank()
    restore(path, model)
    return model.eval()


def restore(path: Path, model: ExportModule) -> None:
    """Puts the weights in `path` into the model that they belong to."""
    from safetensors.torch import load_file

    model.load_export_state(load_file(path))
