"""What the plain scripts of boxes, masks and texts share: Optuna over a training that yields its score after each epoch.

As in plain_optuna.py: TPE, the median pruner, the weights of the best epoch of all trials. The first trial is the recipe that
the script calls its default, so that a search can only add to it.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import torch
from plain_optuna import BestModel
from torch import nn

Params = dict[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all three scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="as task_sets.py writes it")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--predictions", type=Path, required=True, help="of the test part")
    parser.add_argument("--size", type=int, required=True, help="pixels, or tokens")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--trials", type=int, default=1, help="1: the default recipe alone")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def search(
    args: argparse.Namespace,
    default: Params,
    suggest: Callable[[optuna.Trial], Params],
    train: Callable[[Params], Iterator[tuple[float, nn.Module]]],
) -> nn.Module:
    """The model with the best validation score of all epochs of all trials.

    Args:
        args: the options; `trials` and `seed` are used.
        default: the values that the first trial takes.
        suggest: the values of a trial.
        train: one training; yields the score and the model after each epoch.
    """
    torch.manual_seed(args.seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = BestModel()

    def objective(trial: optuna.Trial) -> float:
        best = 0.0
        for epoch, (score, model) in enumerate(train(suggest(trial)), 1):
            kept.keep(model, score)
            best = max(best, score)
            trial.report(score, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return best

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=args.seed),
        pruner=optuna.pruners.MedianPruner(),
    )
    study.enqueue_trial(default)
    study.optimize(objective, n_trials=args.trials)
    return kept.model
