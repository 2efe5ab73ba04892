"""A coordinator in a process of its own, whose trials take a moment and train nothing: `python -m tests.helpers.shared_search URL FOLDER TRIALS SECONDS`.

Prints a line per trial that it carried out, and what it found when the budget was spent.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna

from tests.helpers.instant_engine import RecordingListener, make_space, score_of_run
from tuner.jobs import Job, Outcome
from tuner.messages import Assignment, Epoch, TrialResult
from tuner.search import leases, postgresql, storage
from tuner.search.coordinator import Coordinator
from tuner.search.pruners import PRUNERS

SHORT_LEASES = {"LEASE_SECONDS": 3.0, "RENEWAL_SECONDS": 0.5}


def run_job_slowly(c: Coordinator, job: Job, pause: float) -> Outcome:
    """What a worker would do, and how long it would take, without training."""
    run = job.argument.run
    epochs: list[Epoch] = []
    for number in range(1, run.recipe.epochs + 1):
        time.sleep(pause)
        epochs.append(
            Epoch(number, 1.0, {"accuracy": score_of_run(run) * number / run.recipe.epochs}, pause)
        )
        if not c.report(job, epochs[-1]):
            return Outcome("done", TrialResult("stopped", tuple(epochs), number, {}, pause))
    return Outcome("done", TrialResult("complete", tuple(epochs), len(epochs), {}, pause))


@contextlib.contextmanager
def shared_coordinator(
    url: str,
    folder: Path,
    trials: int,
    name: str = "t",
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Coordinator]:
    """A coordinator among others."""
    database = storage.open_storage(url, folder, tell)
    place = postgresql.postgres_storage_of(database)
    assert place is not None
    s = make_space(trials=trials, sampler="random", pruner="none")
    sampler, pruner = optuna.samplers.RandomSampler(), PRUNERS["none"](3)
    try:
        study = place.run_exclusively(
            0, lambda: storage.open_study(database, name, sampler, pruner, {}, "data")
        )
        with leases.join_coordination(place, study._study_id, folder) as lease:
            yield Coordinator(
                study,
                s,
                lambda run: Assignment(run, "accuracy", s.settings.engine, "home"),
                RecordingListener(),
                lambda: False,
                lease,
            )
    finally:
        storage.close_storage(database)


def main(url: str, folder: str, trials: str, pause: str) -> None:
    for name, value in SHORT_LEASES.items():
        assert getattr(leases, name)
        setattr(leases, name, value)
    postgresql.STALLED_SECONDS = 3
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def tell(**words: object) -> None:
        print(json.dumps(words), flush=True)

    with shared_coordinator(url, Path(folder), int(trials), tell=lambda text: tell(told=text)) as c:
        tell(begun=c.budget_used)
        while True:
            while (job := c.next_job()) is not None:
                tell(carries=job.number)
                c.on_job_end(job, run_job_slowly(c, job, float(pause)))
            if not c.waits_for_others():
                break
            time.sleep(0.1)
        other = c.coordination.claim_winner(0)
        if other is None:
            c.coordination.mark_winner_made()
        tell(closed=c.budget_used, crowns=other is None, error=str(c.fatal_error or ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
