"""How long a search will take, before it begins: studies are drawn at random from the space.

The sampler of a real search prefers what scores well, and its pruner ends some trials early, so a
real study lies within the spread of the drawn ones, seldom above it.
"""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import optuna

from tuner.config.run import Run
from tuner.config.space import Space
from tuner.search.confirmation import settings_for

DRAWN_RUNS, DRAWN_STUDIES = 200, 400


@dataclass(frozen=True)
class StudyCost:
    """Seconds: the middle of the drawn studies, and the ends of the middle 80 % of them."""

    middle: float
    low: float
    high: float


def draw_runs(space: Space, count: int = DRAWN_RUNS, seed: int = 0) -> list[Run]:
    """Runs drawn at random from a space; of one without ranges, its only run."""
    if not space.dimensions:
        return [space.sample(None)]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.sample(study.ask()) for _ in range(count)]


@dataclass(frozen=True)
class ExpectedCost:
    """Mean seconds of work: of the trials, and of the trainings after them."""

    trials: float
    after: float


def expect_study(
    space: Space, costs: list[float], default: float, trials: int, trials_left: float
) -> ExpectedCost:
    """The mean of what `estimate_study` draws, for the rest of a search.

    Args:
        space: The space.
        costs: The seconds of the trainings of runs drawn from it.
        default: The seconds of the default recipe's training.
        trials: The number of trials of the search.
        trials_left: How many of them are left.
    """
    search, mean = space.settings.search, statistics.fmean(costs)
    confirm = settings_for(search, trials)
    repeats = min(trials, confirm.top) * confirm.repeats if confirm else 0
    after = repeats * mean
    if search.retrain:
        after += mean + (default if search.compare == "default" else 0.0)
    return ExpectedCost(trials_left * mean, after)


def estimate_study(
    space: Space,
    runs: list[Run],
    first_runs: list[Run],
    trials: int,
    seconds_of: Callable[[Run], float],
    workers: int = 1,
) -> StudyCost:
    """The seconds of trials, repeats, and the trainings of winner and default recipe.

    Args:
        space: The space.
        runs: Runs drawn from it.
        first_runs: The runs with which every study begins; the last is the default recipe.
        trials: The number of trials.
        seconds_of: The seconds of a run's training.
        workers: How many trials are carried out at once.
    """
    search = space.settings.search
    costs = [seconds_of(run) for run in runs]
    first = [seconds_of(run) for run in first_runs[:trials]]
    confirm = settings_for(search, trials)
    draw = random.Random(0)
    totals = []
    for _ in range(DRAWN_STUDIES):
        drawn = first + [draw.choice(costs) for _ in range(trials - len(first))]
        repeated = draw.sample(drawn, min(len(drawn), confirm.top)) if confirm else []
        repeats = sum(repeated) * (confirm.repeats if confirm else 0)
        winner = draw.choice(drawn) if search.retrain else 0.0
        default = first[-1] if search.retrain and search.compare == "default" else 0.0
        totals.append((sum(drawn) + repeats) / workers + winner + default)
    tenths = statistics.quantiles(totals, n=10)
    return StudyCost(statistics.median(totals), tenths[0], tenths[-1])
