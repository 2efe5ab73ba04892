"""What a computation needs of a GPU's memory. torch.cuda is replaced at its edge: no GPU is needed, and none was used."""

import math

import pytest
import torch

from tuner.core.device_memory import (
    available_main_memory,
    forget_peak,
    measure_need,
    needed_again,
    peak_bytes,
)

GPU = torch.device("cuda:0")


class Allocator:
    """Counts like torch's: what is allocated, and the most since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        self.peak = self.allocated

    def allocate(self, count: int) -> None:
        self.allocated += count
        self.peak = max(self.peak, self.allocated)


def test_a_need_is_measured_alone_and_the_peak_before_it_stays_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = Allocator(monkeypatch)
    forget_peak(GPU)
    for count in (900, -800):  # a training, of which 100 bytes stay
        allocator.allocate(count)

    def compute() -> str:
        for count in (50, -50, 30, -30):
            allocator.allocate(count)
        return "computed"

    assert measure_need(compute, GPU) == ("computed", 50)
    assert peak_bytes(GPU) == 900 and needed_again(GPU) == 800
    allocator.allocate(1000)
    assert peak_bytes(GPU) == 1100
    forget_peak(GPU)
    assert needed_again(GPU) == 0
    assert measure_need(compute, GPU)[1] == 50 and peak_bytes(GPU) == 1150


def test_a_cpu_counts_nothing() -> None:
    cpu = torch.device("cpu")
    assert measure_need(lambda: 3, cpu) == (3, 0) and needed_again(cpu) == 0
    assert 0 < available_main_memory() < math.inf
