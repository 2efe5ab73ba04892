"""The samplers by their YAML names.

Each proposal gets a sampler with a seed of its own. So a proposal depends on the study's history
and not on the process that asks for it.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tuner.search.quasi_random import sobol_point

MIN_STARTUP, MAX_STARTUP = 4, 10  # trials


@dataclass(frozen=True)
class Startup:
    """How TPE begins: its startup trials, before there are trials to learn from.

    Attributes:
        trials: How many trials must have ended before TPE learns from them.
        point: What a proposal takes until then: for each parameter, where in its domain its value
            lies, in [0, 1).
    """

    trials: int = 0
    point: Mapping[str, float] = field(default_factory=dict)


def startup_count(budget: int) -> int:
    """How many of a search's trials end before TPE learns from them: a fifth, but 4 to 10."""
    return min(max(budget // 5, MIN_STARTUP), MAX_STARTUP)


def make_startup(budget: int, names: Sequence[str], seed: int, index: int) -> Startup:
    """Return how TPE begins in a search, for one of its proposals.

    Args:
        budget: The number of trials of the search.
        names: The names of the parameters of the space.
        seed: The seed of the search.
        index: The number of the proposal, from 0 for the first one that the sampler makes.
    """
    return Startup(
        startup_count(budget), dict(zip(names, sobol_point(index, len(names), seed), strict=True))
    )


def _make_tpe(seed: int, startup: Startup) -> BaseSampler:
    tpe = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
    return QuasiRandomStartup(tpe, startup)


# name -> a function from the seed of a proposal and the startup of the search to a sampler
SAMPLERS: Mapping[str, Callable[[int, Startup], BaseSampler]] = {
    "tpe": _make_tpe,
    "random": lambda seed, startup: optuna.samplers.RandomSampler(seed=seed),
    # the coordinator enqueues the points of the grid, so this sampler has nothing to choose
    "grid": lambda seed, startup: optuna.samplers.RandomSampler(seed=seed),
}


class QuasiRandomStartup(BaseSampler):
    """A sampler of one proposal that takes a given point while few trials have ended.

    Optuna's QMCSampler is not used, because it counts its points in the study (a killed search
    would go on with others) and needs all trials to have the same parameters.
    """

    def __init__(self, sampler: BaseSampler, startup: Startup) -> None:
        self.sampler, self.startup = sampler, startup
        # decided once for a trial, since others may end while its parameters are asked for
        self.in_startup: bool | None = None

    def is_in_startup(self, study: optuna.Study) -> bool:
        if self.in_startup is None:
            states = (TrialState.COMPLETE, TrialState.PRUNED)
            ended = len(study.get_trials(deepcopy=False, states=states))
            self.in_startup = ended < self.startup.trials
        return self.in_startup

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self.is_in_startup(study):
            return {}
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        if self.is_in_startup(study):
            return {}
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        coordinate = self.startup.point.get(param_name)
        if coordinate is None or not self.is_in_startup(study):
            return self.sampler.sample_independent(study, trial, param_name, param_distribution)
        return value_at(coordinate, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self.sampler.after_trial(study, trial, state, values)


def value_at(coordinate: float, distribution: BaseDistribution) -> Any:
    """Return the value at a coordinate in [0, 1) of a distribution.

    Equally long parts of [0, 1) have equal shares of the values, on a logarithmic scale where the
    distribution has one.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(coordinate * len(distribution.choices))]
    if not isinstance(distribution, (FloatDistribution, IntDistribution)):
        raise TypeError(f"{distribution} has no coordinates")
    low, high = distribution.low, distribution.high
    if distribution.log:
        # whole numbers have half of their distance to the next ones on either side
        half = 0.5 if isinstance(distribution, IntDistribution) else 0.0
        ends = math.log(low - half), math.log(high + half)
        value = math.exp(ends[0] + coordinate * (ends[1] - ends[0]))
        value = round(value) if isinstance(distribution, IntDistribution) else value
        return min(max(value, low), high)
    if distribution.step is not None:
        steps = round((high - low) / distribution.step)
        return min(low + int(coordinate * (steps + 1)) * distribution.step, high)
    return low + coordinate * (high - low)


def derive_seed(*parts: int) -> int:
    """Return a 32-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
