"""The device a run is carried out on, its precision, and the cache beside it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.cache import Limits
from tuner.errors import StorageError
from tuner.run import Engine


@dataclass(frozen=True)
class Place:
    home: Path
    device: torch.device
    precision: str  # float32 or bfloat16
    limits: Limits

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 autocast where the precision says so; otherwise nothing changes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def place(engine: Engine, home: Path, slot: int = 0) -> Place:
    """Where the worker in `slot` computes. Raises StorageError when the device asked for is not there."""
    device = _device(engine.device, slot)
    precision = engine.precision
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float32"
    return Place(home, device, precision, Limits(home, engine.cache_gb, engine.cache))


def _device(wanted: str, slot: int) -> torch.device:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", slot % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = wanted.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise StorageError(f"engine.device: {wanted}, but torch {torch.__version__} sees no GPU here; use auto or cpu")
        if number and int(number) >= count:
            raise StorageError(f"engine.device: {wanted}, but there are {count} GPUs, cuda:0 to cuda:{count - 1}")
        return torch.device("cuda", int(number) if number else slot % count)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise StorageError("engine.device: mps, but torch sees no Apple GPU here; use auto or cpu")
    return torch.device(kind)
