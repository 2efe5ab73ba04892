"""What stands between Optuna's cache of ended trials and its database.

Beside optuna_internals.py this is the only module of the search that uses inner names of Optuna.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial

from tuner.errors import StorageError
from tuner.search.optuna_internals import missing_message

T = TypeVar("T")
# Every method of its database that Optuna's cache calls, except `_create_new_trial`.
DATABASE_METHODS = frozenset(
    [
        "create_new_study",
        "delete_study",
        "get_all_studies",
        "get_study_id_from_name",
        "get_study_name_from_id",
        "get_study_directions",
        "get_study_user_attrs",
        "get_study_system_attrs",
        "set_study_user_attr",
        "set_study_system_attr",
        "get_trial",
        "get_all_trials",
        "get_trial_id_from_study_id_trial_number",
        "set_trial_state_values",
        "set_trial_intermediate_value",
        "set_trial_user_attr",
        "set_trial_system_attr",
        "record_heartbeat",
        "get_heartbeat_interval",
        "get_heartbeat_stale_trial_callback",
        "_get_trials",
        "_set_trial_param",
        "_get_best_trial_id",
        "_get_stale_trial_ids",
    ]
)


class DatabaseProxy:
    """Stands between Optuna's cache and its database, and has every method that the cache calls.

    A subclass decides in `call_database` how the database is called, and overrides the methods
    that need more than that. The methods are listed in DATABASE_METHODS. So a method that another
    version of Optuna adds is an AttributeError, and is never called by a way that does not suit it.

    Relies on the cache making trials with `_create_new_trial`, and on its attribute `_backend`.
    """

    database: RDBStorage

    def call_database(self, method: Callable[..., T], *arguments: Any, **named: Any) -> T:
        return method(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name not in DATABASE_METHODS:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return functools.partial(self.call_database, getattr(self.database, name))

    def create_trial(self, study_id: int, template: FrozenTrial | None) -> FrozenTrial:
        """Make a trial, by default a running one."""
        return self.database._create_new_trial(study_id, template)

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        return self.create_trial(study_id, template_trial)

    def put_before(self, storage: BaseStorage) -> None:
        """Make the storage call this object instead of its database."""
        if getattr(storage, "_backend", None) is not self.database:
            raise StorageError(missing_message(["_CachedStorage._backend"]))
        storage._backend = self  # type: ignore[attr-defined]
