"""What a study's finished trials tell: the best, the default recipe, and the run behind a trial."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.config.run import Run
from tuner.config.space import Space
from tuner.errors import NoUsableTrial
from tuner.search.samplers import derive_seed

PROPOSAL, ATTEMPT, REASON, DUPLICATE_OF = (
    "tuner:root",
    "tuner:attempt",
    "tuner:reason",
    "tuner:same_as",
)
BEST_EPOCH, SCORES = "best_epoch", "scores"
FAILED_PERMANENTLY, TRACEBACK = "tuner:final", "tuner:trace"
KILLED = "tuner:killed"  # how many earlier attempts of a trial a memory limit ended
REFUSED = "tuner:refused"  # whether an earlier attempt was refused by its worker
OWNER = "tuner:owner"  # which coordinator runs a trial, where there may be several
IS_DEFAULT_RECIPE = (
    "tuner:default"  # whether a trial that was asked for at the beginning is the default recipe
)


def params_key(params: Mapping[str, Any]) -> str:
    """Equal keys, equal parameters."""
    return json.dumps(sorted(params.items()))


def requested_params(trial: FrozenTrial) -> dict[str, Any]:
    """A trial's parameters, with those that it was enqueued with and has not drawn yet."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def completed_trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_trial(study: optuna.Study) -> tuple[FrozenTrial, list[int]]:
    """The winner and the numbers of those it tied with. Rule: value, then fewer epochs, then the lower number.

    Raises NoUsableTrial when no trial has completed.
    """
    found = completed_trials(study)
    if not found:
        states = Counter(t.state.name.lower() for t in study.get_trials(deepcopy=False))
        told = ", ".join(f"{n} {state}" for state, n in states.items()) or "none was run"
        raise NoUsableTrial(
            f"no trial completed ({told}), so there is nothing to export; raise search.trials or search.timeout"
        )
    own = [t for t in found if DUPLICATE_OF not in t.user_attrs]
    winner = min(own, key=winner_order)
    tied = [t.number for t in own if t.value == winner.value and t.number != winner.number]
    return winner, tied


def winner_order(trial: FrozenTrial) -> tuple[float, int, int]:
    """How completed trials are compared: the smallest tuple is the winner's.

    Higher value first, then fewer epochs, then the lower number.
    """
    epochs = int(trial.user_attrs.get(BEST_EPOCH, 0))
    return (-float(trial.value or 0.0), epochs, trial.number)


def trial_rank(trial: FrozenTrial) -> tuple[float, int, int] | None:
    """A completed trial's place among all, by the rule of `best`: smaller is better. None where it has none of its own."""
    if trial.state != TrialState.COMPLETE or DUPLICATE_OF in trial.user_attrs:
        return None
    return winner_order(trial)


def ended_proposals(study: optuna.Study) -> dict[int, tuple[float, int, int] | None]:
    """Every draw that is over, with its rank where it has one."""
    draws = proposal_numbers(study)
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return {
        draws[t.number]: trial_rank(t)
        for t in study.get_trials(deepcopy=False)
        if t.state in ended or t.user_attrs.get(FAILED_PERMANENTLY)
    }


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """The trial of the default recipe, if it has completed; in studies from before it was marked, trial 0."""
    found = completed_trials(study)
    marked = [t for t in study.get_trials(deepcopy=False) if IS_DEFAULT_RECIPE in t.user_attrs]
    if marked:
        return next((t for t in found if t.user_attrs.get(IS_DEFAULT_RECIPE)), None)
    draw = proposal_numbers(study)
    return next((t for t in found if draw[t.number] == 0), None)


def proposal_numbers(study: optuna.Study) -> dict[int, int]:
    """Trial number -> which of the search's draws it is, from 0: its own for a first attempt, the first's for a retry.

    Seeds follow the draw and not the number, which later trials lose to retries: so a disturbed search trains as a calm one.
    """
    found: dict[int, int] = {}
    asked = 0
    for t in study.get_trials(deepcopy=False):
        found[t.number] = int(t.user_attrs.get(PROPOSAL, asked))
        asked += PROPOSAL not in t.user_attrs
    return found


def run_of_trial(space: Space, study: optuna.Study, trial: FrozenTrial) -> Run:
    """The run that a trial carried out."""
    return space.sample(
        optuna.trial.FixedTrial(trial.params),
        seed=derive_seed(space.settings.search.seed, proposal_numbers(study)[trial.number]),
    )
