"""Cross-validation: one trial trained once a fold, all folds in step, so that an epoch's scores are their mean."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tuner.config.run import Part, Run
from tuner.messages import Epoch
from tuner.training.devices import Place
from tuner.training.training_loop import Best, checkpoints_of, fit, prepare


def folds_of(run: Run) -> list[Run]:
    """The run for each of its folds; itself where there is one."""
    count = int(run.data.options.get("folds", 1))
    if count == 1:
        return [run]
    return [
        replace(run, data=Part(run.data.name, {**run.data.options, "fold": fold}))
        for fold in range(count)
    ]


def crossed(
    run: Run,
    place: Place,
    metric: str,
    best: Best,
    checkpoints: Path | None = None,
    *,
    keep: bool = False,
) -> Iterator[Epoch]:
    """The epochs of a run: over its folds the mean of loss and scores, and the seconds of all. Raises what `prepare` and `fit` do.

    Each fold continues from a folder of its own in `checkpoints`; epochs it remembers are yielded again, so the folds stay in step.
    `keep`: the best epoch's weights are left there, where there is one fold.
    """
    runs = folds_of(run)
    if len(runs) == 1:
        bench = prepare(run, place, metric)
        yield from fit(
            bench, run.recipe, run.seed, best, checkpoints_of(run, bench, checkpoints, keep=keep)
        )
        return
    whole = run.recipe.model_copy(
        update={"patience": None}
    )  # the mean decides, not a fold of its own
    bests, fits = [Best() for _ in runs], []
    for number, (fold, own) in enumerate(zip(runs, bests, strict=True)):
        bench = prepare(fold, place, metric)
        folder = checkpoints / f"fold-{number}" if checkpoints is not None else None
        fits.append(fit(bench, whole, run.seed, own, checkpoints_of(fold, bench, folder)))
    for epochs in zip(*fits, strict=True):
        epoch = mean(epochs)
        if best.epoch is None or epoch.scores[metric] > best.epoch.scores[metric]:
            best.epoch, best.pairs = epoch, bests[0].latest  # what is shown is the first fold's
        yield epoch
        if (
            run.recipe.patience
            and best.epoch
            and epoch.number - best.epoch.number >= run.recipe.patience
        ):
            break


def mean(epochs: tuple[Epoch, ...]) -> Epoch:
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
