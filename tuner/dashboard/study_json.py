"""A study as the dashboard's page loads it, for thousands of trials.

Each is put into words once, and not at every look.

Optuna's own way reads every value as an object, and searches the notes of all trials for those of
each.
"""

import json
import threading
from typing import Any

import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from tuner.dashboard import cost_plot
from tuner.dashboard import dashboard_internals as internals
from tuner.search import optuna_internals

# up to so many trials the page has all learning curves in one chart; ten thousand take a browser a
# minute
MAX_CURVES = 500
# so many trials, the latest, stand in the timeline; it shows a hundred and is as slow as if it
# showed all
MAX_TIMELINE_TRIALS = 1000

Attributes = dict[str, str]  # key -> JSON


class StudyJson:
    """One study's answers. `cached` is `database` behind Optuna's cache of what has ended."""

    def __init__(self, database: RDBStorage, cached: BaseStorage, study: int) -> None:
        self.database, self.cached, self.study = database, cached, study
        self.cache = internals.new_cache()
        self.lock = threading.Lock()
        self.serialized: dict[
            int, tuple[Attributes, str]
        ] = {}  # trial id -> its attributes in the study, and what is said of it
        self.counted_numbers: set[int] = (
            set()
        )  # numbers of the trials that have ended and been counted in `cache`

    def render(self, after: int) -> bytes:
        """The JSON that the page asks for: the study, and its trials from number `after` on."""
        with self.lock:
            trials = internals.read_trials(self.cache, self.cached, self.study)
            own, of_trials = self._attributes()
            texts = [self._trial_json(trial, of_trials) for trial in trials][after:]
            rest = self._study_fields(trials, own, of_trials)
        return f'{json.dumps(rest)[:-1]}, "trials": [{",".join(texts)}]}}'.encode()

    def _attributes(self) -> tuple[Attributes, dict[int, Attributes]]:
        """The study's own attributes, and those that it keeps for its trials: notes."""
        kind = optuna_internals.table("study_system_attributes").c
        query = sqlalchemy.select(kind.key, kind.value_json).where(kind.study_id == self.study)
        own: Attributes = {}
        of_trials: dict[int, Attributes] = {}
        with self.database.engine.connect() as connection:
            for key, text in connection.execute(query.order_by(kind.study_system_attribute_id)):
                match = internals.OF_TRIAL.match(key)
                (of_trials.setdefault(int(match[1]), {}) if match else own)[key] = text
        return own, of_trials

    def _trial_json(self, trial: FrozenTrial, of_trials: dict[int, Attributes]) -> str:
        number = self._id(trial)
        attributes = of_trials.get(number, {})
        known = self.serialized.get(number)
        if known is None or known[0] != attributes:
            known = (
                attributes,
                json.dumps(serialize_trial(self.study, trial, attributes), separators=(",", ":")),
            )
            if trial.state.is_finished():
                self.serialized[number] = known
        return known[1]

    def _id(self, trial: FrozenTrial) -> int:
        return optuna_internals.stored_trial_id(self.cached, self.study, trial)

    def _study_fields(
        self, trials: list[FrozenTrial], own: Attributes, of_trials: dict[int, Attributes]
    ) -> dict[str, Any]:
        """Everything but the trials."""
        directions = self.cached.get_study_directions(self.study)
        attributes = decode_attributes(own)
        name, user = (
            self.cached.get_study_name_from_id(self.study),
            self.cached.get_study_user_attrs(self.study),
        )
        study = optuna_internals.frozen_study(name, user, attributes, self.study, directions)
        extra = internals.search_space(
            self.cache, self.study, [t for t in trials if t.number not in self.counted_numbers]
        )
        self.counted_numbers |= {t.number for t in trials if t.state.is_finished()}
        rest = internals.describe_study(study, extra)
        del rest["trials"]
        label = rest.get("objective_names", ["score"])[0]
        plots = cost_plot.cost_plot(trials, directions[0], label)
        rest["plotly_graph_objects"] += [
            {"id": name, "graph_object": plot} for name, plot in plots.items()
        ]
        if any(trial.state == TrialState.COMPLETE for trial in trials):
            best = self.cached.get_best_trial(self.study)
            rest["best_trials"] = [
                serialize_trial(self.study, best, of_trials.get(self._id(best), {}))
            ]
        rest["has_intermediate_values"] &= (
            len(trials) <= MAX_CURVES
        )  # each trial's own page has its curve all the same
        return rest


def serialize_trial(study: int, trial: FrozenTrial, attributes: Attributes) -> dict[str, Any]:
    """A trial as the page has it."""
    return internals.describe_trial(study, trial, decode_attributes(attributes))


def decode_attributes(attributes: Attributes) -> dict[str, Any]:
    return {key: json.loads(text) for key, text in attributes.items()}
