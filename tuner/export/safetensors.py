"""Weights under the model's native names (no code inside); the normalisation beside them as `tuner.mean`, `tuner.std`."""

from collections.abc import Callable
from pathlib import Path

from tuner.core.export_module import Portable
from tuner.core.input_spec import Tree

FILE = "model.safetensors"


def save(model: Portable, example: Tree, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state(), path, metadata={"format": "pt"})
    path.chmod(0o644)


def load(path: Path, blank: Callable[[], Portable]) -> Callable[[Tree], Tree]:
    """A function of what the export takes. `blank` builds the model that the weights belong to."""
    model = blank()
    restore(path, model)
    return model.eval()


def restore(path: Path, model: Portable) -> None:
    """Puts the weights in `path` into the model that they belong to."""
    from safetensors.torch import load_file

    model.take(load_file(path))
