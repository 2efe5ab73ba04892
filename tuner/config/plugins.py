"""The folders are the registry: a file's name is its name in YAML.

Built-in plug-ins are listed, and read for their keys, without an import.
Positional arguments are what tuner passes. Keyword-only arguments are the YAML keys, and their
annotations are the schema.

    tasks/<name>.py     METRICS; build(classes, recipe, *, ...) -> Task; MINIMISED (those of its
                        metrics of which a lower value is better), RECIPE_KEYS and
                        SEARCH_KEYS (those keys of the recipe, and of search, that not
                        every task has, and it has), REFUSED_RECIPE_KEYS (those that mean nothing
                        for it), RECIPES_OF (the task whose recipes and augmentations suit it too)
                        and OUTPUTS (what it gives, where these are no classes), where there are
    data/<name>.py      TASKS; load(home, input_spec, task, *, ...) -> Dataset
    models/<family>.py  TASKS; NAMES; input_spec(name, *, ...) -> InputSpec;
                        build(home, name, task, outputs, *, ...) -> StagedModel;
                        RECIPES (task -> the recipe with which its authors fine-tune it),
                        NAMED_RECIPES (pattern of names -> task -> what differs in the recipe of
                        these models) and EXPORTS (the formats that can hold it), where they are
                        not the usual ones
    export/<name>.py    FILE; save(model, example, path); load(path, blank)
    engines/<name>.py   run(engine, warn), a context manager that gives a RunJobs
    trackers/<name>.py  PACKAGE (what it needs); start(study) -> Tracker

Every kind also accepts the user's own, as `package.module:attribute`. Then tuner calls it:

    task    attribute(classes, recipe, *, ...) -> Task. An argument `class_counts` before the * gets
            how many training examples each class has, where the recipe weighs classes. METRICS,
            MINIMISED, RECIPE_KEYS and SEARCH_KEYS are read in the module that the name states.
            Without METRICS, search.metric must be written and is not checked.
    data    attribute(home, input_spec, task, *, ...) -> Dataset. TASKS is not read.
    model   attribute(outputs, *, ...) -> StagedModel or nn.Module. An nn.Sequential is cut at its
            children, another module is one stage. `input_spec(*, ...)` is called where the module
            has it, with those keys of the model that it names, and with `home` where it names
            that; else IMAGENET_SPEC. TASKS, NAMES, the recipes and EXPORTS are not read: the
            default recipe is tuner's, and every export format is tried.
    export  an object with FILE, save and load, such as a class with static methods. It has no keys.
    metric  attribute(predictions, targets) -> float, in search.metric. It has no keys.
    engine  attribute(engine, warn), as above. Its keys are those of EngineSettings and no others.
    tracker attribute(study) -> Tracker, in the process that owns the study. It has no keys.

The module is imported wherever the name is checked or used: in the coordinator and in every worker,
from PYTHONPATH or from the current folder. `tuner.api` has what such a module imports from tuner.
"""

import ast
import contextlib
import contextvars
import fnmatch
import functools
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from tuner.config import data_options
from tuner.errors import SpaceError, nearest_hint, suggest_names

PLUGIN_FOLDERS = {
    "task": "tasks",
    "data": "data",
    "model": "models",
    "export": "export",
    "engine": "engines",
    "tracker": "trackers",
}
ENTRY_POINTS = {
    "task": "build",
    "data": "load",
    "model": "build",
    "export": "save",
    "engine": "run",
    "tracker": "start",
}
IMPORT_PATH_PATTERN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_ANNOTATION_NAMES = {
    "Annotated": Annotated,
    "Literal": Literal,
    "Field": Field,
    "ImageFileOptions": data_options.ImageFileOptions,
    "ImageOptions": data_options.ImageOptions,
    "SplitOptions": data_options.SplitOptions,
}


@dataclass(frozen=True)
class PluginKeys:
    """A plug-in's keyword arguments.

    `groups` are arguments whose own fields are written flat in the YAML.
    """

    fields: Mapping[str, FieldInfo]
    groups: Mapping[str, type[BaseModel]]

    def to_arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The flat options of a file as the plug-in's keyword arguments."""
        grouped = {
            k: group(**{n: options[n] for n in group.model_fields})
            for k, group in self.groups.items()
        }
        inside = {n for group in self.groups.values() for n in group.model_fields}
        return {k: v for k, v in options.items() if k not in inside} | grouped


