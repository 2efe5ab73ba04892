"""What hundreds of tests construct alike is constructed once in a process."""

import sys
from collections.abc import Callable
from typing import Any


def remember_constructions() -> None:
    """In the module of Optuna's database, if it is loaded: where few tests run, it need not be."""
    if rdb := sys.modules.get("optuna.storages._rdb.storage"):
        manager = vars(rdb)["_VersionManager"]
        manager._create_alembic_script = _remember_script(manager._create_alembic_script)


def _remember_script(create: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Optuna's migrations: ten modules that are read three times for each database that is made."""
    created: list[Any] = []

    def create_once(manager: Any) -> Any:
        if not created:
            created.append(create(manager))
        return created[0]

    return create_once
