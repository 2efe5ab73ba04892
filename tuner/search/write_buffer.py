"""The writes of a running trial, collected and then written in one transaction.

Optuna writes each value in a transaction of its own, which costs 2 ms of CPU each.
"""

import json
import time
from typing import Any

import sqlalchemy
from optuna import Study
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import Trial, TrialState

from tuner.search import optuna_internals
from tuner.search.bulk_reads import insertion
from tuner.search.postgresql import PostgresStorage

# Seconds that a value may wait. So a person who watches a long trial sees its epochs soon.
MAX_DELAY = 1.0


class BufferedStorage:
    """The storage that a running trial writes to.

    Parameters, reports, attributes, files and the note wait for `flush`. All other calls go to the
    storage behind it, `inner`.

    A parameter or report is inserted and never replaced, because a trial is carried out once. When
    a trial ends, nothing of it waits: see WindowedStudy.tell.
    """

    def __init__(
        self, inner: BaseStorage, database: RDBStorage | PostgresStorage, trial_id: int
    ) -> None:
        self.inner, self.database, self.trial_id = inner, database, trial_id
        self.pending_rows: dict[str, list[dict[str, Any]]] = {}  # by table
        self.last_flush = time.monotonic()

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
        self._add_row(
            "trial_params",
            trial_id=trial_id,
            param_name=param_name,
            param_value=param_value_internal,
            distribution_json=text,
        )

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        value, value_type = optuna_internals.report_columns(intermediate_value)
        self._add_row(
            "trial_intermediate_values",
            trial_id=trial_id,
            step=step,
            intermediate_value=value,
            intermediate_value_type=value_type,
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._add_row(
            "trial_user_attributes", trial_id=trial_id, key=key, value_json=json.dumps(value)
        )

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._add_row(
            "trial_system_attributes",
            trial_id=trial_id,
            key=key,
            value_json=json.dumps(value),
        )

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._add_row(
            "study_system_attributes",
            study_id=study_id,
            key=key,
            value_json=json.dumps(value),
        )

    def _add_row(self, table: str, **row: Any) -> None:
        self.pending_rows.setdefault(table, []).append(row)

    def is_due(self) -> bool:
        return time.monotonic() - self.last_flush > MAX_DELAY

    def flush(self) -> None:
        """Write all pending rows or none.

        Raises:
            UpdateFinishedTrialError: Another process has ended the trial.
        """
        rows, self.pending_rows = self.pending_rows, {}
        if rows and isinstance(self.database, PostgresStorage):
            self.database.insert_rows(self.trial_id, rows)
        elif rows:
            self._insert(self.database.engine, rows)
        self.last_flush = time.monotonic()

    def _insert(self, engine: sqlalchemy.Engine, rows: dict[str, list[dict[str, Any]]]) -> None:
        trials = optuna_internals.table("trials").c
        state = sqlalchemy.select(trials.state).where(trials.trial_id == self.trial_id)
        with engine.begin() as connection:
            for name, values in rows.items():
                connection.execute(insertion(name, engine.dialect.name), values)
            # Read after writing: from the first row on, SQLite lets no other process write.
            if connection.execute(state).scalar_one_or_none() != TrialState.RUNNING:
                raise UpdateFinishedTrialError(f"trial {self.trial_id} has ended")

    def has_study_system_attr(self, key: str) -> bool:
        """Return whether the study has an attribute.

        This reads one row. Optuna would read the notes of all trials.
        """
        attributes = optuna_internals.table("study_system_attributes").c
        trials = optuna_internals.table("trials").c
        study = sqlalchemy.select(trials.study_id).where(trials.trial_id == self.trial_id)
        query = sqlalchemy.select(attributes.key).where(
            attributes.key == key, attributes.study_id == study.scalar_subquery()
        )

        def read() -> bool:
            with self.database.engine.connect() as connection:
                return connection.execute(query).first() is not None

        if isinstance(self.database, PostgresStorage):
            return self.database.with_retry(read)
        return read()


def buffer_writes(study: Study, trial: Trial) -> BufferedStorage | None:
    """Make a running trial write to a buffer.

    Returns:
        The buffer, or None where the study is in no database, or where this version of Optuna
        cannot be made to do it.
    """
    inner = optuna_internals.storage_of(study)
    database = optuna_internals.database_of(inner)
    if (
        not isinstance(database, (RDBStorage, PostgresStorage))
        or not optuna_internals.tables_known()
    ):
        return None
    buffer = BufferedStorage(inner, database, optuna_internals.trial_id_of(study, trial))
    return buffer if optuna_internals.redirect(trial, buffer) else None
