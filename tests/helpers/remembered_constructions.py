"""What hundreds of tests construct alike is constructed once in a process."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer.main


def remember_constructions() -> None:
    """The parser of the command line, and what Optuna's database reads of its own modules.

    The latter only if they are loaded: where few tests run, they need not be.
    """
    typer.main.get_command = functools.cache(typer.main.get_command)
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
