"""Cross-validation: one trial trained once a fold, all folds in step, so that an epoch's scores are their mean."""

from collections.abc import Iterator
from dataclasses import replace

from tuner.devices import Place
from tuner.orders import Epoch
from tuner.run import Part, Run
from tuner.trial import Best, fit, prepare


def folds_of(run: Run) -> list[Run]:
    """The run for each of its folds; itself where there is one."""
    count = int(run.data.options.get("folds", 1))
    if count == 1:
        return [run]
    return [replace(run, data=Part(run.data.name, {**run.data.options, "fold": fold})) for fold in range(count)]


def crossed(run: Run, place: Place, metric: str, best: Best) -> Iterator[Epoch]:
    """The epochs of a run: over its folds the mean of loss and scores, and the seconds of all. Raises what `prepare` and `fit` do."""
    runs = folds_of(run)
    if len(runs) == 1:
        yield from fit(prepare(run, place, metric), run.recipe, run.seed, best)
        return
    bests = [Best() for _ in runs]
    whole = run.recipe.model_copy(update={"patience": None})  # the mean decides, not a fold of its own
    fits = [fit(prepare(fold, place, metric), whole, run.seed, own) for fold, own in zip(runs, bests, strict=True)]
    for epochs in zip(*fits, strict=True):
        epoch = mean(epochs)
        if best.epoch is None or epoch.scores[metric] > best.epoch.scores[metric]:
            best.epoch, best.pairs = epoch, bests[0].latest  # what is shown is the first fold's
        yield epoch
        if run.recipe.patience and best.epoch and epoch.number - best.epoch.number >= run.recipe.patience:
            break


def mean(epochs: tuple[Epoch, ...]) -> Epoch:
    n = len(epochs)
    scores = {name: sum(e.scores[name] for e in epochs) / n for name in epochs[0].scores}
    return Epoch(epochs[0].number, sum(e.loss for e in epochs) / n, scores, sum(e.seconds for e in epochs))
