"""Studies and trials read in bulk: by a few statements and as plain rows.

Optuna makes an object of each value.
"""

import json
from collections.abc import Container, Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite

from tuner.search import optuna_internals
from tuner.search.optuna_internals import table

RowsByTrial = dict[int, list[Any]]  # by trial id
UPSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
CACHED_DISTRIBUTIONS = 1024  # different distributions; a space has a few


def use_bulk_reads(database: RDBStorage) -> RDBStorage:
    """Make a database read its trials and studies in bulk.

    What is read equals what Optuna reads, value by value: see tests/search/test_bulk_reads.py.

    Returns:
        The same database.
    """

    def read(
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        with database.engine.connect() as connection:
            return read_trials(
                connection, study_id, states, included_trial_ids, trial_id_greater_than
            )

    def read_studies() -> list[Any]:
        with database.engine.connect() as connection:
            return read_all_studies(connection)

    optuna_internals.replace_reads(database, read, read_studies)
    return database


def insertion(name: str, dialect: str) -> Any:
    """Return a statement that inserts rows into a table.

    It replaces an attribute that exists already, as Optuna does.
    """
    rows = table(name)
    if dialect not in UPSERTS or "value_json" not in rows.c:
        return sqlalchemy.insert(rows)
    statement = UPSERTS[dialect](rows)
    owner = "study_id" if "study_id" in rows.c else "trial_id"
    return statement.on_conflict_do_update(
        index_elements=[owner, "key"], set_={"value_json": statement.excluded.value_json}
    )


def read_all_studies(connection: sqlalchemy.Connection) -> list[Any]:
    """Return all studies by id, as Optuna's FrozenStudy.

    A study has two attributes for each of its trials: the notes of the trial.
    """
    directions = _by_study(connection, "study_directions", "objective", "direction")
    user = _by_study(connection, "study_user_attributes", "key", "value_json")
    system = _by_study(connection, "study_system_attributes", "key", "value_json")
    study = table("studies").c
    names = connection.execute(sqlalchemy.select(study.study_id, study.study_name)).all()
    return [
        optuna_internals.frozen_study(
            name,
            {key: json.loads(text) for key, text in user.get(number, ())},
            {key: json.loads(text) for key, text in system.get(number, ())},
            number,
            [direction for _, direction in sorted(directions[number], key=lambda row: int(row[0]))],
        )
        for number, name in sorted(names)
    ]


def _by_study(connection: sqlalchemy.Connection, name: str, *columns: str) -> RowsByTrial:
    """Return these columns of a table's rows, by the id of the study."""
    column = table(name).c
    rows: RowsByTrial = {}
    query = sqlalchemy.select(column.study_id, *(column[each] for each in columns))
    for study, *cells in connection.execute(query):
        rows.setdefault(study, []).append(cells)
    return rows


def read_trials(
    connection: sqlalchemy.Connection,
    study: int,
    states: Container[TrialState] | None,
    included: set[int],
    after: int,
) -> list[FrozenTrial]:
    """Return a study's trials by id.

    Args:
        connection: To the database.
        study: The study's id.
        states: The states to read. None: all.
        included: The ids of trials to read in any case.
        after: All trials with a higher id are read too.

    Raises:
        KeyError: There is no such study.
    """
    trial, all_studies = table("trials").c, table("studies").c
    exists = sqlalchemy.select(all_studies.study_id).where(all_studies.study_id == study)
    if connection.execute(exists).first() is None:
        raise KeyError("Record does not exist.")  # Optuna's words
    wanted = trial.study_id == study
    if after > -1:
        older = sorted(number for number in included if number <= after)
        newer = trial.trial_id > after
        wanted &= sqlalchemy.or_(newer, trial.trial_id.in_(older)) if older else newer
    if states is not None:
        assert isinstance(states, Iterable)
        wanted &= trial.state.in_(list(states))
    query = sqlalchemy.select(
        trial.trial_id, trial.number, trial.state, trial.datetime_start, trial.datetime_complete
    )
    selected = connection.execute(query.where(wanted).order_by(trial.trial_id)).all()
    if not selected:
        return []
    rows = {
        name: read_values(connection, name, columns, wanted)
        for name, columns in VALUE_TABLES.items()
    }
    return [make_frozen_trial(row, rows) for row in selected]


VALUE_TABLES = {
    name: optuna_internals.COLUMNS[name]
    for name in (
        "trial_params",
        "trial_values",
        "trial_user_attributes",
        "trial_system_attributes",
        "trial_intermediate_values",
    )
}


def read_values(
    connection: sqlalchemy.Connection, name: str, columns: tuple[str, ...], wanted: Any
) -> RowsByTrial:
    """Return a table's rows of the selected trials, by trial id, in the order they were written.

    Args:
        connection: To the database.
        name: The table.
        columns: The columns: first the table's key, then the trial's id, then further columns.
        wanted: The condition that selects trials.
    """
    column, trial = table(name).c, table("trials").c
    identity, *others = (column[each] for each in columns)
    query = (
        sqlalchemy.select(*others)
        .join(table("trials"), trial.trial_id == column.trial_id)
        .where(wanted)
        .order_by(identity)
    )
    rows: RowsByTrial = {}
    for row in connection.execute(query):
        rows.setdefault(row[0], []).append(row)
    return rows


def make_frozen_trial(row: Any, rows: dict[Any, RowsByTrial]) -> FrozenTrial:
    trial, number, state, start, complete = row
    params, results, user, system, reports = (rows[name].get(trial, ()) for name in VALUE_TABLES)
    distributions = {name: parse_distribution(text) for _, name, _, text in params}
    return FrozenTrial(
        number=number,
        state=state,
        value=None,
        values=list(objective_values(results)) or None,
        datetime_start=to_local_time(start),
        datetime_complete=to_local_time(complete),
        params={name: distributions[name].to_external_repr(value) for _, name, value, _ in params},
        distributions=distributions,
        user_attrs={key: json.loads(text) for _, key, text in user},
        system_attrs={key: json.loads(text) for _, key, text in system},
        intermediate_values={
            step: optuna_internals.report_from(value, kind) for _, step, value, kind in reports
        },
        trial_id=trial,
    )


def to_local_time(moment: datetime | None) -> datetime | None:
    """Turn the database's UTC into this machine's time, which Optuna's trials have."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def objective_values(results: Any) -> Iterator[float]:
    for _, _, value, kind in sorted(results, key=lambda row: int(row[1])):
        yield optuna_internals.value_from(value, kind)


@lru_cache(CACHED_DISTRIBUTIONS)
def parse_distribution(text: str) -> BaseDistribution:
    """Return the distribution. All trials with it share one object: it never changes."""
    return json_to_distribution(text)
