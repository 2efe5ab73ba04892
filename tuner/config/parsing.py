"""From a document to a Space.

Every problem is found before any is reported, each with its line and the way out.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo

from tuner.config import (
    augmentation_checks,
    conditions,
    fields,
    plugins,
    related_tasks,
    section_keys,
    yaml_document,
)
from tuner.config.draft import Draft
from tuner.config.given_params import checked_params
from tuner.config.run import Recipe, SearchSettings
from tuner.config.section import Section
from tuner.config.settings import read_settings
from tuner.config.space import MAX_VALUES, Dimension, KeyPath, Space
from tuner.config.yaml_document import COMMAND_LINE, Document, describe_value, format_key_path
from tuner.errors import SpaceError, suggest_names

PLUGIN_SECTIONS = ("task", "data", "model")
SECTIONS = (
    *PLUGIN_SECTIONS,
    "recipe",
    "seed",
    "try",
    "search",
    "engine",
    "storage",
    "export",
    "track",
)


class TopLevelKeys(Section):
    """Keys of the file that lie in no section."""

    seed: int | None = Field(
        None, ge=0, le=2**32 - 1, description="of every training; null: each trial has its own"
    )


def load_space(path: Path, overrides: Sequence[str] = ()) -> Space:
    """The space in a file, with `key=value` overrides from the command line.

    Raises SpaceError with every problem.
    """
    return parse_space(apply_overrides(yaml_document.read_document(path), overrides))


def apply_overrides(doc: Document, overrides: Sequence[str]) -> Document:
    """Sets dotted keys.

    The values are read like the file's, and what is wrong with them joins its problems.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            doc.problems.append(
                f"{COMMAND_LINE}: {text!r}: expected key=value, such as recipe.lr=0.01"
            )
            continue
        try:
            _set_key(doc, path, yaml_document.parse_override_value(value))
        except SpaceError as error:
            doc.problems.extend(
                f"{COMMAND_LINE}: {format_key_path(path)}: {problem}" for problem in error.problems
            )
    return doc


def _set_key(doc: Document, path: tuple[str, ...], value: Any) -> None:
    node = doc.content
    for depth, part in enumerate(path[:-1], 1):
        inner = node.get(part)
        if isinstance(inner, str) and depth == 1 and part in (*PLUGIN_SECTIONS, "engine"):
            inner = {"name": inner}
            doc.lines[part, "name"] = doc.location((part,))
        elif inner is None:
            inner = {}
            doc.lines[path[:depth]] = COMMAND_LINE
        elif not isinstance(inner, dict):
            above = format_key_path(path[:depth])
            raise SpaceError(
                f"{above} is {describe_value(inner)}, not a mapping; set the whole of it: {above}=…"
            )
        node[part] = inner
        node = inner
    node[path[-1]] = value
    doc.lines = {p: line for p, line in doc.lines.items() if p[: len(path)] != path}
    doc.lines[path] = COMMAND_LINE


def with_values(doc: Document, values: Mapping[KeyPath, Any]) -> Space:
    """The space of the document with these keys set in it."""
    changed = copy.deepcopy(doc)
    for path, value in values.items():
        _set_key(changed, path, value)
    return parse_space(changed, of_study=True)


def parse_space(doc: Document, *, of_study: bool = False) -> Space:
    """The space that a document describes.

    Args:
        doc: The document.
        of_study: The document describes a study that exists. Then it may say what an earlier
            version of tuner allowed.

    Raises:
        SpaceError: With every problem of the document.
    """
    draft = Draft(doc, list(doc.problems))
    for key in doc.content:
        if key not in SECTIONS:
            draft.add_problem(
                (key,),
                "unknown "
                f"section{section_keys.hint_other_section(key)}{suggest_names(key, SECTIONS)}",
            )
    for section in PLUGIN_SECTIONS:
        read_plugin_section(draft, section)
    check_task_compatibility(draft)
    augmentation_checks.check_policies(draft)
    if not of_study:
        augmentation_checks.check_views(draft)
    recipe = doc.content.get("recipe")
    if recipe is not None and not isinstance(recipe, dict):
        draft.add_problem(("recipe",), f"expected a mapping of keys, got {describe_value(recipe)}")
    recipe = recipe if isinstance(recipe, dict) else {}
    recipe_fields = model_recipe_fields(draft, draft.values.get(("model", "name")))
    section_keys.read_section(draft, ("recipe",), recipe, recipe_fields)
    check_frozen(draft)
    add_recipes_of_models(draft, recipe)
    augmentation_checks.check_mixing(draft)
    check_recipe_of_task(draft)
    if doc.content.get("seed") is not None:
        draft.set_fixed(("seed",), TopLevelKeys.model_fields["seed"], doc.content["seed"])
    searched = conditions.order_dimensions(draft)
    settings = read_settings(draft)
    if settings is not None:
        check_grid(draft, settings.search, searched)
    if draft.problems or settings is None:
        raise SpaceError(*dict.fromkeys(draft.problems))
    space = Space(draft.values, searched, settings, doc, draft.defaults(), draft.by_model)
    space = replace(space, values={**space.values, **space.default_choices()})
    return replace(space, first_guesses=read_first_guesses(draft, space))


