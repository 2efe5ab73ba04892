"""The device on which a run is carried out, its precision, and the limits of the cache."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.config.run import EngineSettings
from tuner.errors import StorageError
from tuner.training.activation_cache import CacheLimits
from tuner.training.data_parallel import ALONE, Ranks, joined_ranks

FIRST_TENSOR_CORES = (7, 0)  # compute capability of NVIDIA's Volta


@dataclass(frozen=True)
class DeviceContext:
    """Where and how a run is computed; `home` is the folder of caches and downloads."""

    home: Path
    device: torch.device
    precision: str  # float32, bfloat16 or float16
    cache_limits: CacheLimits
    micro_batches: int = 1  # per batch; more than 1 after an attempt had too little memory
    compiles_suffix: bool = False
    ranks: Ranks = ALONE  # the processes that train one model together

    def autocast(self) -> AbstractContextManager[None]:
        """A context of autocast to bfloat16 or float16; with float32 it changes nothing."""
        dtype = torch.float16 if self.precision == "float16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "float32")


def select_device(
    engine: EngineSettings, home: Path, slot: int = 0, micro_batches: int = 1
) -> DeviceContext:
    """The device of the worker in `slot`, from 0. The slots use the selected GPUs in turn, each of
    them one for each of its ranks.

    Raises:
        StorageError: The device that `engine` names is not there.
    """
    ranks = joined_ranks()
    gpus = select_gpus(engine)
    if gpus:
        device = torch.device("cuda", gpus[(slot * ranks.count + ranks.rank) % len(gpus)])
        _set_up_gpu(device)
        _limit_gpu_memory(engine, device, len(gpus))
    else:
        device = _select_device_without_gpu(engine.device)
    precision = _fast_precision(device) if engine.precision == "auto" else engine.precision
    limits = CacheLimits(home, engine.cache_gb, engine.cache)
    compiles_suffix = engine.compile == "suffix"
    return DeviceContext(home, device, precision, limits, micro_batches, compiles_suffix, ranks)


def _set_up_gpu(device: torch.device) -> None:
    """Settings of the process that make a GPU faster.

    The GPU becomes the current one, on which code of others computes that names none. Products of
    float32 matrices use TF32, as cuDNN's convolutions do by default; cuDNN measures once for each
    shape which of its algorithms is the fastest, since images have few shapes here.
    """
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def _fast_precision(device: torch.device) -> str:
    """The precision of autocast that a device computes fast."""
    if device.type != "cuda":
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    has_tensor_cores = torch.cuda.get_device_capability(device) >= FIRST_TENSOR_CORES
    return "float16" if has_tensor_cores else "float32"


def select_gpus(engine: EngineSettings) -> tuple[int, ...]:
    """The numbers of the GPUs to use; none on another device.

    Raises StorageError when a named GPU is not there, or when there are too few for one trial.
    """
    selected = _named_gpus(engine)
    needed = engine.rank_count
    if needed > max(1, len(selected)) and engine.device != "cpu":
        seen = "no GPU" if not selected else f"{len(selected)} GPU{'s'[: len(selected) != 1]}"
        raise StorageError(
            f"engine.gpus_per_trial: {needed}, but torch {torch.__version__} has {seen} to use "
            "here; write a smaller number, or leave gpus_per_trial out"
        )
    return selected


def _named_gpus(engine: EngineSettings) -> tuple[int, ...]:
    """The numbers of the GPUs that the engine may use. Raises StorageError."""
    kind, _, number = engine.device.partition(":")
    if kind not in ("auto", "cuda"):
        return ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and kind == "cuda":
        raise StorageError(
            f"engine.device: {engine.device}, but torch {torch.__version__} sees no GPU here; "
            "use auto or cpu"
        )
    if count == 0 and engine.gpus is not None:
        raise StorageError(
            f"engine.gpus: {engine.gpus}, but torch {torch.__version__} sees no GPU here; "
            "leave gpus out"
        )
    if number:
        selected = [int(number)]
    elif isinstance(engine.gpus, list):
        selected = engine.gpus
    else:
        selected = list(range(engine.gpus or count))
    if max(selected, default=-1) >= count:
        setting = f"device: {engine.device}" if number else f"gpus: {engine.gpus}"
        available = "1 GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise StorageError(f"engine.{setting}, but torch sees {available}")
    return tuple(selected)


def _limit_gpu_memory(engine: EngineSettings, device: torch.device, count: int) -> None:
    """Limits a worker that shares its GPU to its share of the memory.

    A worker that runs out of memory has then used too much itself; its neighbour did not cause it.
    A worker that is alone gets the whole memory, also where it shared the GPU before.
    """
    # the workers of the other engines are not all on this machine
    is_local = engine.name == "local"
    workers = engine.workers if is_local and isinstance(engine.workers, int) else 1
    sharing = max(engine.gpu_sharing, math.ceil(workers * engine.rank_count / count))
    if sharing > 1 or is_local:  # Ray limits its slots itself
        torch.cuda.set_per_process_memory_fraction(1 / sharing, device)


def _select_device_without_gpu(name: str) -> torch.device:
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise StorageError("engine.device: mps, but torch sees no Apple GPU here; use auto or cpu")
    return torch.device(name)
