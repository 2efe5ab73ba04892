"""How much of a GPU a training uses, for `engine.per_gpu: auto`."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

from tuner.core.device_memory import forget_peak, peak_bytes
from tuner.messages import Epoch, GpuUse
from tuner.preprocessing.resident_tensors import resident_bytes

SAMPLE_SECONDS = 0.25  # NVML's own figure is a mean over a sixth of a second to a second
CONTEXT_BYTES = 1 << 30  # of a process on a GPU beside its tensors: CUDA's context and libraries


class GpuMeter:
    """Looks in a thread how busy a GPU is; a context manager around a training.

    What counts is the time from the beginning of the first epoch to the end of the last: a training
    is prepared once, and epochs are many.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: list[tuple[float, float]] = []  # when, and the share of the time that is busy
        self.begin, self.end = float("inf"), 0.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "GpuMeter":
        forget_peak(self.device)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stopped.set()
        self.thread.join()

    def listening(self, report: Callable[[Epoch], bool]) -> Callable[[Epoch], bool]:
        """`report`, which tells the meter too when epochs began and ended."""

        def heard(epoch: Epoch) -> bool:
            self.end = time.monotonic()
            self.begin = min(self.begin, self.end - epoch.seconds)
            return report(epoch)

        return heard

    def _sample(self) -> None:
        while not self.stopped.wait(SAMPLE_SECONDS):
            try:
                busy = torch.cuda.utilization(self.device) / 100
            except (ModuleNotFoundError, RuntimeError):  # without NVML for Python, or without NVML
                return
            self.samples.append((time.monotonic(), busy))

    def use(self) -> GpuUse:
        """What the training used of the GPU.

        Copies of images and activations do not count as memory: they are given back where training
        needs the room.
        """
        total = torch.cuda.get_device_properties(self.device).total_memory
        needed = peak_bytes(self.device) - resident_bytes(self.device)
        busy = [share for moment, share in self.samples if self.begin <= moment <= self.end]
        return GpuUse(
            memory=min(1.0, (needed + CONTEXT_BYTES) / total),
            busy=sum(busy) / len(busy) if busy else None,
        )
