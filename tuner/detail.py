"""A study as the dashboard's page loads it, for thousands of trials: each is put into words once, and not at every look.

Optuna's own way reads every value as an object, and searches the notes of all trials for those of each.
"""

import json
import re
import threading
from typing import Any

import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

CURVES = 500  # up to so many trials the page draws every learning curve
BEST, LATEST = 50, 50  # beyond, those of the best and of the latest: a browser needs a minute for ten thousand lines
OF_TRIAL = re.compile(r"(?:dashboard|dashboard:artifacts):(\d+):")  # what a study keeps for one of its trials

Attributes = dict[str, str]  # key -> JSON


class Detail:
    """One study's answers. `cached` is `database` behind Optuna's cache of what has ended."""

    def __init__(self, database: RDBStorage, cached: BaseStorage, study: int) -> None:
        from optuna_dashboard._inmemory_cache import InMemoryCache

        self.database, self.cached, self.study = database, cached, study
        self.cache = InMemoryCache()
        self.lock = threading.Lock()
        self.words: dict[int, tuple[Attributes, str, str]] = {}  # trial id -> its attributes in the study, itself, its curve
        self.ended: set[int] = set()  # numbers of the trials that have ended and been counted in `cache`

    def answer(self, after: int) -> bytes:
        """The JSON that the page asks for: the study, and its trials from number `after` on."""
        from optuna_dashboard import _storage

        with self.lock:
            trials = _storage.get_trials(self.cache, self.cached, self.study)
            own, of_trials = self._attributes()
            shown = curves(trials)
            texts = [self._text(trial, of_trials.get(trial._trial_id, {}), shown) for trial in trials][after:]
            rest = self._rest(trials, own, of_trials)
        return f'{json.dumps(rest)[:-1]}, "trials": [{", ".join(texts)}]}}'.encode()

    def _attributes(self) -> tuple[Attributes, dict[int, Attributes]]:
        """The study's own attributes, and those that it keeps for its trials: notes."""
        kind = models.StudySystemAttributeModel
        query = sqlalchemy.select(kind.key, kind.value_json).where(kind.study_id == self.study)
        own: Attributes = {}
        of_trials: dict[int, Attributes] = {}
        with self.database.engine.connect() as connection:
            for key, text in connection.execute(query.order_by(kind.study_system_attribute_id)):
                match = OF_TRIAL.match(key)
                (of_trials.setdefault(int(match[1]), {}) if match else own)[key] = text
        return own, of_trials

    def _text(self, trial: FrozenTrial, attributes: Attributes, shown: set[int] | None) -> str:
        known = self.words.get(trial._trial_id)
        if known is None or known[0] != attributes:
            known = attributes, *worded(self.study, trial, attributes)
            if trial.state.is_finished():
                self.words[trial._trial_id] = known
        _, text, curve = known
        return f'{text[:-1]}, "intermediate_values": {curve if shown is None or trial.number in shown else "[]"}}}'

    def _rest(self, trials: list[FrozenTrial], own: Attributes, of_trials: dict[int, Attributes]) -> dict[str, Any]:
        """Everything but the trials."""
        from optuna_dashboard import _serializer
        from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
        from optuna_dashboard._inmemory_cache import get_cached_extra_study_property

        directions = self.cached.get_study_directions(self.study)
        attributes = decoded(own)
        name, user = self.cached.get_study_name_from_id(self.study), self.cached.get_study_user_attrs(self.study)
        study = FrozenStudy(name, None, user, attributes, self.study, directions=directions)
        extra = get_cached_extra_study_property(self.cache, self.study, [t for t in trials if t.number not in self.ended])
        self.ended |= {t.number for t in trials if t.state.is_finished()}
        rest: dict[str, Any] = _serializer.serialize_study_detail(study, [], [], *extra, get_plotly_graph_objects(attributes), [])
        del rest["trials"]
        if any(trial.state == TrialState.COMPLETE for trial in trials):
            best = self.cached.get_best_trial(self.study)
            rest["best_trials"] = [_serializer.serialize_frozen_trial(self.study, best, decoded(of_trials.get(best._trial_id, {})))]
        return rest


def worded(study: int, trial: FrozenTrial, attributes: Attributes) -> tuple[str, str]:
    """A trial as the page has it, and its curve apart."""
    from optuna_dashboard import _serializer

    tree = _serializer.serialize_frozen_trial(study, trial, decoded(attributes))
    curve = json.dumps(tree.pop("intermediate_values"))
    return json.dumps(tree), curve


def decoded(attributes: Attributes) -> dict[str, Any]:
    return {key: json.loads(text) for key, text in attributes.items()}


def curves(trials: list[FrozenTrial]) -> set[int] | None:
    """Numbers of the trials whose learning curves are drawn; None: all are."""
    if len(trials) <= CURVES:
        return None
    completed = sorted((t for t in trials if t.state == TrialState.COMPLETE and t.values), key=lambda t: (float(t.values[0]), -t.number))
    running = [t for t in trials if not t.state.is_finished()]
    return {t.number for t in (*completed[-BEST:], *trials[-LATEST:], *running)}
