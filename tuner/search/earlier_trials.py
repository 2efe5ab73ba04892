"""`search.from`: finished trials of earlier studies become trials of this study.

A trial is taken over where this file could have proposed it: its run, key by key, is one that the
file describes. It teaches sampler and pruner, it can win, and a proposal with its parameters is a
duplicate. It does not count against the budget, and its weights stay where they are: a winner that
was taken over is trained again.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from tuner.config.run import Run
from tuner.config.space import Choice, Dimension, KeyPath, Range, Space
from tuner.files.crash_points import crash_point
from tuner.search import history
from tuner.search.history import IS_DEFAULT_RECIPE, PROPOSAL, SEED, TAKEN_FROM, params_key
from tuner.search.study_identity import LOCATIONS, flat

# What a trial says of itself that holds in any study.
KEPT_ATTRIBUTES = (
    history.BEST_EPOCH,
    history.RETRAINED_EPOCHS,
    history.SCORES,
    history.THRESHOLDS,
    history.TEMPERATURE,
    history.BEST_THRESHOLDS,
    history.BEST_TEMPERATURE,
    history.COSTS,
    history.REASON,
    "seconds",
)


@dataclass(frozen=True)
class EarlierStudy:
    """A study whose trials are taken over, as the file names it; `seeds` are by trial number."""

    name: str
    space: Space
    trials: tuple[FrozenTrial, ...]
    seeds: Mapping[int, int]


@dataclass
class TakenTrials:
    """How many trials of an earlier study were taken over, and why others were not.

    `known` counts those whose parameters this study has. `left_out` counts by reason.
    """

    name: str
    taken: int = 0
    known: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """One line for the user."""
        total = self.taken + self.known + self.left_out.total()
        words = "trial was" if self.taken == 1 else "trials were"
        text = f"{self.taken} of {total} {words} taken over from study {self.name!r}"
        reasons = [f"{count} {reason}" for reason, count in self.left_out.most_common()]
        if self.known:
            reasons.insert(0, f"{self.known} whose parameters this study has")
        return text + (f"; left out: {', '.join(reasons)}" if reasons else "")


class DoesNotFit(Exception):
    """A trial that the file could not have proposed; the message follows a count of trials."""


def read_trials(space: Space, study: optuna.Study, name: str) -> EarlierStudy:
    """Read the trials of a study. `space` is the study's, `name` what the file calls it."""
    proposals = history.proposal_numbers(study)
    trials = tuple(study.get_trials(deepcopy=False))
    seeds = {t.number: history.seed_of_trial(space, t, proposals) for t in trials}
    return EarlierStudy(name, space, trials, seeds)


def take_over(
    study: optuna.Study, space: Space, earlier_studies: Sequence[EarlierStudy]
) -> list[TakenTrials]:
    """Enter the fitting trials of earlier studies into a study, each once.

    Which ones are missing follows from the study's own trials. So a command that was killed here
    continues, and none is entered twice.
    """
    trials = study.get_trials(deepcopy=False)
    known = {params_key(t.params) for t in trials if t.state.is_finished()}
    default_key = params_key(space.default_params())
    has_default = any(IS_DEFAULT_RECIPE in t.user_attrs for t in trials)
    count = sum(TAKEN_FROM in t.user_attrs for t in trials)
    results = []
    for earlier in earlier_studies:
        result = TakenTrials(earlier.name)
        for trial in earlier.trials:
            try:
                entry = _fitted(trial, earlier, space)
            except DoesNotFit as reason:
                result.left_out[str(reason)] += 1
                continue
            key = params_key(entry.params)
            if key in known or (key == default_key and has_default):
                result.known += 1  # the study's own default recipe must not become a duplicate
                continue
            if key == default_key:
                has_default = True
                entry.set_user_attr(IS_DEFAULT_RECIPE, True)
            count += 1
            entry.set_user_attr(PROPOSAL, -count)
            study.add_trial(entry)
            crash_point("search.taken")
            known.add(key)
            result.taken += 1
        results.append(result)
    return results


def _fitted(trial: FrozenTrial, earlier: EarlierStudy, space: Space) -> FrozenTrial:
    """Return a trial of an earlier study as a trial of this space. Raises DoesNotFit."""
    _require_result(trial)
    earlier_space = history.space_of_trial(earlier.space, trial)
    values = earlier_space.choose_values(FixedTrial(trial.params))
    params = space.choose_params(lambda dimension: _value_within(dimension, values))
    chosen = FixedTrial(params)
    run = space.sample(chosen)
    _require_equal(earlier_space.sample(FixedTrial(trial.params)), run)
    if trial.state != TrialState.COMPLETE and params == space.default_params():
        raise DoesNotFit("of the default recipe without a result")
    attributes = {k: v for k, v in trial.user_attrs.items() if k in KEPT_ATTRIBUTES}
    source = trial.user_attrs.get(TAKEN_FROM, f"{earlier.name} #{trial.number}")
    entry = FrozenTrial(
        number=-1,  # the storage numbers it
        trial_id=-1,
        state=trial.state,
        value=trial.value,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=params,
        distributions=chosen.distributions,
        user_attrs=attributes | {TAKEN_FROM: source, SEED: earlier.seeds[trial.number]},
        system_attrs={},
        intermediate_values=dict(trial.intermediate_values),
    )
    _set_constraints(entry, space)
    return entry


def _require_result(trial: FrozenTrial) -> None:
    """Raise DoesNotFit for a trial that says nothing about its parameters."""
    if not trial.state.is_finished():
        raise DoesNotFit("that have not ended")
    if trial.state == TrialState.FAIL:
        raise DoesNotFit("that failed")
    if history.DUPLICATE_OF in trial.user_attrs:
        raise DoesNotFit("that repeat others")
    if not trial.intermediate_values:
        raise DoesNotFit("without a score")


def _value_within(dimension: Dimension, values: Mapping[KeyPath, Any]) -> Any:
    """Return the value of a dimension. Raises DoesNotFit where it lies outside its domain."""
    value = values.get(dimension.path)
    if not _contains(dimension.domain, value):
        raise DoesNotFit(f"with {dimension.key} outside its range")
    return value


def _contains(domain: Range | Choice, value: Any) -> bool:
    if isinstance(domain, Choice):
        return any(value == option and type(value) is type(option) for option in domain.options)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isclose(domain.nearest_value(value), value, rel_tol=1e-12)


def _require_equal(before: Run, now: Run) -> None:
    """Raise DoesNotFit where a run and what this file makes of it differ in a key."""
    ignored = {*LOCATIONS, "seed"}
    earlier, later = flat(before.to_dict()), flat(now.to_dict())
    for key in [key for key in (earlier | later) if key not in ignored]:
        if earlier.get(key) != later.get(key):
            raise DoesNotFit(f"with another {key.removeprefix('recipe.')}")


def _set_constraints(entry: FrozenTrial, space: Space) -> None:
    """Set the constraints of `search.limits`. Raises DoesNotFit where a model costs too much."""
    limits = space.settings.search.limits
    costs = entry.user_attrs.get(history.COSTS, {})
    for name, limit in (limits.values() if limits else {}).items():
        if name not in costs:
            raise DoesNotFit(f"whose model's {name} were not measured")
        if costs[name] > limit:
            raise DoesNotFit(f"of a model beyond search.limits.{name}")
        entry.set_constraint(name, costs[name] / limit - 1)