def list_names(kind: str) -> list[str]:
    """The built-in plug-ins of a kind, without importing any."""
    folder = Path(__file__).parents[1] / PLUGIN_FOLDERS[kind]
    files = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if kind == "model":
        return [name for file in files for name in read_constant(kind, file, "NAMES")]
    return files


@functools.cache
def read_constant(kind: str, file: str, name: str) -> Any:
    """A literal assigned at the top of a plug-in's file, read without importing it."""
    for node in _parse_source(kind, file).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return ast.literal_eval(node.value)
    raise LookupError(f"{PLUGIN_FOLDERS[kind]}/{file}.py assigns no {name}")


def list_metrics(task: str) -> tuple[str, ...]:
    """What a task scores, its main metric first: METRICS in its file, or beside the user's own.

    Raises SpaceError.
    """
    return read_task_names(task, "METRICS")


def list_minimised(task: str) -> tuple[str, ...]:
    """Those of a task's metrics of which a lower value is better: MINIMISED beside METRICS.

    Raises SpaceError.
    """
    return read_task_names(task, "MINIMISED")


def read_task_names(task: str, constant_name: str) -> tuple[str, ...]:
    """A tuple of names at the top of a task's file; empty where there is none. Raises SpaceError.

    Such as RECIPE_KEYS and SEARCH_KEYS, the keys that this task has and others lack, COUNTED,
    the metrics that are shares of examples which are right, and MACRO, those of them that are means
    over the classes.
    """
    if ":" in task:
        return tuple(read_own_attribute("task", task, constant_name, ()))
    read_keys("task", task)
    try:
        return tuple(read_constant("task", task, constant_name))
    except LookupError:
        return ()


def read_own_attribute(kind: str, name: str, attribute: str, default: Any) -> Any:
    """What stands beside the user's own plug-in, in the module that its name states.

    Raises SpaceError.
    """
    load_plugin(kind, name)
    return getattr(sys.modules[name.partition(":")[0]], attribute, default)


def list_tasks(kind: str, name: str) -> tuple[str, ...]:
    """The tasks that a built-in data source or model is for: TASKS in its file.

    Raises SpaceError on an unknown name.
    """
    read_keys(kind, name)
    return tuple(
        read_constant(kind, str(find_model_family(name)) if kind == "model" else name, "TASKS")
    )


def read_model_constant(name: str, constant_name: str, default: Any) -> Any:
    """What a built-in model's file assigns to a name at its top.

    `default` where it does not, and for the user's own.
    """
    file = find_model_family(name)
    try:
        return read_constant("model", file, constant_name) if file else default
    except LookupError:
        return default


def find_model_family(name: str) -> str | None:
    """The file in models/ that builds model `name`; None when there is none."""
    folder = Path(__file__).parents[1] / "models"
    for path in sorted(folder.glob("[!_]*.py")):
        if any(
            fnmatch.fnmatchcase(name, pattern)
            for pattern in read_constant("model", path.stem, "NAMES")
        ):
            return path.stem
    return None


@functools.cache
def _parse_source(kind: str, file: str) -> ast.Module:
    return ast.parse(
        (Path(__file__).parents[1] / PLUGIN_FOLDERS[kind] / f"{file}.py").read_text(
            encoding="utf-8"
        )
    )


@functools.cache
def read_keys(kind: str, name: str) -> PluginKeys:
    """The YAML keys of a plug-in.

    Raises SpaceError, without a place, on an unknown name or a failing import.
    """
    if ":" in name:
        return _keys_from_signature(name, load_plugin(kind, name))
    file = find_model_family(name) if kind == "model" else name
    if file is None or (kind != "model" and name not in list_names(kind)):
        raise SpaceError(
            f"{name!r} is not known{suggest_names(name, list_names(kind))}; your own goes as "
            "package.module:attribute"
        )
    return _keys_from_source(kind, file)


def _keys_from_source(kind: str, file: str) -> PluginKeys:
    for node in _parse_source(kind, file).body:
        if isinstance(node, ast.FunctionDef) and node.name == ENTRY_POINTS[kind]:
            arguments = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return _collect_keys(
                {a.arg: (_evaluate(a.annotation), _evaluate(default)) for a, default in arguments}
            )
    raise LookupError(f"{PLUGIN_FOLDERS[kind]}/{file}.py defines no {ENTRY_POINTS[kind]}")


