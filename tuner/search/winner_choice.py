"""Which trial wins a search whose best trials are not repeated.

The best of many trials is partly the best by the luck of the validation examples that chose it. So
the default recipe wins where the best trial is not better by more than the noise of these examples.
This is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984); the
default recipe is the simplest choice, because it needs no search.
"""

from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from tuner.config import plugins
from tuner.config.space import Space
from tuner.search import history
from tuner.search.retraining import count_for_noise, difference_noise


@dataclass(frozen=True)
class WinnerChoice:
    """The winner, and why.

    `tied_numbers`: the trials with the winner's value. `beaten`: the best trial, where the default
    recipe wins because it is as good within `noise`; otherwise None.
    """

    winner: FrozenTrial
    tied_numbers: list[int]
    beaten: FrozenTrial | None = None
    noise: float = 0.0


def choose_unconfirmed(study: optuna.Study, space: Space) -> WinnerChoice:
    """The best trial, or the default recipe where that is as good within the noise of the
    validation examples.

    The noise follows from the number of examples for the scores that a task names in COUNTED. For
    other scores, in a study of an earlier version and with `search.winner: best`, the best trial
    wins.

    Raises NoUsableTrial.
    """
    best, tied = history.best_trial(study)
    default = history.default_trial(study)
    metric = str(space.settings.search.metric)
    run = history.run_of_trial(space, study, best)
    if (
        space.settings.search.winner == "best"
        or default is None
        or default.number in (best.number, *tied)
        or study.direction != StudyDirection.MAXIMIZE
        or metric not in plugins.read_task_names(run.task.name, "COUNTED")
    ):
        return WinnerChoice(best, tied)
    noise = difference_noise(float(best.value or 0), count_for_noise(study, run, metric))
    if float(best.value or 0) - float(default.value or 0) > noise:
        return WinnerChoice(best, tied)
    return WinnerChoice(default, [], best, noise)
