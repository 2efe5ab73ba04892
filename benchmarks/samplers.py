"""What a sampler makes of a small budget, on made-up learning problems whose true scores are known.

    python benchmarks/samplers.py [--budgets 12 24] [--studies 100]
    python benchmarks/samplers.py --table-only

A landscape gives each recipe a score: it has a best learning rate for SGD and one for AdamW, a best freeze depth, momentum, batch
size and weight decay, all drawn by its seed; more epochs are better; a trial is measured with the noise of a small validation set.
Every arm searches the same landscapes, through the code that proposes a study's trials: linear probe, default recipe, sampler.
Lost: how far the true score of the winner stays below the best of the landscape, in points. Beside it the mean difference from the
first arm over the same landscapes, and its standard error.
"""

import argparse
import json
import math
import random
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import arms
import numpy as np
import optuna
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import _BatchedCategoricalDistributions

from tuner.config import parsing, yaml_document
from tuner.config.run import Recipe
from tuner.config.space import Space
from tuner.search import proposals, samplers
from tuner.search.proposals import TrialProposer
from tuner.search.samplers import Startup, derive_seed
from tuner.search.windowed_study import WindowedStudy

RAW = arms.PLOTS / "samplers.json"
NOISE = 0.004  # standard deviation of a measured score: accuracy near 0.95 on about 3,000 examples
BEST = 0.95
BATCH_SIZES, WEIGHT_DECAYS = [16, 32, 64, 128], [0.0, 1e-4, 1e-3, 1e-2]
TWO_RANGES = "[{low: 1e-3, high: 1.0, log: true, when: {optimizer: sgd}}, {low: 1e-5, high: 1e-2, log: true, when: {optimizer: adamw}}]"
ONE_RANGE = "{low: 1e-5, high: 1.0, log: true}"
FILE = """
task: classification
data: digits
model: {{name: resnet18_slim, weights: bundled}}
recipe:
  optimizer: [sgd, adamw]
  lr: {lr}
  momentum: {{low: 0.8, high: 0.99, when: {{optimizer: sgd}}}}
  freeze_depth: {{low: 0, high: 9}}
  epochs: {{low: 2, high: 8}}
  batch_size: [16, 32, 64, 128]
  weight_decay: [0.0, 1e-4, 1e-3, 1e-2]
search: {{trials: {trials}, seed: {seed}}}
"""


class Landscape:
    """A score for each recipe. The seed decides where the best recipe lies."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.rate = {"sgd": draw.uniform(0.2, 0.8), "adamw": draw.uniform(0.2, 0.8)}
        self.below = {"sgd": draw.uniform(0, 0.03), "adamw": draw.uniform(0, 0.03)}
        self.depth, self.slope = draw.choice([0, 0, 1, 2, 4, 6]), draw.uniform(0, 0.3)
        self.momentum = draw.uniform(0.2, 0.8)
        self.batch, self.decay = draw.randrange(4), draw.randrange(4)

    def score(self, recipe: Recipe) -> float:
        """The true score: 1 is the highest that any could be."""
        lowest = {"sgd": -3, "adamw": -5}[recipe.optimizer]
        # deeper frozen, a network bears higher rates; too high a rate does more harm than too low a one
        best_rate = (
            self.rate[recipe.optimizer] + self.slope * (recipe.freeze_depth - self.depth) / 9
        )
        off = (math.log10(recipe.lr) - lowest) / 3 - best_rate
        score = BEST - self.below[recipe.optimizer] - (0.9 if off < 0 else 1.8) * off**2
        score -= 0.012 * abs(recipe.freeze_depth - self.depth) + 0.1 * math.exp(
            -recipe.epochs / 2.5
        )
        if recipe.optimizer == "sgd":
            score -= 0.1 * ((recipe.momentum - 0.8) / 0.19 - self.momentum) ** 2
        score -= 0.01 * abs(BATCH_SIZES.index(recipe.batch_size) - self.batch)
        score -= 0.006 * abs(WEIGHT_DECAYS.index(recipe.weight_decay) - self.decay)
        return max(score, 0.1)

    def highest(self) -> float:
        return BEST - min(self.below.values()) - 0.1 * math.exp(-8 / 2.5)


def lost(seed: int, trials: int, lr: str, make_sampler: Callable[[int, Startup], Any]) -> float:
    """Points that the winner of one search stays below the best of its landscape."""
    text = FILE.format(lr=lr, trials=trials, seed=seed)
    space: Space = parsing.parse_space(yaml_document.parse_document(text, "samplers.yaml"))
    landscape, noise = Landscape(seed), random.Random(derive_seed(seed, 1))
    study = WindowedStudy(optuna.create_study(direction="maximize"))
    known = proposals.SAMPLERS
    proposals.SAMPLERS = {**known, "tpe": make_sampler}  # type: ignore[misc]
    proposer = TrialProposer(study, space)
    proposer.enqueue_first_trials()
    best = (-math.inf, 0.0)
    for number in range(trials):
        trial = proposer.propose_trial(number)
        assert trial is not None
        with study.window():
            true = landscape.score(space.sample(trial).recipe)
        measured = true + noise.gauss(0, NOISE)
        study.tell(trial, measured)
        best = max(best, (measured, true))
    proposals.SAMPLERS = known  # type: ignore[misc]
    return 100 * (landscape.highest() - best[1])


def tpe(seed: int, **options: Any) -> optuna.samplers.TPESampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # group is experimental
        return optuna.samplers.TPESampler(seed=seed, **options)


def by_chance(startup: Startup, seed: int) -> Startup:
    """The same startup with pseudo-random points."""
    draw = random.Random(seed)
    return Startup(startup.trials, {name: draw.random() for name in startup.point})


def started(sampler: optuna.samplers.BaseSampler, startup: Startup) -> samplers.QuasiRandomStartup:
    return samplers.QuasiRandomStartup(sampler, startup)


class OrderedEstimator(_ParzenEstimator):
    """TPE's densities, in which a number of a list also makes its neighbours likely."""

    def _calculate_categorical_distributions(
        self, observations: Any, param_name: str, search_space: Any, parameters: Any
    ) -> Any:
        choices = search_space.choices
        are_numbers = all(type(choice) in (int, float) for choice in choices)
        if not are_numbers or len(choices) < 3 or len(observations) == 0:
            return super()._calculate_categorical_distributions(
                observations, param_name, search_space, parameters
            )
        ranks = np.argsort(np.argsort(choices))
        kernels = len(observations) + 1  # the last one is the prior
        weights = np.full((kernels, len(choices)), parameters.prior_weight / kernels)
        steps = ranks[observations.astype(int)][:, None] - ranks[None, :]
        weights[:-1] += np.exp(-0.5 * (steps / 0.7) ** 2)
        return _BatchedCategoricalDistributions(weights / weights.sum(axis=1, keepdims=True))


