"""The folders are the registry: a file's name is the YAML name, listed and read for its keys without being imported.

    tasks/<name>.py     the class it names `Task...`   build(**keys) -> Task
    data/<name>.py      load(home, wanted, **keys) -> Data
    models/<family>.py  build(home, name, outputs, **keys) -> Staged or nn.Module, for each name in its NAMES
    export/<name>.py    save(...), load(...)
    engines/<name>.py   run(...)

Keyword-only arguments are the YAML keys and their annotations the schema. Every kind also accepts the user's own as
`package.module:attribute`.
"""

import ast
import fnmatch
import functools
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from tuner import run
from tuner.errors import SpaceError, nearest, suggest

KINDS = {"task": "tasks", "data": "data", "model": "models", "export": "export", "engine": "engines"}
VERBS = {"task": "build", "data": "load", "model": "build", "export": "save", "engine": "run"}
_SCOPE = {"Annotated": Annotated, "Literal": Literal, "Field": Field, "ImageOptions": run.ImageOptions}


@dataclass(frozen=True)
class Keys:
    """A plug-in's keyword arguments. `groups` are arguments whose own fields are written flat in the YAML."""

    fields: Mapping[str, FieldInfo]
    groups: Mapping[str, type[BaseModel]]

    def arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The flat options of a file as the plug-in's keyword arguments."""
        grouped = {k: group(**{n: options[n] for n in group.model_fields}) for k, group in self.groups.items()}
        inside = {n for group in self.groups.values() for n in group.model_fields}
        return {k: v for k, v in options.items() if k not in inside} | grouped


def names(kind: str) -> list[str]:
    """The built-in plug-ins of a kind, without importing any."""
    folder = Path(__file__).parent / KINDS[kind]
    files = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if kind == "model":
        return [name for file in files for name in constant(kind, file, "NAMES")]
    return files


@functools.cache
def constant(kind: str, file: str, name: str) -> Any:
    """A literal assigned at the top of a plug-in's file, read without importing it."""
    for node in _syntax(kind, file).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise LookupError(f"{KINDS[kind]}/{file}.py assigns no {name}")


def family(name: str) -> str | None:
    """The file in models/ that builds model `name`; None when there is none."""
    folder = Path(__file__).parent / "models"
    for path in sorted(folder.glob("[!_]*.py")):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in constant("model", path.stem, "NAMES")):
            return path.stem
    return None


@functools.cache
def _syntax(kind: str, file: str) -> ast.Module:
    return ast.parse((Path(__file__).parent / KINDS[kind] / f"{file}.py").read_text())


@functools.cache
def keys(kind: str, name: str) -> Keys:
    """The YAML keys of a plug-in. Raises SpaceError, without a place, on an unknown name or a failing import."""
    if ":" in name:
        return _imported_keys(attribute(kind, name))
    file = family(name) if kind == "model" else name
    if file is None or (kind != "model" and name not in names(kind)):
        raise SpaceError(f"{name!r} is not known{suggest(name, names(kind))}; your own goes as package.module:attribute")
    return _written_keys(kind, file)


def _written_keys(kind: str, file: str) -> Keys:
    for node in _syntax(kind, file).body:
        if isinstance(node, ast.FunctionDef) and node.name == VERBS[kind]:
            arguments = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return _collect({a.arg: (_evaluate(a.annotation), _evaluate(default)) for a, default in arguments})
    raise LookupError(f"{KINDS[kind]}/{file}.py defines no {VERBS[kind]}")


def _evaluate(node: ast.expr | None) -> Any:
    """An annotation or default of tuner's own source: literals, and the few names of _SCOPE."""
    if node is None:
        return inspect.Parameter.empty
    return eval(compile(ast.Expression(node), "<signature>", "eval"), dict(_SCOPE))


def _imported_keys(function: Callable[..., Any]) -> Keys:
    target = function.__init__ if inspect.isclass(function) else function
    try:
        hints = typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError):
        hints = {}
    wanted = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return _collect({p.name: (hints.get(p.name, Any), p.default) for p in wanted})


def _collect(arguments: Mapping[str, tuple[Any, Any]]) -> Keys:
    fields: dict[str, FieldInfo] = {}
    groups: dict[str, type[BaseModel]] = {}
    for name, (annotation, default) in arguments.items():
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            groups[name] = annotation
            fields.update(annotation.model_fields)
        elif default is inspect.Parameter.empty:
            fields[name] = FieldInfo.from_annotation(annotation)
        else:
            fields[name] = FieldInfo.from_annotated_attribute(annotation, default)
    return Keys(fields, groups)


def module(kind: str, name: str) -> types.ModuleType:
    """A built-in plug-in's module, imported."""
    file = family(name) if kind == "model" else name
    return importlib.import_module(f"tuner.{KINDS[kind]}.{file}")


def attribute(kind: str, name: str) -> Callable[..., Any]:
    """The function or class behind a plug-in's name, imported. The current folder is on the path for the user's own."""
    if ":" not in name:
        found: Callable[..., Any] = getattr(module(kind, name), VERBS[kind])
        return found
    module_name, _, wanted = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        own = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises is theirs to read
        raise SpaceError(f"{name!r}: importing {module_name} failed ({type(error).__name__}: {error})") from error
    if not hasattr(own, wanted):
        raise SpaceError(f"{name!r}: module {module_name} has no {wanted!r}{nearest(wanted, dir(own))}")
    target = getattr(own, wanted)
    if not callable(target) or inspect.isbuiltin(target) or target.__module__ in ("os", "subprocess", "posix"):
        raise SpaceError(f"{name!r}: {wanted} is not a function or class that builds a {kind}")
    return typing.cast(Callable[..., Any], target)
