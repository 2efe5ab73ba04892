"""Which errors mean that the memory ran out: these halve the batch, and end a trial as out of memory; others do not."""

import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.messages import Assignment, Epoch
from tuner.training import worker_jobs
from tuner.training.micro_batches import MicroBatchSize, is_out_of_memory, retry_on_oom

OUT_OF_MEMORY: list[RuntimeError] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB, max allowed: 18.13 GB)."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
]  # fmt: skip
OTHER = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[-40:])
def test_whoever_runs_out_of_memory_the_batch_is_halved(error: RuntimeError) -> None:
    sizes = []

    def compute() -> Tensor:
        sizes.append(min(8, size.value))
        if size.value > 2:
            raise error
        return torch.zeros(())

    size = MicroBatchSize(9)
    retry_on_oom(compute, size, 8)
    assert sizes == [8, 4, 2] and len(size.notes) == 2


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_are_not_taken_for_it(error: RuntimeError) -> None:
    assert not is_out_of_memory(error)


class Failing(nn.Module):
    """Passes on what it is given, but raises `error` while it is trained."""

    error: RuntimeError

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise self.error
        return x


def failing(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Failing(), nn.Linear(3 * 32 * 32, outputs))


class Counted(nn.Linear):
    """A layer that is in `trained` as long as it lives, once it was trained."""

    trained: ClassVar["weakref.WeakSet[Counted]"] = weakref.WeakSet()

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.trained.add(self)
        return super().forward(input)


def counted(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Counted(3 * 32 * 32, outputs))


def test_after_a_trial_torch_reserves_no_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    def hear(epoch: Epoch) -> bool:
        trained.append(len(Counted.trained))
        return True

    # called when the memory of the model is free: then there is something to give back
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: trained.append(len(Counted.trained)))
    document = yaml_document.parse_document(SMALL, "small.yaml")
    document.content["model"] = "tests.training.test_micro_batches:counted"
    space = parsing.parse_space(document)
    assignment = Assignment(space.make_run({}), "accuracy", space.settings.engine, str(tmp_path))
    forgotten: list[torch.device] = []
    monkeypatch.setattr(worker_jobs, "forget_peak", forgotten.append)
    assert worker_jobs.run_trial(assignment, hear, 0).state == "complete"
    assert forgotten == [torch.device("cpu")]  # what the trial before needed
    assert set(trained[:-1]) == {1} and trained[-1] == 0


def test_a_trial_for_which_nothing_fits_ends_with_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.AcceleratorError("CUDA error: out of memory\nand what else CUDA has to say")
    monkeypatch.setattr(Failing, "error", error, raising=False)
    document = yaml_document.parse_document(SMALL, "small.yaml")
    document.content["model"] = "tests.training.test_micro_batches:failing"
    space = parsing.parse_space(document)
    assignment = Assignment(space.make_run({}), "accuracy", space.settings.engine, str(tmp_path))
    result = worker_jobs.run_trial(assignment, lambda _: True, 0)
    assert (result.state, result.reason) == ("oom", "CUDA error: out of memory")
