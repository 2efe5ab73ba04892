"""How long a search will take, before it begins: studies are drawn at random from the space.

The sampler of a real search prefers what scores well, which is mostly what trains long: more
epochs, fewer frozen stages. So once it has trials to learn from, the dearer of two drawn runs is
counted (benchmarks/README.md, "What `tuner plan` foretells"). What the pruner saves is not.
"""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import optuna

from tuner.config.run import Run
from tuner.config.space import Space
from tuner.search.confirmation import settings_for
from tuner.search.samplers import startup_count

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
    search = space.settings.search
    learned = min(trials_left, learned_count(space, trials))
    mean, dearer = statistics.fmean(costs), mean_of_dearer(costs)
    confirm = settings_for(search, trials)
    repeats = min(trials, confirm.top) * confirm.repeats if confirm else 0
    usual = dearer if learned_count(space, trials) else mean  # of the best trials
    after = repeats * usual
    if search.retrain:
        after += usual + (default if search.compare == "default" else 0.0)
    return ExpectedCost((trials_left - learned) * mean + learned * dearer, after)


def learned_count(space: Space, trials: int) -> int:
    """How many of so many trials a sampler proposes that has learned from others."""
    return max(0, trials - startup_count(trials)) if space.settings.search.sampler == "tpe" else 0


def mean_of_dearer(costs: list[float]) -> float:
    """The mean of the greater of two costs that are drawn from these."""
    total = sum((2 * rank + 1) * cost for rank, cost in enumerate(sorted(costs)))
    return total / len(costs) ** 2


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
    learned = min(trials - len(first), learned_count(space, trials))
    draw = random.Random(0)
    totals = []
    for _ in range(DRAWN_STUDIES):
        drawn = first + [draw.choice(costs) for _ in range(trials - len(first) - learned)]
        drawn += [max(draw.choice(costs), draw.choice(costs)) for _ in range(learned)]
        repeated = draw.sample(drawn, min(len(drawn), confirm.top)) if confirm else []
        repeats = sum(repeated) * (confirm.repeats if confirm else 0)
        winner = draw.choice(drawn) if search.retrain else 0.0
        default = first[-1] if search.retrain and search.compare == "default" else 0.0
        totals.append((sum(drawn) + repeats) / workers + winner + default)
    tenths = statistics.quantiles(totals, n=10)
    return StudyCost(statistics.median(totals), tenths[0], tenths[-1])
