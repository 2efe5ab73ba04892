"""The run that is exported of a trial."""

from dataclasses import replace
from pathlib import Path

from tuner.config.run import Run


def run_to_best_epoch(run: Run, epoch: int, fit: str = "train+valid") -> Run:
    """The winner's run up to its best epoch.

    It is retrained on train and validation examples, or, with `fit="train"`, stays as its trial
    was.
    """
    return replace(
        run,
        recipe=run.recipe.model_copy(update={"fit": fit, "stop_epoch": epoch, "patience": None}),
    )


def choose_export(
    retrain: bool, run: Run, epoch: int, weights: Path | None
) -> tuple[Run, Path | None]:
    """What is exported of a trial: a run, and the weights if it is not retrained.

    With `retrain` the run is trained again on train and validation examples. Without it, the run is
    as its trial was, and `weights` are those that the trial left.
    """
    return (
        (run_to_best_epoch(run, epoch), None)
        if retrain
        else (run_to_best_epoch(run, epoch, fit="train"), weights)
    )
