"""What the finished trials of a study say: the winner, the default recipe, the run of a trial."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner.config.run import Run
from tuner.config.space import Space, key_of_parameter
from tuner.errors import NoUsableTrial
from tuner.search.samplers import derive_seed

FREEZE_KEYS = ("freeze_depth", "freeze")  # of the recipe; a file has one of them
# Attributes of a trial. The strings are in the databases of existing studies: never change them.
PROPOSAL = "tuner:root"  # of a retry: the number of the proposal that it repeats
OVER_LIMIT = "over_limit"  # the reason of a trial beyond search.limits begins so
ATTEMPT = "tuner:attempt"  # which attempt a trial is, from 1
REASON = "tuner:reason"  # why a trial failed or was pruned
DUPLICATE_OF = "tuner:same_as"  # the number of the trial whose result this trial has
BEST_EPOCH = "best_epoch"
# to which epoch the trial is trained again; not there: to the best one
RETRAINED_EPOCHS = "tuner:retrained_epochs"
SCORES = "scores"  # all scores of the best epoch
# of the epoch to which it is trained again: of the labels, and where the task has one
THRESHOLDS = "thresholds"
TEMPERATURE = "temperature"
# of the best epoch, where the trial is trained again to another one
BEST_THRESHOLDS = "tuner:best_thresholds"
BEST_TEMPERATURE = "tuner:best_temperature"
COSTS = "tuner:costs"  # of its model, where there are limits
FAILED_PERMANENTLY = "tuner:final"  # whether a failed trial is not tried again
TRACEBACK = "tuner:trace"
KILLED = "tuner:killed"  # how many earlier attempts of a trial a memory limit ended
REFUSED = "tuner:refused"  # whether a worker refused an earlier attempt
SPLIT_SIZES = "tuner:split_sizes"  # of a study: the numbers of training and validation examples
MACRO_COUNT = "tuner:macro_count"  # of a study: as a DatasetReport has it
BUDGET = "tuner:budget"  # of a study: the number of trials after which its search ends
TAKEN_FROM = "tuner:from"  # of a trial of another study: "STUDY #NUMBER"
SEED = "tuner:seed"  # of such a trial's training
OWNER = "tuner:owner"  # which coordinator runs a trial, where there may be several
# of the trials that were enqueued at the beginning: whether the trial is the default recipe
IS_DEFAULT_RECIPE = "tuner:default"

Rank = tuple[float, int, int]


def params_key(params: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal parameters."""
    return json.dumps(sorted(params.items()))