def read_first_guesses(draft: Draft, space: Space) -> tuple[Mapping[str, Any], ...]:
    """The recipes under `try`, as parameters of trials. Raises SpaceError with every problem."""
    written = draft.document.content.get("try")
    written = [] if written is None else written
    if not isinstance(written, list) or not all(isinstance(guess, dict) for guess in written):
        draft.add_problem(("try",), "expected a list of recipes, such as [{lr: 0.001}]")
        raise SpaceError(*draft.problems)
    if written and space.settings.search.sampler == "grid":
        draft.add_problem(("try",), "the grid tries every combination; drop it")
    guesses = []
    for number, guess in enumerate(written):
        try:
            guesses.append(checked_params(space, guess))
        except SpaceError as error:
            for problem in error.problems:
                draft.add_problem(("try", number), problem)
    if draft.problems:
        raise SpaceError(*draft.problems)
    return tuple(guesses)


def read_plugin_section(draft: Draft, section: str) -> None:
    """Task, data or model.

    Its keys are the plug-in's own; `model: resnet18` is short for `model: {name: resnet18}`.
    """
    written = draft.document.content.get(section)
    if isinstance(written, (str, list)) or (isinstance(written, dict) and "choices" in written):
        written = {"name": written}
    if written is not None and not isinstance(written, dict):
        draft.add_problem(
            (section,), f"expected a name or a mapping of keys, got {describe_value(written)}"
        )
        return
    keys = written or {}
    if "name" not in keys:
        close = [key for key in keys if suggest_names(key, ("name",)).startswith(";")]
        for key in close:
            draft.add_problem((section, key), f"unknown key{suggest_names(key, ('name',))}")
        if not close:
            draft.add_problem(
                (section,),
                f"needs a name: {', '.join(plugins.list_names(section))}, or your own as "
                "package.module:attribute",
            )
        return
    name = (section, "name")
    section_keys.read_key(draft, name, FieldInfo.from_annotation(str), keys["name"])
    wanted: dict[str, FieldInfo] = {}
    before = len(draft.problems)
    for option in named_plugins(draft, section, keys["name"]):
        try:
            wanted.update(plugins.read_keys(section, option).fields)
        except SpaceError as error:
            draft.problems.extend(
                draft.document.format_problem(name, problem) for problem in error.problems
            )
    if (
        len(draft.problems) == before and name in draft.values
    ):  # otherwise nobody knows which keys there are
        section_keys.read_section(
            draft,
            (section,),
            {k: v for k, v in keys.items() if k != "name"},
            wanted,
            other_keys=("name",),
        )


def named_plugins(draft: Draft, section: str, written: Any) -> list[str]:
    """The plug-ins that a name can mean.

    Models may be searched; a study has one task and one data set.
    """
    several = isinstance(written, (list, dict))
    if several and section != "model":
        draft.add_problem(
            (section, "name"), f"one {section} per study; scores on different ones do not compare"
        )
        return []
    options = written.get("choices", []) if isinstance(written, dict) else written
    return [o for o in (options if isinstance(options, list) else [options]) if isinstance(o, str)]


def check_task_compatibility(draft: Draft) -> None:
    """Whether data and models are for the task."""
    task = draft.values.get(("task", "name"))
    if not isinstance(task, str) or ":" in task or task not in plugins.list_names("task"):
        return
    for section in ("data", "model"):
        for name in chosen_plugins(draft, section):
            try:
                for_ = plugins.list_tasks(section, name)
            except SpaceError:
                continue  # said where the name is read
            if task not in for_:
                others = [
                    other
                    for other in plugins.list_names(section)
                    if task in plugins.list_tasks(section, other)
                ]
                draft.add_problem(
                    (section, "name"),
                    f"{name} is for {fields.join_alternatives(for_)}, not for {task} (allowed: "
                    f"{', '.join(others[:20])})",
                )


