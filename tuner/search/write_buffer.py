"""A running trial's writes, collected and then written in one transaction: Optuna makes one of each value, for 2 ms of CPU each."""

import json
import time
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import Trial, TrialState

from tuner.search.bulk_reads import insertion
from tuner.search.postgresql import Server

WAIT = 1.0  # seconds that a value may wait, so that who watches a long trial sees its epochs


class Batched:
    """What a trial takes for its storage. Its parameters, reports, attributes, files and note wait for `flush`; all else goes through.

    Parameters and reports are written once, as a trial that is carried out once does. Nothing that has ended waits: see WindowedStudy.tell.
    """

    def __init__(self, inner: BaseStorage, database: RDBStorage | Server, trial_id: int) -> None:
        self.inner, self.database, self.trial_id = inner, database, trial_id
        self.rows: dict[Any, list[dict[str, Any]]] = {}
        self.written = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        text = distribution_to_json(distribution)
        self._add(
            models.TrialParamModel,
            trial_id=trial_id,
            param_name=param_name,
            param_value=param_value_internal,
            distribution_json=text,
        )

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        kind = models.TrialIntermediateValueModel
        value, value_type = kind.intermediate_value_to_stored_repr(intermediate_value)
        self._add(
            kind,
            trial_id=trial_id,
            step=step,
            intermediate_value=value,
            intermediate_value_type=value_type,
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._add(
            models.TrialUserAttributeModel, trial_id=trial_id, key=key, value_json=json.dumps(value)
        )

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._add(
            models.TrialSystemAttributeModel,
            trial_id=trial_id,
            key=key,
            value_json=json.dumps(value),
        )

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._add(
            models.StudySystemAttributeModel,
            study_id=study_id,
            key=key,
            value_json=json.dumps(value),
        )

    def _add(self, kind: Any, **row: Any) -> None:
        self.rows.setdefault(kind, []).append(row)

    def due(self) -> bool:
        return time.monotonic() - self.written > WAIT

    def flush(self) -> None:
        """All rows or none. Raises UpdateFinishedTrialError where somebody else has ended the trial."""
        rows, self.rows = self.rows, {}
        if rows and isinstance(self.database, Server):
            self.database.insert(self.trial_id, rows)
        elif rows:
            self._insert(self.database.engine, rows)
        self.written = time.monotonic()

    def _insert(self, engine: sqlalchemy.Engine, rows: dict[Any, list[dict[str, Any]]]) -> None:
        model = models.TrialModel
        state = sqlalchemy.select(model.state).where(model.trial_id == self.trial_id)
        with engine.begin() as connection:
            for kind, values in rows.items():
                connection.execute(insertion(kind, engine.dialect.name), values)
            # read after writing: from the first row on SQLite lets nobody else write
            if connection.execute(state).scalar_one_or_none() != TrialState.RUNNING:
                raise UpdateFinishedTrialError(f"trial {self.trial_id} has ended")

    def has_study_system_attr(self, key: str) -> bool:
        """Whether the database has it: one row read, where Optuna reads the notes of all trials."""
        model = models.StudySystemAttributeModel
        trial = sqlalchemy.select(models.TrialModel.study_id).where(
            models.TrialModel.trial_id == self.trial_id
        )
        query = sqlalchemy.select(model.key).where(
            model.key == key, model.study_id == trial.scalar_subquery()
        )

        def look(_: bool) -> bool:
            with self.database.engine.connect() as connection:
                return connection.execute(query).first() is not None

        return self.database.patiently(look) if isinstance(self.database, Server) else look(False)


def batch(trial: Trial) -> Batched | None:
    """Has the trial's writes collected, where its study lies in a database; None where it does not."""
    inner = trial.storage
    database = getattr(
        inner, "_backend", inner
    )  # Optuna wraps a database into a cache of what has ended
    if not isinstance(database, (RDBStorage, Server)):
        return None
    found = Batched(inner, database, trial._trial_id)
    trial.storage = found  # type: ignore[assignment]
    return found