def ordered(seed: int) -> optuna.samplers.TPESampler:
    sampler = tpe(seed, n_startup_trials=0)
    sampler._parzen_estimator_cls = OrderedEstimator
    return sampler


ARMS: Mapping[str, tuple[str, Callable[[int, Startup], Any]]] = {
    "TPE as Optuna has it: 10 random trials first": (TWO_RANGES, lambda seed, startup: tpe(seed)),
    "one lr range for both optimizers": (ONE_RANGE, lambda seed, startup: tpe(seed)),
    "random search": (
        TWO_RANGES,
        lambda seed, startup: optuna.samplers.RandomSampler(seed=seed),
    ),
    "a fifth of the budget first, random": (
        TWO_RANGES,
        lambda seed, startup: started(tpe(seed, n_startup_trials=0), by_chance(startup, seed)),
    ),
    "a fifth first, by a Sobol sequence": (
        TWO_RANGES,
        lambda seed, startup: started(tpe(seed, n_startup_trials=0), startup),
    ),
    "a fifth first, by Sobol, and group=True": (
        TWO_RANGES,
        lambda seed, startup: started(tpe(seed, n_startup_trials=0, group=True), startup),
    ),
    "a fifth first, by Sobol, and lists of numbers ordered": (
        TWO_RANGES,
        lambda seed, startup: started(ordered(seed), startup),
    ),
    "as tuner has it": (TWO_RANGES, samplers.SAMPLERS["tpe"]),
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "hardware": arms.hardware(),
        "settings": {"studies": args.studies, "noise": NOISE},
        "lost": {},
    }
    for budget in args.budgets:
        for name, (lr, make_sampler) in ARMS.items():
            of_arm = found["lost"].setdefault(name, {})
            of_arm[str(budget)] = [
                round(lost(seed, budget, lr, make_sampler), 4) for seed in range(args.studies)
            ]
        arms.save(found, RAW)
    return found


def table(found: dict[str, Any]) -> None:
    first = next(iter(found["lost"].values()))
    heads = " | ".join(f"{budget} trials" for budget in first)
    print(f"{found['hardware']}; {found['settings']}\n")
    print(f"| arm | {heads} |\n|---|{'---|' * len(first)}")
    for name, by_budget in found["lost"].items():
        cells = []
        for budget, losses in by_budget.items():
            more = [a - b for a, b in zip(losses, first[budget], strict=True)]
            error = statistics.stdev(more) / math.sqrt(len(more)) if any(more) else 0.0
            difference = f" ({statistics.mean(more):+.2f} ± {error:.2f})" if any(more) else ""
            cells.append(f"{statistics.mean(losses):.2f}{difference}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument(
        "--table-only",
        action="store_true",
        help="measure nothing; show again what plots/*.json holds",
    )
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table(json.loads(RAW.read_text()) if args.table_only else measure(args))


if __name__ == "__main__":
    main()
