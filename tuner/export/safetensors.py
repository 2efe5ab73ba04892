"""Weights under the model's native names (no code inside); the normalisation beside them as `tuner.mean`, `tuner.std`."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from tuner.core import IMAGENET, Normalised

FILE = "model.safetensors"


def save(model: Normalised, example: Tensor, path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in model.model.state_dict().items()}
    save_file({**state, "tuner.mean": model.mean, "tuner.std": model.std}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def load(path: Path, blank: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    """A function of RGB in 0..1. `blank` builds the model that the weights belong to."""
    from safetensors.torch import load_file

    state = load_file(path)
    model = Normalised(blank(), IMAGENET)  # its numbers are replaced by the file's
    model.mean, model.std = state.pop("tuner.mean"), state.pop("tuner.std")
    model.model.load_state_dict(state)
    return model.eval()