def _evaluate(node: ast.expr | None) -> Any:
    """Evaluates an annotation or default of tuner's source: literals and `_ANNOTATION_NAMES`."""
    if node is None:
        return inspect.Parameter.empty
    return eval(compile(ast.Expression(node), "<signature>", "eval"), dict(_ANNOTATION_NAMES))


def _keys_from_signature(name: str, function: Callable[..., Any]) -> PluginKeys:
    """Raises SpaceError where an argument cannot be written in a file."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        raise SpaceError(
            f"{name!r}: its arguments cannot be read; wrap it in a function of your own"
        ) from None
    try:
        hints = typing.get_type_hints(
            function.__init__ if inspect.isclass(function) else function, include_extras=True
        )
    except (NameError, TypeError, AttributeError):
        hints = {}
    wanted = {
        p.name: (hints.get(p.name, Any), p.default)
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    found = _collect_keys(wanted)
    for key, field in found.fields.items():
        if not (
            _is_writable(field.annotation)
            and (
                field.is_required() or _is_plain_value(field.get_default(call_default_factory=True))
            )
        ):
            raise SpaceError(
                f"{name!r}: its argument {key!r} is not made of numbers, text, true/false, null, "
                "Literal and lists of them"
            )
    return found


def _is_writable(annotation: Any) -> bool:
    """Whether a file can say every value of this type."""
    parts = typing.get_args(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return True  # a mapping of keys that are writable themselves
    if typing.get_origin(annotation) is Annotated:
        return _is_writable(parts[0])
    if typing.get_origin(annotation) is Literal:
        return _is_plain_value(list(parts))
    if parts:
        return typing.get_origin(annotation) in (
            list,
            tuple,
            typing.Union,
            types.UnionType,
        ) and all(map(_is_writable, parts))
    return annotation in (Any, int, float, str, bool, None, types.NoneType, list, tuple, ...)


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain_value, value))
    return value is None or type(value) in (int, float, str, bool)


def _collect_keys(arguments: Mapping[str, tuple[Any, Any]]) -> PluginKeys:
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
    return PluginKeys(fields, groups)


def import_plugin(kind: str, name: str) -> types.ModuleType:
    """A built-in plug-in's module, imported."""
    file = find_model_family(name) if kind == "model" else name
    return importlib.import_module(f"tuner.{PLUGIN_FOLDERS[kind]}.{file}")


_with_folder = contextvars.ContextVar("_with_folder", default=True)


@contextlib.contextmanager
def installed_only() -> Iterator[None]:
    """The user's own modules come from Python's path as it is, and the current folder is not added
    to it.
    """
    token = _with_folder.set(False)
    try:
        yield
    finally:
        _with_folder.reset(token)


def load_plugin(kind: str, name: str) -> Callable[..., Any]:
    """The function or class behind a plug-in's name, imported.

    The current folder is on the path for the user's own, but for `installed_only`.
    """
    if ":" not in name:
        found: Callable[..., Any] = getattr(import_plugin(kind, name), ENTRY_POINTS[kind])
        return found
    module_name, _, wanted = name.partition(":")
    if not IMPORT_PATH_PATTERN.fullmatch(name):
        raise SpaceError(f"{name!r}: your own {kind} goes as package.module:attribute")
    if _with_folder.get() and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        own = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises is theirs to read
        first = str(error).strip().partition("\n")[0]
        missing = isinstance(error, ModuleNotFoundError) and not _with_folder.get()
        hint = (
            "; the current folder is not searched: set PYTHONPATH to the module's folder, "
            "or install it"
        )
        raise SpaceError(
            f"{name!r}: importing {module_name} failed ({type(error).__name__}: {first})"
            f"{hint if missing else ''}"
        ) from error
    target = getattr(own, wanted, None)
    if target is None:
        raise SpaceError(
            f"{name!r}: module {module_name} has no {wanted!r}{nearest_hint(wanted, dir(own))}"
        )
    if not callable(target) or _is_standard_library(target):
        raise SpaceError(
            f"{name!r}: {wanted} is not a function or class of yours; {kind} needs one"
        )
    return typing.cast(Callable[..., Any], target)


def _is_standard_library(target: Any) -> bool:
    """Whether this is a function or class of the standard library, such as os.system, which nobody
    means to call.
    """
    if not (inspect.isroutine(target) or inspect.isclass(target)):
        return False
    return (target.__module__ or "builtins").partition(".")[0] in sys.stdlib_module_names
