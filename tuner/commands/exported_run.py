"""What is exported of a trial: its run, and what is done with the outputs of its model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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


class TrialExport(NamedTuple):
    """What is exported of a trial: a run, the weights where it is not trained again, and what is
    done with the outputs of its model.
    """

    run: Run
    weights: Path | None
    outputs: OutputSettings


def with_thresholds(run: Run, trial: FrozenTrial, outputs: OutputSettings, *, retrain: bool) -> Run:
    """A trial's run, which states its thresholds, where it has any.

    They are probabilities of the export: where its logits are divided by a temperature, so are
    those of the thresholds. Nothing but the decisions follows from them, so the run's training is
    that of the trial.

    Args:
        run: The trial's run.
        trial: The trial.
        outputs: What is done with its outputs.
        retrain: As of `fitted_value`.
    """
    thresholds = fitted_value(trial, history.THRESHOLDS, history.BEST_THRESHOLDS, retrain=retrain)
    if not thresholds:
        return run
    temperature = outputs.calibrate if isinstance(outputs.calibrate, float) else 1.0
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
) -> TrialExport:
    """What is exported of a trial.

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
    outputs = choose_outputs(search, trial, retrain=retrain)
    run = with_thresholds(run, trial, outputs, retrain=retrain)
    if retrain:
        again = retrained_run(run, retrained_epochs(trial), history.train_share(study))
        return TrialExport(again, None, outputs)
    return TrialExport(run_to_epoch(run, trial.user_attrs[history.BEST_EPOCH]), weights, outputs)


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


def choose_outputs(search: SearchSettings, trial: FrozenTrial, *, retrain: bool) -> OutputSettings:
    """What is done with the outputs of a trial's model; `retrain` as of `fitted_value`.

    A trial of an earlier version has no temperature.
    """
    stated = OutputSettings.of(search)
    if stated.calibrate != "temperature":
        return stated
    found = fitted_value(trial, history.TEMPERATURE, history.BEST_TEMPERATURE, retrain=retrain)
    return replace(stated, calibrate="none" if found is None else found)


def fitted_value(trial: FrozenTrial, name: str, best_name: str, *, retrain: bool) -> Any:
    """What was fitted to the validation examples after one epoch of a trial; None: nothing was.

    With `retrain` it is of the epoch to which the trial is trained again; without it, of the best
    one, whose weights the trial left. `best_name` is there only where that is another epoch.
    """
    attributes = trial.user_attrs
    return attributes.get(name) if retrain else attributes.get(best_name, attributes.get(name))
