"""Every inner name of Optuna that tuner uses, and what happens in a version without that name.

Optuna promises nothing about these names. So each is tried before tuner relies on it (`missing`).
Where one does not do what is expected, tuner uses the public, slower way, and `warn_of_missing`
says so when a study is opened. Several coordinators on a PostgreSQL server need some of these
names: without them such a study is refused (`require_for_server`).
Only this module and database_proxy.py use inner names: see tests/search/test_optuna_internals.py.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.errors import StorageError

TESTED = "optuna>=5.0,<5.1"
READ = ("study_id", "states", "included_trial_ids", "trial_id_greater_than")
COLUMNS = {
    "studies": ("study_id", "study_name"),
    "study_directions": ("study_id", "objective", "direction"),
    "study_user_attributes": ("study_id", "key", "value_json"),
    "study_system_attributes": ("study_system_attribute_id", "study_id", "key", "value_json"),
    "trials": ("trial_id", "number", "study_id", "state", "datetime_start", "datetime_complete"),
    "trial_params": ("param_id", "trial_id", "param_name", "param_value", "distribution_json"),
    "trial_values": ("trial_value_id", "trial_id", "objective", "value", "value_type"),
    "trial_user_attributes": ("trial_user_attribute_id", "trial_id", "key", "value_json"),
    "trial_system_attributes": ("trial_system_attribute_id", "trial_id", "key", "value_json"),
    "trial_intermediate_values": (
        "trial_intermediate_value_id",
        "trial_id",
        "step",
        "intermediate_value",
        "intermediate_value_type",
    ),
}


# -- a study and its trials


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return the study's storage. Relies on `Study._storage`, which has no public counterpart."""
    storage = getattr(study, "_storage", None)
    if not isinstance(storage, BaseStorage):
        raise StorageError(missing_message(["Study._storage"]))
    return storage


def study_id_of(study: optuna.Study) -> int:
    """Return the study's id: `Study._study_id`, or the storage's answer for its name."""
    number = getattr(study, "_study_id", None)
    if isinstance(number, int):
        return number
    return storage_of(study).get_study_id_from_name(study.study_name)


def trial_id_of(study: optuna.Study, trial: Trial | FrozenTrial | int) -> int:
    """Return the id of a trial, or of the trial with that number, in the study's storage."""
    return stored_trial_id(storage_of(study), study_id_of(study), trial)


def stored_trial_id(storage: BaseStorage, study: int, trial: Trial | FrozenTrial | int) -> int:
    """Return the id of a trial of the study with that id.

    It is `_trial_id`, or the storage's answer for the trial's number.
    """
    if isinstance(trial, int):
        return storage.get_trial_id_from_study_id_trial_number(study, trial)
    number = getattr(trial, "_trial_id", None)
    if isinstance(number, int):
        return number
    return storage.get_trial_id_from_study_id_trial_number(study, trial.number)


def snapshot_of(trial: Trial) -> FrozenTrial | None:
    """Return what a running trial has reported, from memory: `Trial._cached_frozen_trial`.

    None: it must be read from the storage.
    """
    if "Trial._cached_frozen_trial" in missing():
        return None
    snapshot = trial._cached_frozen_trial
    return snapshot if isinstance(snapshot, FrozenTrial) else None


def storage_for(study: optuna.Study, trial: Trial) -> BaseStorage:
    """Return the storage that a trial writes to.

    It is the trial's own `storage`, which may be a BufferedStorage, or the storage of its study.
    """
    own: BaseStorage | None = getattr(trial, "storage", None)
    return storage_of(study) if own is None else own


def redirect(trial: Trial, storage: Any) -> bool:
    """Make the trial write to `storage`. Relies on Trial using its attribute `storage`.

    Returns:
        False where a trial does not use it. Then nothing is changed.
    """
    if "Trial.storage" in missing():
        return False
    trial.storage = storage
    return True


