"""The linear probe: a head that is trained once on the features of all other stages, and kept for
every later trial.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from tuner.config.run import Recipe
from tuner.files.atomic import atomic_folder, disk_errors
from tuner.files.cache_entries import make_space, open_or_create, write_checksums

PROBED_HEAD_FILE = "head.safetensors"
PROBE_RECIPE = Recipe(
    optimizer="adamw", lr=1e-3, epochs=20, batch_size=64, schedule="cosine", head="fresh"
)


def load_or_train_probe(
    head: nn.Module, folder: Path, run_key: str, train: Callable[[], None]
) -> None:
    """Gives `head` its probed weights: read from `folder`, or trained now and written there.

    Linear probing comes before fine-tuning, because the gradients of a random head would distort
    what the other stages have learnt (Kumar et al., Fine-Tuning can Distort Pretrained Features
    and Underperform Out-of-Distribution, ICLR 2022).

    Args:
        head: The last stage of a model. It is changed in place.
        folder: The cache of all probes.
        run_key: Everything that the probed weights depend on. Equal keys, equal weights.
        train: Trains `head` in place.
    """
    entry_folder = folder / hashlib.sha256(f"3 {run_key}".encode()).hexdigest()[:32]

    def create_entry() -> None:
        zero_last_linear(head)
        train()
        make_space(folder, 0.0)
        with atomic_folder(entry_folder, crash_prefix="probe") as temporary:
            state = {name: value.contiguous() for name, value in head.state_dict().items()}
            save_file(state, temporary / PROBED_HEAD_FILE)
            write_checksums(temporary)

    with disk_errors(entry_folder):
        folder.mkdir(parents=True, exist_ok=True)
        pinned_entry = open_or_create(entry_folder, create_entry)
    head.load_state_dict(load_file(pinned_entry.folder / PROBED_HEAD_FILE))


def zero_last_linear(head: nn.Module) -> None:
    """Sets the last linear layer to zero: the probe would have to unlearn random weights."""
    linear_layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not linear_layers:
        return
    nn.init.zeros_(linear_layers[-1].weight)
    if linear_layers[-1].bias is not None:
        nn.init.zeros_(linear_layers[-1].bias)
