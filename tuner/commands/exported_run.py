"""What is exported of a trial: its run, and what is done with the outputs of its model."""

from dataclasses import replace
from pathlib import Path

from optuna.trial import FrozenTrial

from tuner.config.run import Run, SearchSettings
from tuner.messages import OutputSettings
from tuner.search import history


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


def choose_outputs(search: SearchSettings, trial: FrozenTrial) -> OutputSettings:
    """What is done with the outputs of a trial's model: its temperature is that of its best epoch.

    A trial of an earlier version has none.
    """
    stated = OutputSettings.of(search)
    if stated.calibrate != "temperature":
        return stated
    return replace(stated, calibrate=trial.user_attrs.get(history.TEMPERATURE, "none"))
