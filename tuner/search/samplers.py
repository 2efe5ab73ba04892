"""The samplers by their YAML names.

Each proposal gets a sampler with a seed of its own. So a proposal depends on the study's history
and not on the process that asks for it.
"""

import hashlib
from collections.abc import Callable, Mapping

import optuna

# name -> a function from the seed to a sampler
SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    # the coordinator enqueues the points of the grid, so this sampler has nothing to choose
    "grid": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def derive_seed(*parts: int) -> int:
    """Return a 32-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
