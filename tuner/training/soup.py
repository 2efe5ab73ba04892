"""Model soups: the average of the weights of several trials of one model.

Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time, ICML 2022. The soup is greedy: it begins with the winner, takes
the other trials in the order of their scores, and each stays where the score of the average on the
validation examples does not fall.

BatchNorm needs care, because trials may have frozen its statistics or have let them adapt, and then
equal scales and shifts mean different outputs. So each ingredient is first given the statistics of
the training examples, with scales and shifts by which its outputs stay (`adopt_statistics`). Scale
and shift of a channel are then the deviation and the mean of what it puts out, in every ingredient,
whatever it froze; these are averaged. The statistics of the average are estimated anew, since those
of its ingredients are not its own: so each channel of the soup puts out the averaged deviation and
mean (REPAIR: Jordan et al., ICLR 2023). The stages that all ingredients froze are equal in all of
them and stay untouched and cached.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tuner.config.objective import Direction, is_improvement
from tuner.config.run import Run
from tuner.errors import DataError, NoUsableTrial
from tuner.files.checkpoint_files import find_best_weights, read_verified
from tuner.files.crash_points import crash_point
from tuner.messages import Assignment, Epoch, Ingredient, SoupChoice, SoupJob
from tuner.training.batch_norm import (
    adopt_statistics,
    estimate_statistics,
    norms_with_statistics,
)
from tuner.training.checkpoint_content import load_best_weights, read_header
from tuner.training.devices import select_device
from tuner.training.epoch import Diverged, TrainingContext, predict_source
from tuner.training.own_metric import score_own_metric
from tuner.training.preparation import prepare_training
from tuner.training.rank_launcher import call_on_ranks
from tuner.training.training_loop import copy_state, fit, open_checkpoints, run_training_examples

State = dict[str, Tensor]
"""A state dict of a net."""


def choose_soup(job: SoupJob, report: Callable[[Epoch], bool], slot: int) -> SoupChoice:
    """Chooses the ingredients of a soup by the scores of averages on the validation examples.

    Args:
        job: The candidates, the winner first, with the weights that their trials left.
        report: Not called.
        slot: The worker's number, from 0.

    Returns:
        Each candidate with the score of the average that it was tried in.

    Raises:
        DataError: The weights of a candidate are damaged or belong to another model.
    """
    assignment, candidates = job.assignment, job.candidates
    batch_size = assignment.run.recipe.batch_size
    context = prepare_common_stages(assignment, candidates, slot)
    start = copy_state(context)
    scores: dict[tuple[int, ...], dict[str, float]] = {}
    # The sums of the last average and of the one without its last ingredient: the next average
    # adds to one of these two.
    sums: dict[tuple[int, ...], State | None] = {(): None}

    def score_of(indices: tuple[int, ...]) -> float:
        nonlocal sums
        known = indices[:-1]
        state = read_state(context, candidates[indices[-1]], start, batch_size)
        sums = {known: sums[known], indices: add_states(sums[known], state)}
        load_average(context, sums[indices] or {}, len(indices), batch_size)
        pairs = predict_source(context, context.valid, batch_size)
        scores[indices] = context.task.score(pairs) | score_own_metric(context.metric, pairs)
        return scores[indices][context.metric]

    tried = choose_greedily(len(candidates), score_of, context.direction)
    chosen = tuple(index for index, (_, stays) in enumerate(tried) if stays)
    numbers = [candidate.trial_number for candidate in candidates]
    return SoupChoice(
        tuple((n, score, stays) for n, (score, stays) in zip(numbers, tried, strict=True)),
        scores[chosen],
    )


def choose_greedily(
    count: int, score_of: Callable[[tuple[int, ...]], float], direction: Direction
) -> list[tuple[float, bool]]:
    """The greedy rule.

    Args:
        count: The number of candidates. Candidate 0 is always in the soup.
        score_of: The score of the average of the candidates with these numbers, which rise.
        direction: Whether higher or lower scores are better.

    Returns:
        For each candidate the score of the average with it, and whether it stays: the score is
        finite and not worse than that of the average without it.
    """
    best = score_of((0,))
    chosen: tuple[int, ...] = (0,)
    tried = [(best, True)]
    for candidate in range(1, count):
        score = score_of((*chosen, candidate))
        stays = math.isfinite(score) and not is_improvement(best, score, direction)
        if stays:
            best, chosen = score, (*chosen, candidate)
        tried.append((score, stays))
    return tried


def make_soup(context: TrainingContext, ingredients: Sequence[Ingredient], batch_size: int) -> None:
    """Gives the net of `prepare_common_stages` the average of the ingredients' weights.

    Raises DataError where the weights of one are damaged or belong to another model.
    """
    start, total = copy_state(context), None
    for ingredient in ingredients:
        total = add_states(total, read_state(context, ingredient, start, batch_size))
    load_average(context, total or start, len(ingredients), batch_size)


def soup_digest(ingredients: Sequence[Ingredient]) -> str:
    """SHA-256 that names a soup as `Run.digest` names a run."""
    digests = " ".join(ingredient.run.digest() for ingredient in ingredients)
    return hashlib.sha256(digests.encode()).hexdigest()


def run_at_common_depth(run: Run, ingredients: Sequence[Ingredient]) -> Run:
    """A run that freezes the stages which all ingredients froze; without ingredients the run.

    It has no adapters, since those of the ingredients are added to its weights.
    """
    if not ingredients:
        return run
    shallowest = min((each.run.recipe for each in ingredients), key=lambda recipe: recipe.frozen)
    changes = {"freeze_depth": shallowest.freeze_depth, "freeze": shallowest.freeze, "lora": None}
    return replace(run, recipe=run.recipe.model_copy(update=changes))


def prepare_common_stages(
    assignment: Assignment, ingredients: Sequence[Ingredient], slot: int
) -> TrainingContext:
    """The context whose net has every stage that an ingredient has trained."""
    device_context = select_device(assignment.engine, Path(assignment.home), slot)
    run = run_at_common_depth(assignment.run, ingredients)
    return prepare_training(run, device_context, assignment.metric, assignment.direction)


def read_state(
    context: TrainingContext, ingredient: Ingredient, start: State, batch_size: int
) -> State:
    """The state of the net with an ingredient's weights, and in BatchNorm the statistics of the
    training examples.

    `start` is the state before any training, which the stages have that the ingredient froze.
    Raises DataError.
    """
    context.net.load_state_dict(start)
    depth = ingredient.run.recipe.depth_of(context.staged_model.max_depth)
    _, suffix = context.staged_model.split(depth)
    path = Path(ingredient.weights_file)
    adapters = ingredient.run.recipe.adapters
    if not load_best_weights(path, context.staged_model.model, suffix, adapters):
        raise DataError(
            f"{path}: the weights of trial {ingredient.trial_number} are damaged or of another "
            "model; search.soup: none makes the winner without them"
        )
    adopt_statistics(
        context.net,
        norms_with_statistics(context.net),
        lambda: run_training_examples(context, batch_size),
    )
    return copy_state(context)


def add_states(total: State | None, state: State) -> State:
    """The sum of two states; integers, such as counts of batches, stay those of the first."""
    if total is None:
        return state
    return {
        name: value + state[name] if value.is_floating_point() else value
        for name, value in total.items()
    }


@torch.no_grad()
def load_average(context: TrainingContext, total: State, count: int, batch_size: int) -> None:
    """Gives the net a sum of states divided by their number.

    The statistics of BatchNorm are estimated on training examples. One state alone has its own.
    """
    context.net.load_state_dict(
        {name: v / count if v.is_floating_point() else v for name, v in total.items()}
    )
    norms = norms_with_statistics(context.net)
    if norms and count > 1:
        estimate_statistics(context.net, norms, lambda: run_training_examples(context, batch_size))


def retrain_ingredient(
    assignment: Assignment, report: Callable[[Epoch], bool], slot: int
) -> str | None:
    """Trains the run of an ingredient again, and leaves its weights in the checkpoint folder.

    A training that was killed goes on from its checkpoint, and a complete one is not repeated.

    Returns:
        The file with the weights; None when `report` returned False.

    Raises:
        NoUsableTrial: The training diverged.
        DataError, StorageError: The data cannot be read, or the weights not written.
    """
    file: str | None = call_on_ranks(
        f"{__name__}:retrain_ingredient_here", assignment, report, slot
    )
    return file


def retrain_ingredient_here(
    assignment: Assignment, report: Callable[[Epoch], bool], slot: int
) -> str | None:
    """`retrain_ingredient` in this process, which may be one of several ranks."""
    assert assignment.checkpoint_folder is not None
    run, folder = assignment.run, Path(assignment.checkpoint_folder)
    device_context = select_device(
        assignment.engine, Path(assignment.home), slot, assignment.micro_batches
    )
    try:
        context = prepare_training(run, device_context, assignment.metric, assignment.direction)
        checkpoints = open_checkpoints(run, context, folder, keep_best_weights=True)
        assert checkpoints is not None
        earlier = find_weights(folder, checkpoints.run_key)
        if earlier is not None:
            return str(earlier)
        best = None
        for progress in fit(context, run.recipe, run.seed, checkpoints):
            best = progress.best
            if not report(progress.epoch):
                return None
    except Diverged as error:
        raise NoUsableTrial(f"training diverged ({error})") from None
    if best is None:  # without validation `fit` leaves the last epoch's weights and writes none
        checkpoints.save_best_weights(context.staged_model.model, context.net)
    crash_point("soup.trained")
    return str(find_weights(folder, checkpoints.run_key))


def find_weights(folder: Path, run_key: str) -> Path | None:
    """The weights that a complete training of this run left; None where there are none."""
    path = find_best_weights(folder)
    content = read_verified(path) if path is not None else None
    return path if content is not None and read_header(content).get("run") == run_key else None
