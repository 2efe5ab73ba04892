"""The pruners by their YAML names."""

from collections.abc import Callable, Mapping

import optuna

from tuner.search.projection_pruner import ProjectionPruner

# name -> a function from the largest number of epochs of a trial to a pruner
PRUNERS: Mapping[str, Callable[[int], optuna.pruners.BasePruner]] = {
    # Steps count from 1, so no trial is judged by its first epoch. Where few trials are as long
    # as this one, their median says little: at least 5 are needed.
    "median": lambda epochs: optuna.pruners.MedianPruner(
        n_startup_trials=5, n_warmup_steps=2, n_min_trials=5
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
