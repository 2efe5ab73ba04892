"""Asking for what is worth its price: Optuna's TPE, with the cost of a trial in its choice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from tuner.space import Dimension, Space

EPOCHS, DEPTH = ("recipe", "epochs"), ("recipe", "freeze_depth")
FLOOR = 0.01  # of a whole pass: what an epoch costs however little of the model is trained
STARTUP = 8  # trials before TPE has something to go by
CANDIDATES = 24


@dataclass(frozen=True)
class Prices:
    """What a trial costs, from its parameters: passes over the data times what its freeze depth leaves to be computed."""

    space: Space
    costs: Mapping[str, tuple[float, ...]]  # model name -> cost of an example at each freeze depth

    def __call__(self, params: Mapping[str, Any]) -> float:
        epochs = self._value(EPOCHS, params)
        depth = self._value(DEPTH, params)
        of_model = self.costs[self._value(("model", "name"), params)]
        return float(epochs * (of_model[min(depth, len(of_model) - 1)] + FLOOR * of_model[0]))

    def cheapest(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with as few epochs, and as deeply frozen, as the space allows."""
        found = dict(params)
        for dimension in self.space.dimensions:
            if dimension.name in found and dimension.path in (EPOCHS, DEPTH):
                found[dimension.name] = _end(dimension, highest=dimension.path == DEPTH)
        return found

    def _value(self, path: tuple[str, ...], params: Mapping[str, Any]) -> Any:
        name = next((d.name for d in self.space.dimensions if d.path == path), None)
        return params.get(name, self.space.values[path]) if name else self.space.values[path]


def _end(dimension: Dimension, *, highest: bool) -> int:
    leaf = dimension.leaf
    members = leaf.members() or (int(leaf.low), int(leaf.last))  # type: ignore[union-attr]
    return int(max(members) if highest else min(members))


class CostAware(optuna.samplers.TPESampler):
    """TPE that divides the expected improvement by the price, the less so the more of the budget is spent.

    Expected improvement per second favours cheap trials for ever; cooling its exponent from 1 to 0 over the search
    (EI-cool: Lee et al., Cost-aware Bayesian Optimization, 2020) ends in plain TPE. The first trials, drawn at random, are
    drawn from the cheaper half, the cheapest first.
    """

    def __init__(self, seed: int, prices: Prices | None, spent: float) -> None:
        """`spent`: the share of the budget, 0..1, that was spent when this trial is asked for."""
        super().__init__(seed=seed, n_startup_trials=STARTUP)
        self.price: Callable[[Mapping[str, Any]], float] = prices or (lambda _: 1.0)
        self.spent = spent
        self.drawn: dict[str, BaseDistribution] = {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        finished = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))
        if finished >= STARTUP or not search_space:
            return super().sample_relative(study, trial, search_space)
        drawn = [
            {name: self._random_sampler.sample_independent(study, trial, name, d) for name, d in search_space.items()}
            for _ in range(CANDIDATES)
        ]
        by_price = sorted(drawn, key=self.price)
        return by_price[round(finished / (2 * STARTUP) * (CANDIDATES - 1))]

    def _sample(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        self.drawn = search_space
        return super()._sample(study, trial, search_space)

    def _compute_acquisition_func(self, samples: dict[str, NDArray[Any]], mpe_below: Any, mpe_above: Any) -> NDArray[Any]:
        gains: NDArray[Any] = super()._compute_acquisition_func(samples, mpe_below, mpe_above)
        prices = [self.price({name: d.to_external_repr(samples[name][i]) for name, d in self.drawn.items()}) for i in range(len(gains))]
        return gains - (1 - self.spent) * np.log(prices)
