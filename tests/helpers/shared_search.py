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

from tests.helpers.instant_engine import Silent, quality, space
from tuner.jobs import Job, Outcome
from tuner.messages import Assignment, Epoch, Result
from tuner.search import leases, postgresql, storage
from tuner.search.coordinator import Coordinator
from tuner.search.samplers import PRUNERS

SHORT = {"VALID": 3.0, "RENEWAL": 0.5}


def carry_out(c: Coordinator, job: Job, pause: float) -> Outcome:
    """What a worker would do, and how long it would take, without training."""
    run = job.argument.run
    epochs: list[Epoch] = []
    for number in range(1, run.recipe.epochs + 1):
        time.sleep(pause)
        epochs.append(
            Epoch(number, 1.0, {"accuracy": quality(run) * number / run.recipe.epochs}, pause)
        )
        if not c.report(job, epochs[-1]):
            return Outcome("done", Result("stopped", tuple(epochs), number, {}, pause))
    return Outcome("done", Result("complete", tuple(epochs), len(epochs), {}, pause))


@contextlib.contextmanager
def sharing(
    url: str,
    folder: Path,
    trials: int,
    name: str = "t",
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Coordinator]:
    """A coordinator among others."""
    database = storage.connect(url, folder, tell)
    place = postgresql.of(database)
    assert place is not None
    s = space(trials=trials, sampler="random", pruner="none")
    sampler, pruner = optuna.samplers.RandomSampler(), PRUNERS["none"](3)
    try:
        study = place.exclusively(
            0, lambda: storage.open_study(database, name, sampler, pruner, {}, "data")
        )
        with leases.leased(place, study._study_id, folder) as lease:
            yield Coordinator(
                study,
                s,
                lambda run: Assignment(run, "accuracy", s.settings.engine, "home"),
                Silent(),
                lambda: False,
                lease,
            )
    finally:
        storage.close(database)


def main(url: str, folder: str, trials: str, pause: str) -> None:
    for name, value in SHORT.items():
        setattr(leases, name, value)
    postgresql.STALLED = 3
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def tell(**words: object) -> None:
        print(json.dumps(words), flush=True)

    with sharing(url, Path(folder), int(trials), tell=lambda text: tell(told=text)) as c:
        tell(begun=c.closed)
        while True:
            while (job := c.next_job()) is not None:
                tell(carries=job.number)
                c.ended(job, carry_out(c, job, float(pause)))
            if not c.waits():
                break
            time.sleep(0.1)
        other = c.leases.crown(0)
        if other is None:
            c.leases.crowned()
        tell(closed=c.closed, crowns=other is None, error=str(c.error or ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
