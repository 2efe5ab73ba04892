"""How the GPU kit measures: synchronised clocks, arms that take turns, peak memory, busy time; and what a row says.

On a CPU everything has a stand-in, so that each row runs there through the same code: nothing to synchronise, the
resident set for the memory of the GPU, operators for kernels.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")
RESET_PEAK = "5"  # what /proc/self/clear_refs takes to forget the peak of the resident set


@dataclass(frozen=True)
class Setup:
    """Where the kit runs, and whether in full or in miniature. `folder` holds data and caches meanwhile."""

    device: torch.device
    small: bool
    folder: Path

    def pick(self, full: Value, small: Value) -> Value:
        """The size of something."""
        return small if self.small else full

    @property
    def home(self) -> Path:
        """TUNER_HOME: the caches, shared by all rows."""
        return self.folder / "home"


@dataclass(frozen=True)
class Figure:
    """One ratio of a row, with the two things that it compares.

    `goal` is what the ratio must not exceed, or with `at_least` must not fall below; None where a goal belongs to
    another figure of the row. `tuner` and `plain` are the measured values, in `unit`.
    """

    what: str
    ratio: float
    goal: float | None
    unit: str
    tuner: Sequence[float]
    plain: Sequence[float]
    at_least: bool = False
    notes: str = ""

    @property
    def verdict(self) -> str:
        if not math.isfinite(self.ratio):
            return "failed: not a number"
        if self.goal is None:
            return "no goal"
        reached = self.ratio >= self.goal if self.at_least else self.ratio <= self.goal
        return "reached" if reached else "missed"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class RowResult:
    """What became of a row: `measured`, or why it was `skipped` or `failed`."""

    name: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    figures: Sequence[Figure] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "figures": [figure.to_dict() for figure in self.figures]}


# -- time


def synchronize(device: torch.device) -> None:
    """Waits for all that the device was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(epochs: Iterator[Any], device: torch.device) -> Iterator[float]:
    """The seconds that each item of `epochs` takes, on an idle device and until it is idle again."""
    while True:
        synchronize(device)
        start = time.perf_counter()
        try:
            next(epochs)
        except StopIteration:
            return
        synchronize(device)
        yield time.perf_counter() - start


def take_turns(
    arms: Mapping[str, Iterator[float]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """The values of each arm. The arms take turns, in the opposite order each time; the first turns do not count."""
    values: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup + repeats):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            values[name].append(next(arms[name]))
    return {name: found[warmup:] for name, found in values.items()}


@contextlib.contextmanager
def plain_settings() -> Iterator[None]:
    """The switches that anyone sets who times a loop on a GPU; afterwards they are what `tuner` left them at."""
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def under_plain_settings(epochs: Iterator[Value]) -> Iterator[Value]:
    """Each item of a plain arm, made under `plain_settings`."""
    while True:
        with plain_settings():
            try:
                value = next(epochs)
            except StopIteration:
                return
        yield value


def compare(
    what: str,
    tuner: Sequence[float],
    plain: Sequence[float],
    goal: float | None,
    unit: str,
    **more: Any,
) -> Figure:
    """The figure of two arms: the ratio of their medians."""
    ratio = statistics.median(tuner) / statistics.median(plain)
    return Figure(what, ratio, goal, unit, tuner, plain, **more)


# -- memory


def release() -> None:
    """Frees what a row leaves behind, so that the next one begins like the first."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Forgets the peak of the memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)


def peak_bytes(device: torch.device) -> int:
    """The most memory since `reset_peak`: of the GPU's tensors, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def pixel_bytes(device: torch.device) -> int:
    """The bytes of all uint8 tensors on the device: the pixels that are kept there between the epochs.

    Nothing else in a training is uint8. Each storage counts once, however many tensors look at it.
    """
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device == device and thing.dtype == torch.uint8:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# -- the share of the time in which the device computes


def busy_share(intervals: Iterable[tuple[float, float]], start: float, stop: float) -> float:
    """The share of start..stop that the intervals cover together; where several overlap, it counts once."""
    covered, end = 0.0, start
    for begin, finish in sorted(intervals):
        later, sooner = max(begin, end), min(finish, stop)
        if sooner > later:
            covered += sooner - later
            end = sooner
    return covered / (stop - start)


def profiled_busy_share(epochs: Iterator[Any], device: torch.device) -> float:
    """The share of the next item's time in which a kernel runs, by torch's profiler (on a CPU: an operator)."""
    is_gpu = device.type == "cuda"
    activity = (
        torch.profiler.ProfilerActivity.CUDA if is_gpu else torch.profiler.ProfilerActivity.CPU
    )
    kind = torch.autograd.DeviceType.CUDA if is_gpu else torch.autograd.DeviceType.CPU
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        start = time.perf_counter()
        next(epochs)
        synchronize(device)
        seconds = time.perf_counter() - start
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or []
        if event.device_type == kind and not event.is_user_annotation
        if not event.name.startswith("Mem")  # Memcpy, Memset: a copy is no computing
    ]
    if not spans:
        return math.nan
    # the profiler's clock is another one, so the time is laid over the kernels: what lies between the clock's start
    # and the first kernel is the device's idle time too
    first, last = min(begin for begin, _ in spans), max(finish for _, finish in spans)
    microseconds = max(seconds * 1e6, last - first)
    return busy_share(spans, first, last) * (last - first) / microseconds


def sampled_busy_share(epochs: Iterator[Any], device: torch.device, items: int) -> float | None:
    """The mean of what NVML says of the GPU during some items, in 0..1; None where NVML cannot be asked.

    NVML's figure is the share of its last sample period (up to a second) in which a kernel ran; the values of the
    first second are left out.
    """
    import threading

    try:
        torch.cuda.utilization(device)
    except (
        Exception
    ):  # no pynvml, no driver, no right to ask: each has its own error, and the profiler is left
        return None
    samples: list[tuple[float, int]] = []
    done = threading.Event()
    start = time.perf_counter()

    def sample() -> None:
        while not done.wait(0.05):
            samples.append((time.perf_counter() - start, torch.cuda.utilization(device)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    for _ in range(items):
        next(epochs)
    synchronize(device)
    done.set()
    thread.join()
    later = [percent / 100 for at, percent in samples if at >= 1.0]
    return statistics.mean(later) if later else None