def chosen_plugins(draft: Draft, section: str) -> list[str]:
    """The built-in plug-ins that a section names."""
    leaf = draft.domains.get((section, "name"))
    written = leaf.values() if leaf else [draft.values.get((section, "name"))]
    return [name for name in written or () if isinstance(name, str) and ":" not in name]


def model_recipe_fields(draft: Draft, name: Any) -> dict[str, FieldInfo]:
    """The recipe's keys.

    Their defaults are what the people of model `name` fine-tune it with, where its file says so.
    """
    recipe_fields = dict(Recipe.model_fields)
    if not isinstance(name, str) or ":" in name:
        return recipe_fields
    task = draft.values.get(("task", "name"))
    for key, value in related_tasks.read_recipe(name, str(task)).items():
        recipe_fields[key] = FieldInfo.merge_field_infos(recipe_fields[key], default=value)
    return recipe_fields


def check_recipe_of_task(draft: Draft) -> None:
    """Refuses keys of the recipe that the task does not have. A key at its default is allowed."""
    task, tasks = draft.values.get(("task", "name")), plugins.list_names("task")
    if not isinstance(task, str) or (":" not in task and task not in tasks):
        return
    tasks_by_key: dict[str, list[str]] = {}
    for name in tasks:
        for key in plugins.read_task_names(name, "RECIPE_KEYS"):
            tasks_by_key.setdefault(key, []).append(name)
    try:
        known = plugins.read_task_names(task, "RECIPE_KEYS")
    except SpaceError:
        return  # said where the name is read
    for key in plugins.read_task_names(task, "REFUSED_RECIPE_KEYS"):
        path = ("recipe", key)
        if draft.possible_values(path) != (Recipe.model_fields[key].default,):
            draft.add_problem(
                path, f"{task} has no such key: its loss smooths no labels; drop the key"
            )
    for key in sorted(tasks_by_key.keys() - set(known)):
        path = ("recipe", key)
        if draft.possible_values(path) != (Recipe.model_fields[key].default,):
            hint = "; name it in RECIPE_KEYS beside METRICS if yours has it" if ":" in task else ""
            draft.add_problem(
                path,
                f"{task} has no such key, only {fields.join_alternatives(tasks_by_key[key])}; "
                f"drop the key{hint}",
            )


def check_frozen(draft: Draft) -> None:
    """Whether the file says in one way how much is frozen."""
    has_share = draft.possible_values(("recipe", "freeze")) != (None,)
    if has_share and draft.possible_values(("recipe", "freeze_depth")) not in {(0,), (None,)}:
        draft.add_problem(
            ("recipe", "freeze"),
            "freeze_depth says already how much is frozen; keep freeze_depth where one model is "
            "searched, freeze where several with other numbers of stages are",
        )


def add_recipes_of_models(draft: Draft, written: Mapping[str, Any]) -> None:
    """Keeps each model's own defaults of the keys that the file leaves open, where they differ.

    A searched key has a default too: its value where its condition is not met.
    """
    names = draft.possible_values(("model", "name")) or ()
    recipes = {name: model_recipe_fields(draft, name) for name in names if isinstance(name, str)}
    for key in Recipe.model_fields:
        path = ("recipe", key)
        defaults = {
            name: recipe[key].get_default(call_default_factory=True)
            for name, recipe in recipes.items()
        }
        if path in draft.by_model:
            draft.by_model[path] = defaults | dict(draft.by_model[path])
        elif key not in written or draft.domains_of(path):
            draft.by_model[path] = defaults
        if path in draft.by_model and len(set(draft.by_model[path].values())) == 1:
            del draft.by_model[path]


def check_grid(draft: Draft, search: SearchSettings, dimensions: Sequence[Dimension]) -> None:
    """Whether sampler grid can try every value there is."""
    if search.sampler != "grid":
        return
    counts: dict[KeyPath, int] = {}
    for d in dimensions:
        values = d.domain.values()
        counts[d.path] = counts.get(d.path, 0) + len(values or ())
        if values is None:
            draft.add_problem(
                d.path,
                "sampler grid tries every value, and these are endless or too many; add a step, "
                "list choices, or use sampler tpe or random",
            )
    count = math.prod(counts.values())
    if count > MAX_VALUES:
        draft.add_problem(
            ("search", "sampler"),
            f"the grid has {count:,} combinations, at most {MAX_VALUES:,} are possible; use "
            "larger steps, or sampler tpe or random",
        )
