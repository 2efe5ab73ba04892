"""Samplers and pruners by their YAML names. Each ask gets a sampler of its own seed, so that history decides and not the process."""

import hashlib
from collections.abc import Callable, Mapping

import optuna

from tuner.search.projection_pruner import ProjectionPruner

SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed: optuna.samplers.RandomSampler(
        seed=seed
    ),  # the coordinator enqueues the grid's points
}

PRUNERS: Mapping[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "median": lambda epochs: optuna.pruners.MedianPruner(
        # steps count from 1: none is judged by its first epoch. Where few trials are as long, their median says little
        n_startup_trials=5,
        n_warmup_steps=2,
        n_min_trials=5,
    ),
    "projection": ProjectionPruner,
    "successive-halving": lambda epochs: optuna.pruners.SuccessiveHalvingPruner(
        min_resource=1, reduction_factor=3
    ),
    "hyperband": lambda epochs: optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=epochs, reduction_factor=3
    ),
    "none": lambda epochs: optuna.pruners.NopPruner(),
}


def derive_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