def requested_params(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's parameters, also those that it was enqueued with and has not asked for."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def completed_trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def sign_of(direction: StudyDirection) -> int:
    """Return 1 where higher values are better, and -1 where lower ones are.

    Of values that are multiplied by it, the higher one is the better one.
    """
    return -1 if direction == StudyDirection.MINIMIZE else 1


def trial_rank(trial: FrozenTrial, direction: StudyDirection) -> Rank | None:
    """Return the key by which trials are compared: the smaller key is the better trial.

    The rule is: the better value, then fewer epochs, then the lower number. The winner is the
    trial with the smallest key.

    Returns:
        The key, or None for a trial that is not compared: it did not complete, or it has the
        result of another trial.
    """
    if trial.state != TrialState.COMPLETE or DUPLICATE_OF in trial.user_attrs:
        return None
    value = sign_of(direction) * float(trial.value or 0.0)
    return (-value, int(trial.user_attrs.get(BEST_EPOCH, 0)), trial.number)


def best_trial(study: optuna.Study) -> tuple[FrozenTrial, list[int]]:
    """Return the winner by `trial_rank`, and the numbers of the other trials with its value.

    Raises:
        NoUsableTrial: No trial has completed.
    """
    ranked = [
        (rank, trial)
        for trial in completed_trials(study)
        if (rank := trial_rank(trial, study.direction)) is not None
    ]
    if not ranked:
        trials = study.get_trials(deepcopy=False)
        states = Counter(t.state.name.lower() for t in trials)
        counts = ", ".join(f"{n} {state}" for state, n in states.items()) or "none was run"
        raise NoUsableTrial(
            f"no trial completed ({counts}), so there is nothing to export; "
            f"{_what_lets_one_complete(trials)}"
        )
    best_rank, winner = min(ranked, key=lambda pair: pair[0])
    best_value = best_rank[0]
    tied = [t.number for rank, t in ranked if rank[0] == best_value and t is not winner]
    return winner, tied


def _what_lets_one_complete(trials: Sequence[FrozenTrial]) -> str:
    reasons = [
        str(t.user_attrs.get(REASON, ""))
        for t in trials
        if t.state.is_finished() and DUPLICATE_OF not in t.user_attrs
    ]
    beyond = [reason for reason in reasons if reason.startswith(OVER_LIMIT)]
    if reasons and len(beyond) == len(reasons):
        cost = beyond[0].removeprefix(f"{OVER_LIMIT}: ")
        return f"every model is beyond search.limits ({cost}); raise them, or search other models"
    return "raise search.trials or search.timeout"


def keep_split_sizes(
    study: optuna.Study, train: int, valid: int, macro_count: float | None = None
) -> None:
    """Write the numbers of training and validation examples into a study in which no trial began.

    `macro_count`: as a DatasetReport has it. A study of an earlier version stays without them, so
    that its export stays current.
    """
    own_trials = [t for t in study.get_trials(deepcopy=False) if TAKEN_FROM not in t.user_attrs]
    states = {trial.state for trial in own_trials}
    if SPLIT_SIZES not in study.user_attrs and states <= {TrialState.WAITING}:
        study.set_user_attr(SPLIT_SIZES, [train, valid])
        if macro_count is not None:
            study.set_user_attr(MACRO_COUNT, macro_count)


def keep_budget(study: optuna.Study, trials: int) -> None:
    """Write after how many trials the search ends, for commands that do not read the space.

    A grid has fewer combinations than `search.trials` may say, and a file without ranges has one.
    """
    if study.user_attrs.get(BUDGET) != trials:
        study.set_user_attr(BUDGET, trials)


def train_share(study: optuna.Study) -> float:
    """Return the share of the training examples in those of training and validation together.

    It is 1 for a study of an earlier version, which does not know it.
    """
    train, valid = study.user_attrs.get(SPLIT_SIZES, (1, 0))
    return float(train / (train + valid))


def validation_count(study: optuna.Study, folds: int, *, is_macro: bool = False) -> float:
    """Return of how many examples the noise of a validation score is; 0: it is not known.

    A study of an earlier version does not know it. With several folds a trial is validated on all
    training and validation examples.

    Args:
        study: The study.
        folds: The folds of a trial's run.
        is_macro: Whether the score is a mean over classes, which has the noise of the rare ones.
    """
    train, valid = study.user_attrs.get(SPLIT_SIZES, (0, 0))
    count = float(train + valid if folds > 1 else valid)
    if is_macro and valid and MACRO_COUNT in study.user_attrs:
        count *= study.user_attrs[MACRO_COUNT] / valid
    return count


def ended_proposals(study: optuna.Study) -> dict[int, Rank | None]:
    """Return every proposal that has ended, with the rank of its trial where it has a rank."""
    proposals, direction = proposal_numbers(study), study.direction
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return {
        proposals[t.number]: trial_rank(t, direction)
        for t in study.get_trials(deepcopy=False)
        if t.state in ended or t.user_attrs.get(FAILED_PERMANENTLY)
    }


def own_proposals(study: optuna.Study) -> dict[int, Rank | None]:
    """Return `ended_proposals` without the trials of other studies: what counts as the budget."""
    return {number: rank for number, rank in ended_proposals(study).items() if number >= 0}


def pareto_front(trials: Sequence[FrozenTrial], direction: StudyDirection) -> list[FrozenTrial]:
    """Return those of some completed trials that none beats in both score and time, by time."""
    sign = sign_of(direction)
    timed = [(t.duration, -sign * float(t.value or 0), t) for t in trials if t.duration is not None]
    front: list[FrozenTrial] = []
    best = math.inf
    for _, value, trial in sorted(timed, key=lambda row: row[:2]):
        if value < best:
            best = value
            front.append(trial)
    return front


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial of the default recipe, or None where it has not completed.

    Old studies do not mark that trial. In such a study it is the trial of proposal 0. A newer study
    that ended before the default recipe marks none either: its first trial is the linear probe,
    which freezes more than the space asks for.
    """
    completed = completed_trials(study)
    if any(IS_DEFAULT_RECIPE in t.user_attrs for t in study.get_trials(deepcopy=False)):
        return next((t for t in completed if t.user_attrs.get(IS_DEFAULT_RECIPE)), None)
    proposals = proposal_numbers(study)
    first = next((t for t in completed if proposals[t.number] == 0), None)
    return first if first is not None and not _could_freeze_less(first) else None


def _could_freeze_less(trial: FrozenTrial) -> bool:
    """Return whether a trial froze more than the least that its space allows."""
    for name, value in trial.params.items():
        if key_of_parameter(name) in FREEZE_KEYS:
            domain = trial.distributions[name]
            allowed = getattr(domain, "choices", None) or (getattr(domain, "low", value),)
            if (value or 0) > min(choice or 0 for choice in allowed):
                return True
    return False


def proposal_numbers(study: optuna.Study) -> dict[int, int]:
    """Return the proposal of each trial, by the trial's number.

    Proposals count from 0. A first attempt is a new proposal. A retry repeats the proposal of its
    first attempt. Seeds follow the proposal and not the trial's number, because a retry moves the
    numbers of all later trials. So an interrupted search trains as an uninterrupted one.
    The trials that `search.from` took over are none of this study's proposals: theirs are negative.
    """
    proposals: dict[int, int] = {}
    proposal_count = 0
    for t in study.get_trials(deepcopy=False):
        proposals[t.number] = int(t.user_attrs.get(PROPOSAL, proposal_count))
        if PROPOSAL not in t.user_attrs:
            proposal_count += 1
    return proposals


def run_of_trial(space: Space, study: optuna.Study, trial: FrozenTrial) -> Run:
    """Return the run that a trial carried out."""
    seed = seed_of_trial(space, trial, proposal_numbers(study))
    return space_of_trial(space, trial).sample(optuna.trial.FixedTrial(trial.params), seed=seed)


def space_of_trial(space: Space, trial: FrozenTrial) -> Space:
    """Return the space as a finished trial was drawn from it: it searches the trial's parameters.

    An earlier version did not see that the condition `label_smoothing: 0.3` is met where the
    sampler had made 0.30000000000000004 of it; the key that depends on it had its default.
    """
    drawn = tuple(d for d in space.dimensions if d.name in trial.params)
    others = {d.path for d in space.dimensions} - {d.path for d in drawn}
    defaults = {path: space.defaults.get(path, space.values[path]) for path in others}
    return replace(space, dimensions=drawn, values={**space.values, **defaults})


def seed_of_trial(space: Space, trial: FrozenTrial, proposals: Mapping[int, int]) -> int:
    """Return the seed of a trial's training.

    Args:
        space: The space of the study.
        trial: The trial.
        proposals: The proposal of each trial, by the trial's number.
    """
    derived = derive_seed(space.settings.search.seed, proposals[trial.number])
    return int(trial.user_attrs.get(SEED, derived))
