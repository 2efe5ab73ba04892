"""`engine.per_gpu: auto`: the first trials say how many workers share a GPU."""

import math
from collections.abc import Sequence

from tuner.commands.session import Session
from tuner.engines._process_settings import cores
from tuner.jobs import Job, Outcome
from tuner.messages import GpuUse, TrialResult
from tuner.search.coordinator import Coordinator

MEMORY_IN_USE = 0.9  # of a GPU's memory, by all workers together
WELL_BUSY = 0.95  # share of the time; from here on a second worker would only wait
MAX_SHARING = 8  # workers on a GPU; more were never tried


def workers_on_gpu(uses: Sequence[GpuUse], gpus: int, core_count: float) -> int:
    """How many workers keep a GPU busy, fit its memory and have a core each.

    Args:
        uses: What single trials used of the GPUs that they had for themselves.
        gpus: How many GPUs there are.
        core_count: The cores for all workers together.
    """
    if not uses or any(use.busy is None for use in uses):
        return 1
    memory, busy = max(use.memory for use in uses), max(use.busy or 0.0 for use in uses)
    limits = (
        math.ceil(WELL_BUSY / max(busy, WELL_BUSY / MAX_SHARING)),
        math.floor(MEMORY_IN_USE / memory),
        math.floor(core_count / gpus),
    )
    return max(1, min(limits))


def measure_first_trials(session: Session, coordinator: Coordinator, gpus: int) -> int:
    """Carries out one trial on each GPU and returns how many workers there are from then on.

    Assignments that the session makes afterwards say how many workers share a GPU, which limits the
    memory of each. Where no trial was measured, a GPU stays with one worker.
    """
    uses: list[GpuUse] = []
    begun = 0

    def next_job() -> Job | None:
        nonlocal begun
        job = coordinator.next_job() if begun < gpus else None
        begun += job is not None
        return job

    def on_end(job: Job, outcome: Outcome) -> None:
        if isinstance(outcome.value, TrialResult) and outcome.value.gpu_use is not None:
            uses.append(outcome.value.gpu_use)
        coordinator.on_job_end(job, outcome)

    session.run_jobs(next_job, coordinator.report, on_end, session.go_on, gpus)
    count = workers_on_gpu(uses, gpus, cores())
    session.share_gpus(count)
    if uses:
        session.console.note(describe_sharing(uses, count))
    return gpus * count


def describe_sharing(uses: Sequence[GpuUse], count: int) -> str:
    """What was measured, and what follows."""
    memory = max(use.memory for use in uses)
    if any(use.busy is None for use in uses):
        return (
            "engine.per_gpu: auto cannot see how busy a GPU is: `pip install nvidia-ml-py`; one "
            "worker has each GPU"
        )
    busy = max(use.busy or 0.0 for use in uses)
    workers = "one worker has" if count == 1 else f"{count} workers share"
    return (
        f"a trial keeps its GPU busy {busy:.0%} of the time and needs {memory:.0%} of its memory; "
        f"{workers} each GPU"
    )
