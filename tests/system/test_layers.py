"""The order of the packages, read from the source: each imports only what stands above it in `ORDER`."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tuner

ROOT = Path(tuner.__file__).parent

# The packages and top-level modules of tuner/, lowest first.
ORDER = [
    "errors",
    "deferred_figures",
    "files",
    "config",
    "jobs",
    "messages",
    "manifest",
    "engines",
    "trackers",
    "search",
    "core",
    "preprocessing",
    "export",
    "models",
    "tasks",
    "data",
    "training",
    "dashboard",
    "commands",
    "study",
    "cli",
    "api",  # so that nothing of tuner imports it
    "__init__",
    "__main__",
]
PLUGINS = {"tasks", "models", "data", "export", "engines", "trackers"}  # one file a plug-in
OPTUNA = {"search", "dashboard", "commands", "cli"}  # where Optuna may be imported
WITHOUT_TORCH = ["errors", "files", "config", "jobs", "messages", "manifest", "trackers", "search"]
WITHOUT_OPTUNA = ["errors", "files", "config", "jobs", "messages", "manifest", "trackers"]
MODULES = sorted(ROOT.rglob("*.py"))
each_package = pytest.mark.parametrize("package", ORDER)  # hundreds of files: a test each is dear


def home(path: Path) -> str:
    """The package of a module, or its own name where it lies at the top of tuner/."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in MODULES}


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                modules.add(longer if longer in NAMES else str(node.module))
    return modules


def modules_of(package: str) -> list[Path]:
    return [path for path in MODULES if home(path) == package]


@each_package
def test_a_package_imports_only_lower_ones(package: str) -> None:
    for path in modules_of(package):
        for name in imports(path):
            if not name.startswith("tuner."):
                continue
            other = name.split(".")[1]
            if other == package:
                private = name.split(".")[-1].startswith("_")
                assert other not in PLUGINS or private, (
                    f"plug-ins never import each other: {dotted(path)} imports {name}"
                )
            else:
                assert ORDER.index(other) < ORDER.index(package), (
                    f"{dotted(path)} must not import {name}"
                )


@pytest.mark.parametrize("package", sorted(p.parent.name for p in ROOT.glob("*/__init__.py")))
def test_no_package_has_a_circle_of_imports(package: str) -> None:
    graph = {
        dotted(path): {
            name
            for name in imports(path)
            if name.startswith(f"tuner.{package}.") and name != dotted(path)
        }
        for path in (ROOT / package).glob("*.py")
        if path.stem != "__init__"
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_optuna_lives_with_the_coordinator() -> None:
    optuna = ("optuna", "optuna_dashboard")
    using = {p for p in MODULES if any(name.split(".")[0] in optuna for name in imports(p))}
    assert [dotted(path) for path in sorted(using) if home(path) not in OPTUNA] == []


def test_the_order_names_what_is_there_and_no_more() -> None:
    assert {home(path) for path in MODULES} == set(ORDER)


def test_the_design_names_the_packages_in_their_order() -> None:
    text = (ROOT.parent / "docs/design.md").read_text()
    table = text.partition("| package | charter |")[2].partition("\n\n")[0]
    first_cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    names = [name for cell in first_cells for name in re.findall(r"`(\w+)/?`", cell)]
    assert names == [name for name in ORDER if not name.startswith("__")]


def test_the_top_of_the_package_reads_as_a_table_of_contents() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 10
    for package in ROOT.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(package.read_text())), f"{package} states no charter"


def imported_by(*modules: str) -> set[str]:
    """Which of the heavy libraries are loaded once these modules are imported."""
    code = f"import sys; [__import__(name) for name in {modules}]; "
    code += "print([name for name in ('torch', 'optuna', 'matplotlib') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(out.stdout))


def test_the_coordinator_stays_without_torch_and_values_without_optuna() -> None:
    names = [dotted(path) for path in MODULES]
    coordinator = [
        name for name in names if name.split(".")[1:2] and name.split(".")[1] in WITHOUT_TORCH
    ]
    assert imported_by(
        *coordinator, "tuner.commands.run", "tuner.engines.local", "tuner.cli", "tuner.api"
    ) == {"optuna"}
    assert not imported_by(*[n for n in coordinator if n.split(".")[1] in WITHOUT_OPTUNA])


def test_torchmetrics_is_imported_only_where_it_is_called() -> None:
    """It loads transformers where that is installed: seconds of every process that trains."""
    at_the_top = re.compile(r"^(from|import) torchmetrics", re.MULTILINE)
    assert [dotted(path) for path in MODULES if at_the_top.search(path.read_text())] == []


def test_help_answers_at_once() -> None:
    code = "import sys, runpy; sys.argv = ['tuner', '--help']\ntry: runpy.run_module('tuner', run_name='__main__')\nexcept SystemExit: pass\n"
    code += (
        "print([m for m in ('torch', 'optuna', 'pydantic', 'numpy', 'yaml') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@each_package
def test_a_file_has_at_most_400_lines_and_a_name_that_says_something(package: str) -> None:
    for path in modules_of(package):
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in {"utils", "helpers", "common", "manager", "base"}, path


def test_no_test_imports_another_test() -> None:
    """What several tests need lives in a helper module, so that a test file can be moved alone."""
    importing = re.compile(
        r"^\s*(from tests[\w.]*\.test_|from tests[\w.]* import test_)", re.MULTILINE
    )
    tests = ROOT.parent / "tests"
    assert [p.name for p in tests.rglob("*.py") if importing.search(p.read_text())] == []
