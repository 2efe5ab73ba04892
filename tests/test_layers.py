"""The house's order, read from the source: a module imports only what stands before it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tuner

ROOT = Path(tuner.__file__).parent

# Values: what files say and what crosses between processes. Parts: what training is made of. Then the coordinator's side.
VALUES = [
    "errors",
    "document",
    "crash",
    "files",
    "downloads",
    "entries",
    "urls",
    "failures",
    "run",
    "plugins",
    "fields",
    "space",
    "draft",
    "leaves",
    "conditions",
    "settings",
    "parsing",
    "schema",
    "orders",
    "jobs",
    "manifest",
    "signals",
    "machine",
    "keeping",
]
PARTS = [
    "wanted",
    "core",
    "geometry",
    "decoding",
    "splits",
    "targets",
    "store",
    "duplicates",
    "images",
    "boxes",
    "planes",
    "masks",
    "activations",
    "tokens",
    "detectors",
    "pictures",
    "figures",
    "verdicts",
    "drawing",
    "weights",
    "tasks",
    "models",
    "data",
    "portable",
    "export",
    "cache",
    "optim",
    "devices",
    "building",
    "costs",
    "memory",
    "checkpoints",
    "learning",
    "trial",
    "folds",
    "winner",
    "work",
    "describe",
    "predict",
]
SEARCH = [
    "projection",
    "samplers",
    "history",
    "bulk",
    "server",
    "batching",
    "window",
    "asking",
    "leases",
    "ledger",
    "storage",
    "search",
    "engines",
    "columns",
    "summary",
    "report",
    "artifacts",
    "session",
    "running",
    "detail",
    "dashboard",
    "exporting",
    "cleaning",
    "waiting",
    "cli",
]
ORDER = [*VALUES, *PARTS, *SEARCH, "__init__", "__main__"]
FOLDERS = {"tasks", "models", "data", "export", "engines"}
OPTUNA = {*SEARCH} - {"session", "engines"}
MODULES = sorted(ROOT.rglob("*.py"))


def home(path: Path) -> str:
    """A module's place in ORDER: its own name, or its folder's."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            found |= {
                f"{module}.{alias.name}" if module == "tuner" else module for alias in node.names
            }
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_upward(path: Path) -> None:
    own = [
        name.split(".")[1]
        for name in imports(path)
        if name.startswith("tuner.") and name != "tuner.__version__"
    ]
    assert home(path) in ORDER, "a new module needs a place in the order"
    for name in own:
        if name == home(path) and name in FOLDERS:
            assert all(
                part.split(".")[-1].startswith("_")
                for part in imports(path)
                if part.startswith(f"tuner.{name}.")
            ), "parts never import each other"
        else:
            assert ORDER.index(name) < ORDER.index(home(path)), (
                f"{home(path)} must not import {name}"
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optuna_lives_with_the_coordinator(path: Path) -> None:
    uses = any(name.split(".")[0] in ("optuna", "optuna_dashboard") for name in imports(path))
    assert not uses or home(path) in OPTUNA


def test_every_place_in_the_order_is_taken() -> None:
    assert {home(path) for path in MODULES} >= set(ORDER)


def test_the_coordinator_stays_without_torch_and_values_without_optuna() -> None:
    code = (
        "import sys, tuner.running, tuner.engines.local, tuner.cli; print('torch' in sys.modules); "
    )
    code += "print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
    code = f"import sys; [__import__('tuner.' + name) for name in {VALUES}]; print('torch' in sys.modules, 'optuna' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_help_answers_at_once() -> None:
    code = "import sys, runpy; sys.argv = ['tuner', '--help']\ntry: runpy.run_module('tuner', run_name='__main__')\nexcept SystemExit: pass\n"
    code += (
        "print([m for m in ('torch', 'optuna', 'pydantic', 'numpy', 'yaml') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_at_most_400_lines_and_a_name_that_says_something(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "common", "manager", "base"}


def test_no_test_imports_another_test() -> None:
    """What several tests need lives in a helper module, so that a test file can be moved alone."""
    importing = re.compile(
        r"^\s*(from tests[\w.]*\.test_|from tests[\w.]* import test_)", re.MULTILINE
    )
    tests = ROOT.parent / "tests"
    assert [p.name for p in tests.rglob("*.py") if importing.search(p.read_text())] == []
