"""The plain twin of `tuner run`: Optuna over the loop in twins.py, with TPE, the median pruner and SQLite.

    python benchmarks/plain_optuna.py FOLDER --weights lite0.safetensors [--trials 24] [--seed 0]
    python benchmarks/plain_optuna.py FOLDER --weights lite0.safetensors --replay trials.json

One JSON line per epoch and per trial on stdout, with the wall seconds since the command's start. --replay trains exactly the
trials in a file, a list such as [{"lr": 0.01, "momentum": 0.9, "freeze_depth": 3, "epochs": 2}], without search or pruning.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import optuna
import torch
import twins
from torch import nn


class BestModel:
    """A copy of the model with the best validation accuracy so far."""

    def __init__(self) -> None:
        self.score = -1.0

    def keep(self, model: nn.Module, score: float) -> None:
        if score > self.score:
            self.model, self.score = copy.deepcopy(model), score


def search(args: argparse.Namespace, storage: str) -> None:
    train_loader, valid_loader = twins.loaders(args.folder, args.workers, args.size)
    kept = BestModel()

    def objective(trial: optuna.Trial) -> float:
        params = twins.Params(
            lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True),
            momentum=trial.suggest_float("momentum", 0.8, 0.99),
            freeze_depth=trial.suggest_int("freeze_depth", 0, twins.MAX_DEPTH),
            epochs=trial.suggest_int("epochs", 1, 4),
        )
        best = 0.0
        for epoch, score in enumerate(
            twins.train(params, args.weights, train_loader, valid_loader, kept.keep), 1
        ):
            best = max(best, score)
            twins.tell("epoch", trial.number, params, epoch=epoch, score=score)
            trial.report(score, epoch)
            if trial.should_prune():
                twins.tell("trial", trial.number, params, state="pruned", score=best)
                raise optuna.TrialPruned
        twins.tell("trial", trial.number, params, state="complete", score=best)
        return best

    sampler = optuna.samplers.TPESampler(seed=args.seed)
    study = optuna.create_study(
        direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner(), storage=storage
    )
    study.optimize(objective, n_trials=args.trials)
    if args.probabilities:
        twins.save_test_probabilities(kept.model, args.folder, args.size, args.probabilities)


def replay(args: argparse.Namespace) -> None:
    train_loader, valid_loader = twins.loaders(args.folder, args.workers, args.size)
    for number, listed in enumerate(json.loads(args.replay.read_text())):
        params, start = twins.Params(**listed), time.monotonic()
        scores = list(twins.train(params, args.weights, train_loader, valid_loader))
        took = round(time.monotonic() - start, 3)
        twins.tell("trial", number, params, state="complete", score=max(scores), took=took)


def main() -> None:
    parser = twins.arguments(__doc__)
    parser.add_argument(
        "--replay", type=Path, metavar="FILE.json", help="train exactly these trials"
    )
    parser.add_argument(
        "--storage", help="Optuna storage URL; default: SQLite in a temporary folder"
    )
    parser.add_argument(
        "--probabilities", type=Path, help="where to write the best model's on FOLDER/test, as JSON"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.replay:
        replay(args)
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        search(args, args.storage or f"sqlite:///{folder}/study.db")


if __name__ == "__main__":
    main()
