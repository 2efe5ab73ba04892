"""`engine.per_gpu: auto`: what the first trials use decides how many workers share a GPU. The engine is one without training or GPUs."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.instant_engine import carry_out_without_training, make_coordinator
from tuner.commands.console import Console
from tuner.commands.gpu_sharing import measure_first_trials, workers_on_gpu
from tuner.commands.session import Folders, Session
from tuner.commands.signals import StopSignal
from tuner.config import parsing
from tuner.jobs import Job, Outcome
from tuner.messages import GpuUse


@pytest.mark.parametrize(
    ("uses", "gpus", "cores", "workers"),
    [
        ([GpuUse(0.1, 0.3)], 1, 16, 4),  # busy
        ([GpuUse(0.1, 0.01)], 1, 64, 8),  # never more
        ([GpuUse(0.4, 0.1)], 1, 16, 2),  # memory
        ([GpuUse(0.1, 0.3)], 4, 8, 2),  # cores
        ([GpuUse(0.7, 0.3)], 1, 16, 1),
        ([GpuUse(0.1, 0.97)], 1, 16, 1),
        ([GpuUse(0.1, 0.2), GpuUse(0.1, 0.5)], 2, 16, 2),  # the largest decides
        ([GpuUse(0.1, None)], 1, 16, 1),
        ([], 1, 16, 1),
    ],
)
def test_as_many_share_a_gpu_as_it_has_time_memory_and_cores_for(
    uses: list[GpuUse], gpus: int, cores: float, workers: int
) -> None:
    assert workers_on_gpu(uses, gpus, cores) == workers


class Notes(Console):
    def __init__(self) -> None:
        super().__init__("quiet")
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("busy", "sharing", "said"),
    [
        (0.4, 3, "busy 40% of the time and needs 10% of its memory; 3 workers share each GPU"),
        (None, 1, "`pip install nvidia-ml-py`; one worker has each GPU"),
    ],
)
def test_the_first_trials_are_measured_alone_and_the_others_share(
    busy: float | None,
    sharing: int,
    said: str,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tuner.commands.gpu_sharing.cores", lambda: 16.0)
    space = parsing.load_space(small, ["engine={name: local, per_gpu: auto}", "search.trials=9"])
    coordinator, begun = make_coordinator(space), []

    def run_jobs(
        next_job: Any, on_report: Any, on_end: Any, should_continue: Any, workers: int
    ) -> None:
        assert workers == 2  # one for each GPU
        while (job := next_job()) is not None:
            begun.append(job.number)
            on_end(job, measured(job))

    def measured(job: Job) -> Outcome:
        outcome = carry_out_without_training(coordinator, job)
        object.__setattr__(outcome.value, "gpu_use", GpuUse(0.1, busy))
        return outcome

    console = Notes()
    session = Session(space, Folders(small, small), console, run_jobs, StopSignal(grace=1.0))
    assert measure_first_trials(session, coordinator, 2) == 2 * sharing
    assert begun == [0, 1] and coordinator.budget_used == 2
    assert session.make_assignment(space.make_run({})).engine.per_gpu == sharing
    assert [note.endswith(said) for note in console.notes] == [True]
