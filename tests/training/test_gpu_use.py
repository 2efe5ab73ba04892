"""What a trial used of its GPU. torch.cuda is replaced at its edge: no GPU is needed, and none was used."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.tiny_tasks import TINY_TASKS
from tuner.config.run import EngineSettings
from tuner.messages import Assignment, Epoch, GpuUse
from tuner.training import gpu_use, worker_jobs
from tuner.training.gpu_use import CONTEXT_BYTES, GpuMeter

GPU = torch.device("cuda:0")


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What NVML says, one after the other; the last stays. The GPU has 80 GiB, and 7 were used."""
    says: list[Any] = [30]

    def utilization(device: torch.device) -> float:
        now = says.pop(0) if len(says) > 1 else says[0]
        if isinstance(now, Exception):
            raise now
        return float(now)

    monkeypatch.setattr(gpu_use, "SAMPLE_SECONDS", 0.005)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * CONTEXT_BYTES)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=80 * CONTEXT_BYTES),
    )
    return says


def test_the_epochs_count_and_what_is_before_and_after_them_does_not(busy: list[Any]) -> None:
    busy[:] = [0]
    with GpuMeter(GPU) as meter:
        time.sleep(0.05)
        busy[:] = [60]
        time.sleep(0.05)
        assert meter.listening(lambda epoch: False)(Epoch(1, 1.0, {}, 0.04)) is False
        busy[:] = [0]
        time.sleep(0.05)
    use = meter.use()
    assert use.busy == pytest.approx(0.6, abs=0.15) and use.memory == 0.1


def test_without_nvml_nothing_is_said_of_it(busy: list[Any]) -> None:
    busy[:] = [ModuleNotFoundError("pynvml does not seem to be installed")]
    with GpuMeter(GPU) as meter:
        time.sleep(0.02)
        meter.listening(lambda epoch: True)(Epoch(1, 1.0, {}, 0.02))
    assert meter.use().busy is None and not meter.thread.is_alive()


def test_a_trial_tells_what_it_used_where_the_file_asks_for_it(
    busy: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is a real one on the CPU; only the meter is told that it is on a GPU."""
    select = worker_jobs.select_device
    monkeypatch.setattr(
        worker_jobs,
        "select_device",
        lambda engine, home, slot, *rest: (
            select(engine, home, slot, *rest) if rest else SimpleNamespace(device=GPU)
        ),
    )
    run = TINY_TASKS["classification"].make_run(tmp_path)
    for per_gpu, measured in (("auto", True), (1, False)):
        engine = EngineSettings.model_validate({"device": "cpu", "per_gpu": per_gpu})
        assignment = Assignment(run, "accuracy", engine, str(tmp_path / "home"))
        result = worker_jobs.run_trial(assignment, lambda epoch: True, 0)
        assert result.state == "complete" and (result.gpu_use is not None) == measured
        if result.gpu_use is not None:
            assert result.gpu_use == GpuUse(0.1, pytest.approx(0.3))
