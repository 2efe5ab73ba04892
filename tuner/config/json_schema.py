"""The JSON schema of a space file, for editors that complete and check YAML."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from tuner.config import fields, plugins
from tuner.config.parsing import TopLevelKeys
from tuner.config.run import EngineSettings, Recipe, SearchSettings

NUMBER_SCHEMA = {"type": "number"}
CONDITION_SCHEMA = {
    "type": "object",
    "minProperties": 1,
    "description": "searched only while these keys have these values",
}


def space_schema() -> dict[str, Any]:
    """Everything `tuner check` takes, ranges and choices included."""
    one, tracker = (
        {"anyOf": [{"enum": plugins.list_names(kind)}, _import_path_schema()]}
        for kind in ("export", "tracker")
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tuner search space",
        "type": "object",
        "required": ["task", "data", "model"],
        "additionalProperties": False,
        "properties": {
            "task": plugin_schema("task"),
            "data": plugin_schema("data"),
            "model": plugin_schema("model"),
            "recipe": section_schema(Recipe.model_fields, searched=True, by_model=True),
            "seed": value_schema(TopLevelKeys.model_fields["seed"]),
            "try": {
                "type": ["array", "null"],
                "items": {"type": "object", "minProperties": 1},
                "description": "recipes that are tried first, right after the default recipe: "
                "values of searched keys; others have their defaults",
            },
            "search": section_schema(SearchSettings.model_fields, searched=False),
            "engine": {
                "anyOf": [
                    {"enum": plugins.list_names("engine")},
                    section_schema(EngineSettings.model_fields, searched=False),
                ]
            },
            "storage": {
                "type": ["string", "null"],
                "description": "SQLAlchemy URL; null: SQLite in the study's folder",
            },
            "export": {"anyOf": [{"type": "null"}, one, {"type": "array", "items": one}]},
            "track": {
                "anyOf": [{"type": "null"}, tracker, {"type": "array", "items": tracker}],
                "description": "where a search is followed beside console and dashboard: a run for "
                "each trial, in the study's folder unless the tracker's own variables say "
                "otherwise",
            },
        },
    }


def _import_path_schema() -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": "^[A-Za-z_][\\w.]*:[A-Za-z_]\\w*$",
        "description": "your own: package.module:attribute",
    }


def _name_schema(names: list[str]) -> dict[str, Any]:
    """One of these names; one with a star stands for many."""
    bare = [name for name in names if "*" not in name]
    patterns = [
        {"type": "string", "pattern": f"^{name.replace('*', '.+')}$"}
        for name in names
        if "*" in name
    ]
    forms: list[dict[str, Any]] = [{"enum": bare}] * bool(bare) + patterns
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def plugin_schema(kind: str) -> dict[str, Any]:
    """A plug-in by its bare name, or a mapping whose keys depend on the name."""
    known = plugins.list_names(kind)
    alike: dict[str, list[str]] = {}  # the schema of their keys -> the names that share it
    for name in known:
        alike.setdefault(
            json.dumps(section_schema(plugins.read_keys(kind, name).fields, searched=True)), []
        ).append(name)
    one: dict[str, Any] = {"anyOf": [_name_schema(known), _import_path_schema()]}
    several = {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}
    chosen = {
        "type": "object",
        "required": ["choices"],
        "additionalProperties": False,
        "properties": {"choices": several, "when": CONDITION_SCHEMA},
    }
    forms: list[dict[str, Any]] = [one, *([several, chosen] if kind == "model" else [])]
    for written, members in alike.items():
        keys = json.loads(written)
        named = _name_schema(members)
        if kind == "model":
            named = {"anyOf": [named, several, chosen]}
        forms.append(
            {
                **keys,
                "properties": {"name": named, **keys["properties"]},
                "required": ["name", *keys.get("required", [])],
            }
        )
    forms.append(
        {"type": "object", "properties": {"name": _import_path_schema()}, "required": ["name"]}
    )
    return {"anyOf": forms}


def section_schema(
    fields_by_key: Mapping[str, FieldInfo], *, searched: bool, by_model: bool = False
) -> dict[str, Any]:
    properties = {
        name: key_schema(field, by_model=by_model) if searched else value_schema(field)
        for name, field in fields_by_key.items()
    }
    required = [name for name, field in fields_by_key.items() if field.is_required()]
    tree: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return tree | ({"required": required} if required else {})


def value_schema(field: FieldInfo) -> dict[str, Any]:
    """One value of a field that is no mapping."""
    annotation: Any = (
        Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    )
    schema = _inlined(TypeAdapter(annotation).json_schema())
    extra = {} if field.is_required() else {"default": field.get_default(call_default_factory=True)}
    return {**schema, **extra, **({"description": field.description} if field.description else {})}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its definitions in the places that refer to them."""
    definitions = schema.pop("$defs", {})
    forms = [
        definitions[form["$ref"].rpartition("/")[2]] if "$ref" in form else form
        for form in schema.get("anyOf", ())
    ]
    return {**schema, "anyOf": forms} if forms else schema


def domain_schemas(field: FieldInfo, one: dict[str, Any]) -> list[dict[str, Any]]:
    """The mappings that search a key: a choice of values of the schema `one`, and a range."""
    domains: list[dict[str, Any]] = []
    if not fields.is_sequence(field):
        listed = {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}
        domains.append(
            {
                "type": "object",
                "required": ["choices"],
                "additionalProperties": False,
                "properties": {"choices": listed, "when": CONDITION_SCHEMA},
            }
        )
    if fields.is_number(field):
        properties = {
            "low": NUMBER_SCHEMA,
            "high": NUMBER_SCHEMA,
            "log": {"type": "boolean"},
            "step": NUMBER_SCHEMA,
            "when": CONDITION_SCHEMA,
        }
        domains.append(
            {
                "type": "object",
                "required": ["low", "high"],
                "additionalProperties": False,
                "properties": properties,
            }
        )
    return domains


def key_schema(field: FieldInfo, *, by_model: bool = False) -> dict[str, Any]:
    """One value, a list of choices, a range, several of these, a mapping of keys, or a value for
    each model.
    """
    nested = fields.nested_section(field)
    one = value_schema(field if nested is None else fields.without_section(field))
    bare = {k: v for k, v in one.items() if k not in ("description", "default")}
    forms: list[dict[str, Any]] = [bare]
    domains = domain_schemas(field, bare)
    if not fields.is_sequence(field):
        forms.append({"type": "array", "items": bare, "minItems": 1, "uniqueItems": True})
    forms += domains
    if not fields.is_sequence(field):
        forms.append(
            {
                "type": "array",
                "items": {"anyOf": domains},
                "minItems": 1,
                "description": "ranges or choices, each with its condition",
            }
        )
    if nested is not None:
        keys = section_schema(nested.model_fields, searched=True)
        forms.append({**keys, "minProperties": 1})
    if by_model:
        values = {"type": "object", "minProperties": 1, "additionalProperties": bare}
        forms.append(
            {
                "type": "object",
                "required": ["by_model"],
                "additionalProperties": False,
                "properties": {"by_model": values},
            }
        )
    return {"anyOf": forms, **{k: one[k] for k in ("description", "default") if k in one}}
