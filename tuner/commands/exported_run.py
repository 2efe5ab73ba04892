"""What is exported of a trial: its run, and what is done with the outputs of its model."""

from dataclasses import replace
from pathlib import Path

from optuna import Study
from optuna.trial import FrozenTrial

from tuner.commands.ended_search import EndedSearch
from tuner.config.run import PluginConfig, Run, SearchSettings
from tuner.messages import OutputSettings, scale_probability
from tuner.search import history
from tuner.search.retraining import retrained_epochs, retraining_share, whole_epochs


def run_to_epoch(run: Run, epoch: int) -> Run:
    """A trial's run up to one of its epochs, as its trial was."""
    recipe = run.recipe.model_copy(update={"stop_epoch": epoch, "patience": None})
    return replace(run, recipe=recipe)


def retrained_run(run: Run, epoch: int, train_share: float) -> Run:
    """A trial's run up to one of its epochs, on train and validation examples.

    It keeps the number of optimizer steps, not that of epochs: an epoch over more examples has more
    steps, and the validation scores chose how long to train (benchmarks/README.md, "Retraining").
    Epochs are whole, and where they do not fit, the steps are more and never fewer.

    Args:
        run: The run of the trial.
        epoch: The number of the epoch, as search/retraining.py chooses it.
        train_share: The share of the training examples in those of train and validation together.
    """
    share = retraining_share(run, train_share)
    update = {"fit": "train+valid", "epochs": whole_epochs(run.recipe.epochs * share)}
    longer = run_to_epoch(run, whole_epochs(epoch * share))
    return replace(longer, recipe=longer.recipe.model_copy(update=update))


def with_thresholds(run: Run, trial: FrozenTrial, search: SearchSettings) -> Run:
    """A trial's run, which states the thresholds of the epoch to which it is trained again, where
    it has any.

    They are probabilities of the export: where its logits are divided by a temperature, so are
    those of the thresholds. Nothing but the decisions follows from them, so the run's training is
    that of the trial.
    """
    thresholds = trial.user_attrs.get(history.THRESHOLDS)
    if not thresholds:
        return run
    calibrate = choose_outputs(search, trial).calibrate
    temperature = calibrate if isinstance(calibrate, float) else 1.0
    scaled = tuple(scale_probability(value, temperature) for value in thresholds)
    task = PluginConfig(run.task.name, {**run.task.options, "thresholds": scaled})
    return replace(run, task=task)


def choose_export(
    study: Study,
    trial: FrozenTrial,
    run: Run,
    weights: Path | None,
    search: SearchSettings,
    *,
    retrain: bool,
) -> tuple[Run, Path | None]:
    """What is exported of a trial: a run, and the weights if it is not retrained.

    With `retrain` the run is trained again on train and validation examples. Without it, the run is
    as its trial was.

    Args:
        study: The study of the trial.
        trial: A completed trial.
        run: The run that the trial carried out.
        weights: The weights of its best epoch that the trial left, if they are kept.
        search: What is done with its outputs.
        retrain: Whether it is trained again.
    """
    run = with_thresholds(run, trial, search)
    if retrain:
        return retrained_run(run, retrained_epochs(trial), history.train_share(study)), None
    return run_to_epoch(run, trial.user_attrs[history.BEST_EPOCH]), weights


def weights_of(ended: EndedSearch, trial: FrozenTrial) -> Path | None:
    """The weights of the best epoch that a trial left, if they are kept."""
    proposals = history.proposal_numbers(ended.coordinator.study)
    return ended.coordinator.retention.best_weights_of(proposals[trial.number])


def is_retrained(ended: EndedSearch, winner: FrozenTrial, *, is_made: bool) -> bool:
    """Whether the winner is trained again: not where that would end too late for `search.time`.

    `is_made`: whether the export is that of its retraining already, which stays so.
    """
    search = ended.session.settings.search
    if not search.needs_no_weights or weights_of(ended, winner) is None:
        return search.retrain
    return is_made or ended.has_time_for(ended.retraining_seconds(winner))


def choose_outputs(search: SearchSettings, trial: FrozenTrial) -> OutputSettings:
    """What is done with the outputs of a trial's model: its temperature is that of the epoch to
    which it is trained again.

    A trial of an earlier version has none.
    """
    stated = OutputSettings.of(search)
    if stated.calibrate != "temperature":
        return stated
    return replace(stated, calibrate=trial.user_attrs.get(history.TEMPERATURE, "none"))
