"""A soup of the winner and other trials: which may be in it, which are, and their retrainings.

The average itself is made by a worker, see `training/soup.py`.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tuner.commands.exported_run import choose_export
from tuner.commands.session import Session
from tuner.config.objective import is_improvement
from tuner.config.run import Run
from tuner.config.space import Space
from tuner.errors import NoUsableTrial
from tuner.files.checkpoint_files import (
    CHECKPOINTS_FOLDER,
    find_best_weights,
    remove_training_checkpoints,
)
from tuner.files.crash_points import crash_point
from tuner.jobs import stall_of
from tuner.manifest import PublishedExport, averaged_runs, is_export_of
from tuner.messages import Ingredient, OutputSettings, Soup, SoupChoice, SoupJob
from tuner.search import history

CHECKPOINTS_NAME = "soup-{trial}"  # of the retraining of an ingredient


def soup_candidates(
    space: Space, study: optuna.Study, folder: Path, winner: FrozenTrial
) -> tuple[Ingredient, ...] | None:
    """The winner and then, the best first, the trials of its model and data whose weights are kept.

    They may differ in the recipe, the freeze depth included. Empty where there are not two, or the
    winner's own weights are not kept; None where `search.soup` says that there is no soup.

    Args:
        space: The space that was searched.
        study: The study. Its search has ended.
        folder: The study's folder.
        winner: The trial that is exported.
    """
    search = space.settings.search
    if search.soup == "none":
        return None
    checkpoints = (folder / CHECKPOINTS_FOLDER).absolute()
    proposals = history.proposal_numbers(study)
    ranked = sorted(
        (rank, trial)
        for trial in history.completed_trials(study)
        if (rank := history.trial_rank(trial, study.direction)) is not None
    )
    others = [trial for _, trial in ranked if trial.number != winner.number]
    run_of_winner = history.run_of_trial(space, study, winner)
    candidates = []
    for trial in (winner, *others):
        weights = find_best_weights(checkpoints / str(proposals[trial.number]))
        if weights is None:
            if trial is winner:
                return ()
            continue
        run = history.run_of_trial(space, study, trial)
        if (run.model, run.data) == (run_of_winner.model, run_of_winner.data):
            export = choose_export(study, trial, run, weights, search, retrain=search.retrain)
            candidates.append(Ingredient(trial.number, export.run, str(weights)))
    return tuple(candidates) if len(candidates) > 1 else ()


def manifest_of_run(
    published: PublishedExport | None, run: Run, outputs: OutputSettings
) -> dict[str, Any] | None:
    """What an export says of itself; None where it is of another run or gives other outputs, or
    there is none.
    """
    if published is None or not is_export_of(published.manifest, run, outputs):
        return None
    return published.manifest


def is_current(
    findings: Mapping[str, Any] | None, candidates: tuple[Ingredient, ...] | None
) -> bool:
    """Whether an export was made with a knowledge of these candidates.

    `findings` is what its manifest says of the soup. A candidate whose weights are gone since then
    makes no difference. Without a soup (`candidates` is None) the export must not be one.
    """
    if candidates is None:
        return not averaged_runs(findings)
    tried = {entry["run_digest"] for entry in findings["tried"]} if findings else set()
    return all(candidate.run.digest() in tried for candidate in candidates)


def plan_soup(
    session: Session,
    folder: Path,
    candidates: tuple[Ingredient, ...] | None,
    earlier: Mapping[str, Any] | None,
) -> Soup | None:
    """The soup that is exported, its ingredients retrained where the winner is; None: no soup.

    Args:
        session: The command's session.
        folder: The study's folder.
        candidates: What `soup_candidates` gave.
        earlier: The manifest of an earlier export of the same winner; None: there is none.

    Raises what a worker refuses, and Interrupted.
    """
    if candidates is None:
        return None
    known = earlier.get("soup") if earlier is not None else None
    if earlier is not None and is_current(known, candidates):
        return Soup((), {}, known) if known else None
    if not candidates:
        session.console.note(
            "no soup: the weights of fewer than two trials of the winner's model and data are kept "
            "(search.keep)"
        )
        return None
    soup = choose_soup(session, candidates)
    averaged = averaged_runs(soup.findings)
    if not averaged or averaged == averaged_runs(known) or not session.settings.search.retrain:
        return soup
    return retrain_ingredients(session, soup, folder)


def choose_soup(session: Session, candidates: tuple[Ingredient, ...]) -> Soup:
    """Has a worker choose the ingredients; none where no soup is better than the winner."""
    winner = candidates[0]
    recipe = winner.run.recipe.model_copy(update={"fit": "train"})
    folders = tuple(str(Path(candidate.weights_file).parent) for candidate in candidates)
    choice: SoupChoice = session.run_job(
        "tuner.training.soup:choose_soup",
        SoupJob(
            session.retraining_assignment(replace(winner.run, recipe=recipe), Path(folders[0])),
            candidates,
        ),
        folders_to_keep=folders,
        stall=stall_of(session.settings.engine, paced=False),
    )
    crash_point("soup.chosen")
    search = session.settings.search
    scores = [score for _, score, stays in choice.tried if stays]
    taken = is_improvement(scores[-1], scores[0], search.direction or "maximise")
    findings = {
        "metric": str(search.metric),
        "taken": taken,
        "score": scores[-1],
        "winner_score": scores[0],
        "tried": [
            {
                "trial": number,
                "score": score if math.isfinite(score) else None,
                "stays": stays,
                "run_digest": candidate.run.digest(),
                "recipe": candidate.run.recipe.model_dump(),
                "seed": candidate.run.seed,
            }
            for candidate, (number, score, stays) in zip(candidates, choice.tried, strict=True)
        ],
    }
    staying = zip(candidates, choice.tried, strict=True)
    ingredients = tuple(candidate for candidate, (_, _, stays) in staying if stays)
    return Soup(ingredients if taken else (), choice.scores, findings)


def retrain_ingredients(session: Session, soup: Soup, folder: Path) -> Soup:
    """Trains the ingredients again, as the winner is without a soup.

    A training that was killed is continued from its checkpoints. Where another trial than the
    winner diverges, there is no soup.
    """
    start = time.monotonic()
    ingredients = []
    for ingredient in soup.ingredients:
        number = ingredient.trial_number
        kept = (folder / CHECKPOINTS_FOLDER / CHECKPOINTS_NAME.format(trial=number)).absolute()
        try:
            weights_file = session.run_job(
                "tuner.training.soup:retrain_ingredient",
                session.retraining_assignment(ingredient.run, kept),
                session.console.show_retraining(ingredient.run, ingredient=number),
                finish_epoch=True,
                folders_to_keep=(str(kept),),
                stall=stall_of(session.settings.engine, paced=True),
            )
        except NoUsableTrial as error:
            if ingredient is soup.ingredients[0]:
                raise
            session.console.warn(f"no soup: trial {number} again: {error}")
            failed = {"trial": number, "reason": str(error)}
            return Soup((), {}, {**soup.findings, "taken": False, "failed": failed})
        finally:
            session.console.close_bars()
        ingredients.append(replace(ingredient, weights_file=weights_file))
    seconds = time.monotonic() - start
    return replace(soup, ingredients=tuple(ingredients), seconds=seconds)


def remove_soup_checkpoints(folder: Path) -> None:
    """Removes what the retrainings of ingredients left in a study's folder."""
    for path in (folder / CHECKPOINTS_FOLDER).glob(CHECKPOINTS_NAME.format(trial="*")):
        remove_training_checkpoints(path)
