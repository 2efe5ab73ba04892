"""Studies and trials read in bulk: a handful of statements and plain rows, where Optuna makes an object of each value."""

import json
from collections.abc import Container, Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite

Rows = dict[int, list[Any]]  # by trial id
UPSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
KEPT = 1024  # distributions that differ; a space has a handful


def quick(database: RDBStorage) -> RDBStorage:
    """The same database, whose trials are read so. What is read is Optuna's own to the last value: tests/test_bulk.py."""

    def read(
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        with database.engine.connect() as connection:
            return trials(connection, study_id, states, included_trial_ids, trial_id_greater_than)

    def read_studies() -> list[FrozenStudy]:
        with database.engine.connect() as connection:
            return studies(connection)

    database._get_trials = read  # type: ignore[method-assign]
    database.get_all_studies = read_studies  # type: ignore[method-assign]
    return database


def insertion(kind: Any, dialect: str) -> Any:
    """A statement that writes rows of a table. An attribute that is there already is replaced, as Optuna does."""
    if dialect not in UPSERTS or "value_json" not in kind.__table__.columns:
        return sqlalchemy.insert(kind)
    statement = UPSERTS[dialect](kind)
    owner = "study_id" if "study_id" in kind.__table__.columns else "trial_id"
    return statement.on_conflict_do_update(
        index_elements=[owner, "key"], set_={"value_json": statement.excluded.value_json}
    )


def studies(connection: sqlalchemy.Connection) -> list[FrozenStudy]:
    """All studies, by id. A study keeps two attributes for each of its trials, their notes."""
    kinds: tuple[Any, ...] = (
        models.StudyDirectionModel,
        models.StudyUserAttributeModel,
        models.StudySystemAttributeModel,
    )
    found: list[Rows] = [{}, {}, {}]
    for rows, kind in zip(found, kinds, strict=True):
        columns = (
            (kind.objective, kind.direction)
            if kind is models.StudyDirectionModel
            else (kind.key, kind.value_json)
        )
        for study, *pair in connection.execute(sqlalchemy.select(kind.study_id, *columns)):
            rows.setdefault(study, []).append(pair)
    names = connection.execute(
        sqlalchemy.select(models.StudyModel.study_id, models.StudyModel.study_name)
    ).all()
    directions, user, system = found
    return [
        FrozenStudy(
            name,
            None,
            {key: json.loads(text) for key, text in user.get(study, ())},
            {key: json.loads(text) for key, text in system.get(study, ())},
            study,
            directions=[
                direction
                for _, direction in sorted(directions[study], key=lambda pair: int(pair[0]))
            ],
        )
        for study, name in sorted(names)
    ]


def trials(
    connection: sqlalchemy.Connection,
    study: int,
    states: Container[TrialState] | None,
    included: set[int],
    after: int,
) -> list[FrozenTrial]:
    """A study's trials, by id: those with a higher id than `after`, and those `included`. Raises KeyError without such a study."""
    trial = models.TrialModel
    if (
        connection.execute(
            sqlalchemy.select(models.StudyModel.study_id).where(models.StudyModel.study_id == study)
        ).first()
        is None
    ):
        raise KeyError(models.NOT_FOUND_MSG)
    wanted = trial.study_id == study
    if after > -1:
        older = sorted(number for number in included if number <= after)
        wanted &= (
            sqlalchemy.or_(trial.trial_id > after, trial.trial_id.in_(older))
            if older
            else trial.trial_id > after
        )
    if states is not None:
        assert isinstance(states, Iterable)
        wanted &= trial.state.in_(list(states))
    columns = (
        trial.trial_id,
        trial.number,
        trial.state,
        trial._datetime_start_utc,
        trial._datetime_complete_utc,
    )
    found = connection.execute(
        sqlalchemy.select(*columns).where(wanted).order_by(trial.trial_id)
    ).all()
    if not found:
        return []
    rows = {kind: values(connection, kind, names, wanted) for kind, names in VALUES.items()}
    return [frozen(row, rows) for row in found]


VALUES = {
    models.TrialParamModel: ("param_id", "param_name", "param_value", "distribution_json"),
    models.TrialValueModel: ("trial_value_id", "objective", "value", "value_type"),
    models.TrialUserAttributeModel: ("trial_user_attribute_id", "key", "value_json"),
    models.TrialSystemAttributeModel: ("trial_system_attribute_id", "key", "value_json"),
    models.TrialIntermediateValueModel: (
        "trial_intermediate_value_id",
        "step",
        "intermediate_value",
        "intermediate_value_type",
    ),
}


def values(
    connection: sqlalchemy.Connection, kind: Any, names: tuple[str, ...], wanted: Any
) -> Rows:
    """What a table holds of the wanted trials, in the order it was written."""
    identity, *columns = (getattr(kind, name) for name in names)
    trial = models.TrialModel
    query = (
        sqlalchemy.select(kind.trial_id, *columns)
        .join(trial, trial.trial_id == kind.trial_id)
        .where(wanted)
        .order_by(identity)
    )
    found: Rows = {}
    for row in connection.execute(query):
        found.setdefault(row[0], []).append(row)
    return found


def frozen(row: Any, rows: dict[Any, Rows]) -> FrozenTrial:
    trial, number, state, start, complete = row
    params, results, user, system, reports = (rows[kind].get(trial, ()) for kind in VALUES)
    distributions = {name: distribution(text) for _, name, _, text in params}
    return FrozenTrial(
        number=number,
        state=state,
        value=None,
        values=list(objectives(results)) or None,
        datetime_start=local(start),
        datetime_complete=local(complete),
        params={name: distributions[name].to_external_repr(value) for _, name, value, _ in params},
        distributions=distributions,
        user_attrs={key: json.loads(text) for _, key, text in user},
        system_attrs={key: json.loads(text) for _, key, text in system},
        intermediate_values={
            step: models.TrialIntermediateValueModel.stored_repr_to_intermediate_value(value, kind)
            for _, step, value, kind in reports
        },
        trial_id=trial,
    )


def local(moment: datetime | None) -> datetime | None:
    """The database has UTC, Optuna's trials have this machine's time."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def objectives(results: Any) -> Iterator[float]:
    for _, _, value, kind in sorted(results, key=lambda row: int(row[1])):
        yield models.TrialValueModel.stored_repr_to_value(value, kind)


@lru_cache(KEPT)
def distribution(text: str) -> BaseDistribution:
    """Shared by all trials that have it: a distribution never changes."""
    return json_to_distribution(text)
