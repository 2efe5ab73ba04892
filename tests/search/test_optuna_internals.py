"""Optuna's inner names: known in one module, tried before they are relied on, and done without where they are missing."""

import ast
import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

import tuner
from tests.helpers.renamed_optuna import RENAMED, rename, search
from tuner.errors import StorageError
from tuner.search import optuna_internals
from tuner.search.database_proxy import DATABASE_METHODS, DatabaseProxy

ROOT = Path(tuner.__file__).parent
KNOW = {
    "search/optuna_internals.py",
    "search/database_proxy.py",
    "dashboard/dashboard_internals.py",
}
USERS = [
    path
    for folder in ("search", "dashboard", "commands")
    for path in sorted((ROOT / folder).glob("*.py"))
    if str(path.relative_to(ROOT)) not in KNOW
]
CLASSES = (
    optuna.Study,
    optuna.Trial,
    optuna.trial.FrozenTrial,
    optuna.storages.RDBStorage,
    type(optuna.storages.get_storage("sqlite://")),
)
WITHOUT_PUBLIC_WAY = "Study._storage"
CERTAIN = [name for name in RENAMED if name != WITHOUT_PUBLIC_WAY]


@functools.cache
def inner_names() -> set[str]:
    """What Optuna's classes call with a leading underscore: methods, and attributes of instances."""
    names = {name for kind in CLASSES for name in dir(kind)}
    study = optuna.create_study()
    trial = study.ask()
    cache = optuna.storages.get_storage("sqlite://")
    for instance in (study, trial, study.get_trials()[0], cache):
        names |= vars(instance).keys()
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


USED = {
    "_storage",
    "_study_id",
    "_trial_id",
    "_cached_frozen_trial",
    "_backend",
    "_get_trials",
    "_pop_waiting_trial_id",
    "_create_new_trial",
}


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_names_them(path: Path) -> None:
    """A class of ours may have an attribute that is called like one of Optuna's, unless it is one that we use."""
    inner = inner_names()
    assert inner > USED
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            assert node.attr not in (USED if own else inner), f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.FunctionDef):
            assert node.name not in USED, f"line {node.lineno}: {node.name}"
        elif isinstance(node, ast.Constant):
            assert node.value not in USED, f"line {node.lineno}: {node.value}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            for module in modules:
                private = any(word.startswith("_") for word in module.split("."))
                assert not (private and "optuna" in modules[0]), f"line {node.lineno}: {modules}"


def test_the_optuna_that_is_installed_has_all_of_them() -> None:
    assert optuna_internals.missing() == ()


def with_renamed(folder: Path, *names: str) -> dict[str, Any]:
    """What a search comes to with an Optuna whose inner names are others."""
    rename(folder / "other", *names)
    (folder / "study").mkdir()
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.renamed_optuna", str(folder / "study")],
        cwd=ROOT.parent,
        env=os.environ | {"PYTHONPATH": f"{folder / 'other'}:{ROOT.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the same search comes to with the Optuna that is installed."""
    result: dict[str, Any] = json.loads(json.dumps(search(tmp_path_factory.mktemp("calm"))))
    assert result["warnings"] == [] and "Optuna" not in result["refused"]
    return result


def holds(result: dict[str, Any], calm: dict[str, Any], *names: str) -> None:
    """That a search with these names missing ends as the calm one, after one warning that names what is missing."""
    assert (result["trials"], result["closed"]) == (calm["trials"], calm["closed"])
    (warning,) = result["warnings"]
    assert optuna_internals.TESTED in warning
    assert all(name in warning for name in names if name in optuna_internals.PROBES)
    for_server = [name for name in names if name in optuna_internals.FOR_SERVER]
    assert ("locks and owners" in result["refused"]) == bool(for_server)
    assert all(name in result["refused"] for name in for_server)


def test_a_search_that_does_without_them_ends_as_with_all(
    calm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(optuna_internals.PROBES)
    monkeypatch.setattr(optuna_internals, "missing", lambda: names)
    holds(json.loads(json.dumps(search(tmp_path))), calm, *names)


OF_THE_STUDY = [name for name in CERTAIN if name.startswith(("Study.", "Trial."))]
OF_THE_DATABASE = [name for name in CERTAIN if name not in OF_THE_STUDY]


@pytest.mark.slow
@pytest.mark.parametrize("names", [CERTAIN, OF_THE_STUDY, OF_THE_DATABASE, ["FrozenStudy"]])
def test_a_search_with_an_optuna_that_has_not_all_of_them_ends_as_with_all(
    names: list[str], calm: dict[str, Any], tmp_path: Path
) -> None:
    holds(with_renamed(tmp_path, *names), calm, *names)


@pytest.mark.slow
def test_what_has_no_public_way_is_named(tmp_path: Path) -> None:
    error = with_renamed(tmp_path, WITHOUT_PUBLIC_WAY)["error"]
    assert WITHOUT_PUBLIC_WAY in error and f"pip install '{optuna_internals.TESTED}'" in error


def test_a_cache_that_keeps_its_database_elsewhere_is_not_given_a_server(tmp_path: Path) -> None:
    proxy = DatabaseProxy()
    proxy.database = optuna.storages.RDBStorage("sqlite://")
    with pytest.raises(StorageError, match="_backend"):
        proxy.put_before(optuna.storages.get_storage("sqlite://"))


def test_a_proxy_has_what_the_cache_calls_of_its_database_and_nothing_else() -> None:
    cache = type(optuna.storages.get_storage("sqlite://"))
    called = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(cache)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._backend"
    }
    assert len(called) > 20
    proxy = DatabaseProxy()
    proxy.database = optuna.storages.RDBStorage("sqlite://")
    assert [name for name in sorted(called) if not callable(getattr(proxy, name, None))] == []
    for name in DATABASE_METHODS:
        assert callable(getattr(proxy, name)) and hasattr(optuna.storages.RDBStorage, name)
    with pytest.raises(AttributeError, match="get_n_trials"):
        _ = proxy.get_n_trials