class HookedStudy(optuna.Study):
    """A study whose subclass decides which trials sampler and pruner see.

    The subclass also decides whether `ask` looks for enqueued trials.

    Relies on samplers calling `Study._get_trials`, and on `ask` calling
    `Study._pop_waiting_trial_id`. Where they do not, all trials are seen and each `ask` looks for
    enqueued trials, as with Optuna alone.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.storage = storage_of(study)
        super().__init__(study.study_name, self.storage, study.sampler, study.pruner)
        self.study_id = study_id_of(self)

    def visible_trials(self, states: Container[TrialState] | None) -> list[FrozenTrial] | None:
        """Return the trials that are seen. None: all trials of the storage."""
        return None

    def none_waits(self) -> bool:
        """Return whether it is certain that no trial waits."""
        return False

    def waiting_trials(self) -> list[FrozenTrial]:
        """Return the trials that wait.

        Optuna's cache would read all running trials again for this.
        """
        database: BaseStorage = database_of(self.storage)
        return database.get_all_trials(self.study_id, deepcopy=False, states=(TrialState.WAITING,))

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        visible = self.visible_trials(states)
        return super().get_trials(deepcopy, states) if visible is None else visible

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        visible = self.visible_trials(states)
        return super()._get_trials(deepcopy, states, use_cache) if visible is None else visible

    def _pop_waiting_trial_id(self) -> int | None:
        return None if self.none_waits() else super()._pop_waiting_trial_id()


# -- the database behind a storage


def database_of(storage: BaseStorage) -> Any:
    """Return the database behind a storage's cache of ended trials: `_CachedStorage._backend`.

    A storage without such a cache is its own database.
    """
    return getattr(storage, "_backend", storage)


def replace_reads(
    database: RDBStorage,
    read_trials: Callable[..., list[FrozenTrial]],
    read_studies: Callable[[], list[Any]],
) -> None:
    """Make a database read its trials and studies by these functions.

    Relies on `RDBStorage._get_trials`, by which both the database and the cache read trials.
    """
    if "RDBStorage._get_trials" not in missing():
        database._get_trials = read_trials  # type: ignore[method-assign]
    if "FrozenStudy" not in missing():
        database.get_all_studies = read_studies  # type: ignore[method-assign]


def frozen_study(
    name: str, user: dict[str, Any], system: dict[str, Any], study_id: int, directions: list[Any]
) -> Any:
    """Return a study as a storage lists it."""
    from optuna.study._frozen import FrozenStudy

    return FrozenStudy(name, None, user, system, study_id, directions=directions)


# -- the tables


def table(name: str) -> sqlalchemy.Table:
    """Return one of Optuna's tables. It has the COLUMNS if `tables_known()`."""
    from optuna.storages._rdb.models import BaseModel

    result: sqlalchemy.Table = BaseModel.metadata.tables[name]
    return result


def tables_known() -> bool:
    return TABLES not in missing()


def value_from(row_value: float | None, kind: Any) -> float:
    """Return a trial's value from its two columns: not every database can store infinity."""
    from optuna.storages._rdb.models import TrialValueModel

    return TrialValueModel.stored_repr_to_value(row_value, kind)


def report_from(row_value: float | None, kind: Any) -> float:
    """Return an intermediate value from its two columns."""
    from optuna.storages._rdb.models import TrialIntermediateValueModel

    return TrialIntermediateValueModel.stored_repr_to_intermediate_value(row_value, kind)


def report_columns(value: float) -> tuple[float | None, Any]:
    """Return the two columns of an intermediate value: the inverse of `report_from`."""
    from optuna.storages._rdb.models import TrialIntermediateValueModel

    return TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)


# -- does this version of Optuna have them?

TABLES = "the tables of optuna.storages._rdb.models"
FOR_SERVER = (TABLES, "_CachedStorage._backend", "RDBStorage._create_new_trial")


@functools.cache
def missing() -> tuple[str, ...]:
    """Return the inner names that do not exist or do not do what tuner expects.

    Each is tried once in a process.
    """
    return tuple(name for name, probe in PROBES.items() if not _works(probe))


def warn_of_missing(warn: Callable[[str], None]) -> None:
    if missing():
        warn(
            f"{missing_message(missing())}. "
            "The search is right without, and slower with many trials"
        )


def require_for_server(shown: str) -> None:
    """Raise StorageError where locks and owners of trials cannot be relied on.

    Several coordinators need them, so that they do not run the same trial.
    """
    lacking = [name for name in missing() if name in FOR_SERVER]
    if lacking:
        raise StorageError(
            f"storage: {shown} cannot be used: the locks and owners of its coordinators need more "
            f"of Optuna. {missing_message(lacking)}; "
            "without `storage:` the study is in a file of its own"
        )


def missing_message(names: Sequence[str]) -> str:
    return (
        f"Optuna {optuna.__version__} has no {', '.join(names)} as tuner knows it; "
        f"install what tuner was tested with: pip install '{TESTED}'"
    )


