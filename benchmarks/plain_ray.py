"""The plain twin with Ray Tune: OptunaSearch and ASHA over the loop in twins.py, one trial at a time on all cores.

    python benchmarks/plain_ray.py FOLDER --weights lite0.safetensors [--trials 24] [--seed 0]

Needs `pip install "ray[tune]" optuna`. One JSON line per epoch and per trial on stdout, with the wall seconds since the
command's start, as plain_optuna.py prints them.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read while ray is imported
os.environ.setdefault("PYTHONPATH", str(Path(__file__).parent))  # Ray's workers import twins too

import ray
import torch
import twins
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

EPOCHS = 4
SPACE = {
    "lr": tune.loguniform(1e-4, 1e-1),
    "momentum": tune.uniform(0.8, 0.99),
    "freeze_depth": tune.randint(0, twins.MAX_DEPTH + 1),
    "epochs": tune.randint(1, EPOCHS + 1),
}


def trainable(config: dict[str, Any], folder: Path, weights: Path, workers: int, seed: int) -> None:
    torch.manual_seed(seed)
    train_loader, valid_loader = twins.loaders(folder, workers)
    for score in twins.train(twins.Params(**config), weights, train_loader, valid_loader):
        tune.report({"accuracy": score})


class Lines(tune.Callback):
    """Prints what happens, as plain_optuna.py does. Trials are numbered as they begin."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self.numbers: dict[str, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = self.numbers.setdefault(trial.trial_id, len(self.numbers))
        score = result["accuracy"]
        self.best[trial.trial_id] = max(score, self.best.get(trial.trial_id, 0.0))
        twins.tell(
            "epoch",
            number,
            twins.Params(**trial.config),
            epoch=result["training_iteration"],
            score=score,
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        params, epochs = twins.Params(**trial.config), trial.last_result["training_iteration"]
        state = "complete" if epochs >= params.epochs else "pruned"
        twins.tell(
            "trial",
            self.numbers[trial.trial_id],
            params,
            state=state,
            score=self.best[trial.trial_id],
        )


def search(args: argparse.Namespace, folder: str, cores: int) -> None:
    fixed = {
        "folder": args.folder.resolve(),
        "weights": args.weights.resolve(),
        "workers": args.workers,
        "seed": args.seed,
    }
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, **fixed), {"cpu": cores}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=args.trials,
            search_alg=ConcurrencyLimiter(OptunaSearch(seed=args.seed), max_concurrent=1),
            scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=1),
            reuse_actors=True,  # off by default, and then every trial imports torch anew
        ),
        run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Lines()]),
    )
    errors = tuner.fit().errors
    if errors:
        sys.exit(f"{len(errors)} trials failed; the first: {errors[0]}")


def main() -> None:
    args = twins.arguments(__doc__).parse_args()
    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        search(args, folder, cores)
    ray.shutdown()


if __name__ == "__main__":
    main()
