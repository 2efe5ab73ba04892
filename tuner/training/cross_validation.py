"""Cross-validation: one trial trained once a fold, all folds in step, so that an epoch's scores are their mean."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tuner.config.run import PluginConfig, Run
from tuner.messages import Epoch
from tuner.training.devices import DeviceContext
from tuner.training.training_loop import BestEpoch, fit, open_checkpoints, prepare_training


def runs_of_folds(run: Run) -> list[Run]:
    """The run for each of its folds; itself where there is one."""
    count = int(run.data.options.get("folds", 1))
    if count == 1:
        return [run]
    return [
        replace(run, data=PluginConfig(run.data.name, {**run.data.options, "fold": fold}))
        for fold in range(count)
    ]


def fit_folds(
    run: Run,
    device_context: DeviceContext,
    metric: str,
    best: BestEpoch,
    checkpoints: Path | None = None,
    *,
    keep_best_weights: bool = False,
) -> Iterator[Epoch]:
    """The epochs of a run: over its folds the mean of loss and scores, and the seconds of all. Raises what `prepare` and `fit` do.

    Each fold continues from a folder of its own in `checkpoints`; epochs it remembers are yielded again, so the folds stay in step.
    `keep`: the best epoch's weights are left there, where there is one fold.
    """
    runs = runs_of_folds(run)
    if len(runs) == 1:
        bench = prepare_training(run, device_context, metric)
        yield from fit(
            bench,
            run.recipe,
            run.seed,
            best,
            open_checkpoints(run, bench, checkpoints, keep_best_weights=keep_best_weights),
        )
        return
    whole = run.recipe.model_copy(
        update={"patience": None}
    )  # the mean decides, not a fold of its own
    bests, fits = [BestEpoch() for _ in runs], []
    for number, (fold, own) in enumerate(zip(runs, bests, strict=True)):
        bench = prepare_training(fold, device_context, metric)
        folder = checkpoints / f"fold-{number}" if checkpoints is not None else None
        fits.append(fit(bench, whole, run.seed, own, open_checkpoints(fold, bench, folder)))
    for epochs in zip(*fits, strict=True):
        epoch = mean_epoch(epochs)
        if best.epoch is None or epoch.scores[metric] > best.epoch.scores[metric]:
            best.epoch, best.predictions = (
                epoch,
                bests[0].latest_predictions,
            )  # what is shown is the first fold's
        yield epoch
        if (
            run.recipe.patience
            and best.epoch
            and epoch.number - best.epoch.number >= run.recipe.patience
        ):
            break


def mean_epoch(epochs: tuple[Epoch, ...]) -> Epoch:
    n = len(epochs)
    scores = {name: sum(e.scores[name] for e in epochs) / n for name in epochs[0].scores}
    notes = tuple(dict.fromkeys(note for e in epochs for note in e.notes))
    return Epoch(
        epochs[0].number,
        sum(e.loss for e in epochs) / n,
        scores,
        sum(e.seconds for e in epochs),
        notes,
    )