def _works(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except Exception:  # another version of Optuna may raise anything: then a name is unusable
        return False


class Recorder:
    """Records which methods are called, and passes the calls on to `inner`, if any."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner
        self.calls: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.calls.add(name)
        if self.inner is None:
            raise NotImplementedError(name)
        return getattr(self.inner, name)


class _Probe(HookedStudy):
    """A study in memory that records which hooks were called."""

    def __init__(self) -> None:
        storage = InMemoryStorage()
        storage.create_new_study([StudyDirection.MAXIMIZE], "probe")
        sampler = optuna.samplers.TPESampler(n_startup_trials=0, seed=0)
        self.hooks: set[str] = set()
        super().__init__(optuna.Study("probe", storage, sampler, optuna.pruners.NopPruner()))

    def _get_trials(self, *arguments: Any, **named: Any) -> list[FrozenTrial]:
        self.hooks.add("_get_trials")
        return super()._get_trials(*arguments, **named)

    def _pop_waiting_trial_id(self) -> int | None:
        self.hooks.add("_pop_waiting_trial_id")
        return super()._pop_waiting_trial_id()


def _hook_is_called(name: str) -> bool:
    study = _Probe()
    study.ask().suggest_float("x", 0, 1)
    return name in study.hooks


def _trial_writes_to_its_storage() -> bool:
    study = _Probe()
    trial = study.ask()
    recorder = Recorder(study.storage)
    trial.storage = cast(BaseStorage, recorder)
    _use(trial)
    written = {"set_trial_param", "set_trial_intermediate_value", "set_trial_user_attr"}
    return recorder.calls >= written


def _snapshot_is_kept() -> bool:
    trial = _Probe().ask()
    _use(trial)
    snapshot = trial._cached_frozen_trial
    known = ([*snapshot.params], snapshot.intermediate_values, snapshot.user_attrs)
    return known == (["x"], {1: 0.5}, {"key": "value"})


def _use(trial: Trial) -> None:
    trial.suggest_float("x", 0, 1)
    trial.report(0.5, 1)
    trial.set_user_attr("key", "value")


def _cache_calls_its_backend() -> bool:
    from optuna.storages._cached_storage import _CachedStorage

    recorder = Recorder()
    storage = _CachedStorage(cast(RDBStorage, Recorder()))
    storage._backend = cast(RDBStorage, recorder)
    calls: list[Callable[[], Any]] = [
        lambda: storage.create_new_trial(1),
        lambda: storage.set_trial_state_values(1, TrialState.RUNNING),
        lambda: storage.get_trial(1),
        lambda: storage.set_trial_user_attr(1, "key", "value"),
    ]
    for call in calls:
        with contextlib.suppress(NotImplementedError):
            call()
    wanted = {"_create_new_trial", "set_trial_state_values", "get_trial", "set_trial_user_attr"}
    return recorder.calls >= wanted


def _has_parameters(method: Any, *names: str) -> bool:
    return tuple(inspect.signature(method).parameters)[1:] == names


def _frozen_study_works() -> bool:
    study = frozen_study("name", {"a": 1}, {"b": 2}, 7, [StudyDirection.MAXIMIZE])
    known = (study.study_name, study.user_attrs, study.system_attrs)
    return known == ("name", {"a": 1}, {"b": 2})


def _tables_are_there() -> bool:
    infinity = float("inf")
    return report_from(*report_columns(infinity)) == infinity and all(
        {*table(name).columns.keys()} >= {*columns} for name, columns in COLUMNS.items()
    )


PROBES: dict[str, Callable[[], bool]] = {
    "Study._get_trials": lambda: _hook_is_called("_get_trials"),
    "Study._pop_waiting_trial_id": lambda: _hook_is_called("_pop_waiting_trial_id"),
    "Trial._cached_frozen_trial": _snapshot_is_kept,
    "Trial.storage": _trial_writes_to_its_storage,
    "_CachedStorage._backend": _cache_calls_its_backend,
    "RDBStorage._create_new_trial": lambda: _has_parameters(
        RDBStorage._create_new_trial, "study_id", "template_trial"
    ),
    "RDBStorage._get_trials": lambda: (
        _tables_are_there() and _has_parameters(RDBStorage._get_trials, *READ)
    ),
    "FrozenStudy": _frozen_study_works,
    TABLES: _tables_are_there,
}
