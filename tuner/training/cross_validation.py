"""Cross-validation: a trial is trained once for each fold, all folds in step, so that an epoch's
scores are their mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tuner.config.objective import Direction
from tuner.config.run import PluginConfig, Run
from tuner.messages import Epoch, mean_temperature, mean_thresholds
from tuner.training.devices import DeviceContext
from tuner.training.epoch import TrainingContext
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import (
    BestEpoch,
    FitProgress,
    fit,
    is_better,
    is_out_of_patience,
    open_checkpoints,
)


def runs_of_folds(run: Run) -> list[Run]:
    """The run of each fold; the run itself where `data.folds` is 1."""
    count = run.folds
    if count == 1:
        return [run]
    return [
        replace(run, data=PluginConfig(run.data.name, {**run.data.options, "fold": fold}))
        for fold in range(count)
    ]


def prepare_folds(
    run: Run, device_context: DeviceContext, metric: str, direction: Direction = "maximise"
) -> list[TrainingContext]:
    """The training context of each fold. Raises what `prepare_training` raises."""
    return [
        prepare_training(fold, device_context, metric, direction) for fold in runs_of_folds(run)
    ]


def fit_folds(
    run: Run,
    contexts: Sequence[TrainingContext],
    checkpoint_folder: Path | None = None,
    *,
    keep_best_weights: bool = False,
) -> Iterator[FitProgress]:
    """Trains a run over its folds.

    Each fold has its own checkpoint folder below `checkpoint_folder`. A fold that continues from a
    checkpoint replays its earlier epochs, so the folds stay in step.

    Args:
        run: The run, without the number of a fold.
        contexts: What `prepare_folds` made of the run.
        checkpoint_folder: Where trainings are saved and continued from; None: nowhere.
        keep_best_weights: Leaves the best epoch's weights there, where there is one fold.

    Yields:
        Each epoch: the mean of loss and scores over the folds, and the sum of their seconds. Its
        predictions are those of the first fold.

    Raises:
        Diverged: The loss or a score of a fold is not finite.
        StorageError: A checkpoint cannot be written.
    """
    if len(contexts) == 1:
        checkpoints = open_checkpoints(
            run, contexts[0], checkpoint_folder, keep_best_weights=keep_best_weights
        )
        yield from fit(contexts[0], run.recipe, run.seed, checkpoints)
        return
    recipe = run.recipe.model_copy(update={"patience": None})  # patience follows the mean, below
    fold_trainings = []
    for number, (fold, context) in enumerate(zip(runs_of_folds(run), contexts, strict=True)):
        folder = checkpoint_folder / f"fold-{number}" if checkpoint_folder is not None else None
        checkpoints = open_checkpoints(fold, context, folder)
        fold_trainings.append(fit(context, recipe, run.seed, checkpoints))
    best: BestEpoch | None = None
    for fold_progress in zip(*fold_trainings, strict=True):
        epoch = mean_epoch([progress.epoch for progress in fold_progress])
        predictions = fold_progress[0].predictions
        if is_better(epoch, best, contexts[0]):
            best = BestEpoch(epoch, predictions, weights={})
        yield FitProgress(epoch, predictions, best)
        if is_out_of_patience(run.recipe, epoch, best):
            break


def mean_epoch(epochs: Sequence[Epoch]) -> Epoch:
    """The mean of the folds' loss and scores, the geometric mean of their temperatures, the mean
    of their thresholds, the sum of their seconds, and each note once.
    """
    count = len(epochs)
    return Epoch(
        number=epochs[0].number,
        loss=sum(epoch.loss for epoch in epochs) / count,
        scores={
            name: sum(epoch.scores[name] for epoch in epochs) / count for name in epochs[0].scores
        },
        seconds=sum(epoch.seconds for epoch in epochs),
        temperature=mean_temperature([epoch.temperature for epoch in epochs]),
        thresholds=mean_thresholds([epoch.thresholds for epoch in epochs]),
        notes=tuple(dict.fromkeys(note for epoch in epochs for note in epoch.notes)),
    )
