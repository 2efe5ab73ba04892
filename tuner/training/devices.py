"""The device a run is carried out on, its precision, and the cache beside it."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.config.run import EngineSettings
from tuner.errors import StorageError
from tuner.training.activation_cache import CacheLimits


@dataclass(frozen=True)
class DeviceContext:
    home: Path
    device: torch.device
    precision: str  # float32 or bfloat16
    cache_limits: CacheLimits
    micro_batches: int = 1  # in so many a batch is taken, for lack of memory

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 autocast where the precision says so; otherwise nothing changes."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )


def select_device(
    engine: EngineSettings, home: Path, slot: int = 0, micro_batches: int = 1
) -> DeviceContext:
    """Where the worker in `slot` computes: the GPUs in use are dealt out in turn. Raises StorageError when the device asked for is not there."""
    found = select_gpus(engine)
    device = (
        torch.device("cuda", found[slot % len(found)])
        if found
        else _select_other_device(engine.device)
    )
    if found:
        _limit_gpu_memory(engine, device, len(found))
    precision = engine.precision
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float32"
    return DeviceContext(
        home, device, precision, CacheLimits(home, engine.cache_gb, engine.cache), micro_batches
    )


def select_gpus(engine: EngineSettings) -> tuple[int, ...]:
    """The numbers of the GPUs in use; none where the device is another. Raises StorageError when one asked for is not there."""
    kind, _, number = engine.device.partition(":")
    if kind not in ("auto", "cuda"):
        return ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and kind == "cuda":
        raise StorageError(
            f"engine.device: {engine.device}, but torch {torch.__version__} sees no GPU here; use auto or cpu"
        )
    if count == 0 and engine.gpus is not None:
        raise StorageError(
            f"engine.gpus: {engine.gpus}, but torch {torch.__version__} sees no GPU here; leave gpus out"
        )
    if number:
        wanted = [int(number)]
    elif isinstance(engine.gpus, list):
        wanted = engine.gpus
    else:
        wanted = list(range(engine.gpus or count))
    if max(wanted, default=-1) >= count:
        asked = f"device: {engine.device}" if number else f"gpus: {engine.gpus}"
        there = "1 GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise StorageError(f"engine.{asked}, but torch sees {there}")
    return tuple(wanted)


def _limit_gpu_memory(engine: EngineSettings, device: torch.device, count: int) -> None:
    """Keeps a worker that shares its GPU within its part: out of memory is then its own doing, and not its neighbour's.

    One that is alone gets the whole, also where it shared it before.
    """
    workers = (
        engine.workers if isinstance(engine.workers, int) and engine.name == "local" else 1
    )  # elsewhere not all of them are here
    sharing = max(engine.per_gpu, math.ceil(workers / count))
    if sharing > 1 or engine.name == "local":  # Ray's slots know their part themselves
        torch.cuda.set_per_process_memory_fraction(1 / sharing, device)


def _select_other_device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise StorageError("engine.device: mps, but torch sees no Apple GPU here; use auto or cpu")
    return torch.device(wanted)
