"""Programs that tests hold in strings, and names that they patch, are there: no type checker sees these."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tuner

ROOT = Path(tuner.__file__).parents[1]
FILES = sorted({*(ROOT / "tests").rglob("*.py")} - {Path(__file__)})
FOLDERS = sorted({path.parent for path in FILES})


def strings(tree: ast.AST) -> Iterator[str]:
    """The texts of a program; the values inside an f-string count as 0."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else 0 for v in node.values)
            yield "".join(map(str, parts))


def programs(tree: ast.Module) -> Iterator[ast.Module]:
    for text in strings(tree):
        if "tuner" in text and "import" in text:
            try:
                yield ast.parse(text)
            except SyntaxError:
                continue  # a part of a program, or prose


def imported(tree: ast.Module, missing: list[str]) -> dict[str, Any]:
    """What a program imports of tuner, by its local name; what is not there goes into `missing`."""
    values: dict[str, Any] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or str(node.module).split(".")[0] != "tuner":
            continue
        for alias in node.names:
            if alias.name == "*":
                continue
            try:
                module = importlib.import_module(str(node.module))
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                values[alias.asname or alias.name] = getattr(module, alias.name)
            except ImportError as error:
                missing.append(str(error))
    return values


def resolve(dotted: str) -> bool:
    """Whether a dotted name leads from a module to an attribute."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def patched(call: ast.Call, values: dict[str, Any]) -> str | None:
    """The name that a call of `setattr` replaces, where it is not there; None where it is."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr in ("setattr", "delattr")):
        return None
    target, *rest = call.args
    if isinstance(target, ast.Constant):
        text = str(target.value)
        return None if not text.startswith("tuner.") or resolve(text) else text
    name = rest[0].value if rest and isinstance(rest[0], ast.Constant) else None
    owner = values.get(ast.unparse(target).split(".")[0])
    for part in ast.unparse(target).split(".")[1:]:
        owner = getattr(owner, part, None)
    known = owner is None or not isinstance(name, str) or hasattr(owner, name)
    return None if known else f"{ast.unparse(target)}.{name}"


def missing_names(tree: ast.Module) -> list[str]:
    missing: list[str] = []
    values = imported(tree, missing)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = values.get(node.value.id)
            if isinstance(owner, ModuleType) and not hasattr(owner, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and node.args and (name := patched(node, values)):
            missing.append(name)
    return missing


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_what_strings_and_patches_name_is_there(folder: Path) -> None:
    missing: dict[str, list[str]] = {}
    for path in FILES:
        if path.parent == folder:
            tree = ast.parse(path.read_text())
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
            values = imported(tree, [])
            names = [name for call in calls if (name := patched(call, values))]
            for program in programs(tree):
                names += missing_names(program)
            missing |= {path.name: names} if names else {}
    assert missing == {}


def test_what_is_not_there_is_noticed() -> None:
    program = (
        "from tuner.config import parsing, no_such\n"
        "parsing.no_such()\n"
        "monkeypatch.setattr(parsing, 'nor_this', 0)\n"
        "monkeypatch.setattr('tuner.config.parsing.nor_that', 0)\n"
    )
    assert len(missing_names(ast.parse(program))) == 4
