"""A section's keys as written.

A scalar is a value, a list a choice, a mapping a range or a choice under a condition.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuner.config import fields
from tuner.config.draft import DomainLocation, Draft
from tuner.config.run import EngineSettings, Recipe, SearchSettings
from tuner.config.space import Choice, KeyPath, Range
from tuner.config.yaml_document import describe_value
from tuner.errors import nearest_hint, suggest_names

RANGE_KEYS = ("low", "high", "log", "step", "when")
CHOICE_KEYS = ("choices", "when")
BY_MODEL_KEYS = ("by_model",)
OTHER_TOOLS_KEYS = {
    "min": "low",
    "max": "high",
    "minval": "low",
    "maxval": "high",
    "values": "choices",
    "value": "choices",
    "q": "step",
}
SECTION_SCHEMAS: Mapping[str, type[BaseModel]] = {
    "recipe": Recipe,
    "search": SearchSettings,
    "engine": EngineSettings,
}


def hint_other_section(key: str) -> str:
    """`; 'lr' is a key of recipe` for a key that another section has."""
    home = next(
        (
            section
            for section, schema in SECTION_SCHEMAS.items()
            if key in schema.model_fields and key != "name"
        ),
        None,
    )
    return f"; {key!r} is a key of {home}" if home else ""


def read_section(
    draft: Draft,
    path: KeyPath,
    written: Mapping[str, Any],
    fields_by_key: Mapping[str, FieldInfo],
    *,
    other_keys: tuple[str, ...] = (),
) -> None:
    """Each wanted key as written or at its default.

    `also` are allowed keys that the caller reads itself.
    """
    for key in written:
        if key not in fields_by_key and key not in other_keys:
            allowed = (*other_keys, *fields_by_key)
            close = (
                suggest_names(key, allowed)
                if nearest_hint(key, allowed)
                else hint_other_section(key) + suggest_names(key, allowed)
            )
            draft.add_problem((*path, key), f"unknown key{close}")
    for key, field in fields_by_key.items():
        if key in written:
            read_key(draft, (*path, key), field, written[key])
        elif field.is_required():
            draft.fields[*path, key] = field
            draft.add_problem((*path, key), f"is needed: {fields.describe_expected(field)}")
        else:
            draft.fields[*path, key] = field
            draft.values[*path, key] = field.get_default(call_default_factory=True)


def read_key(draft: Draft, path: KeyPath, field: FieldInfo, written: Any) -> None:
    """One key of the file."""
    draft.fields[path] = field
    nested = fields.nested_section(field)
    if nested is not None and isinstance(written, dict) and "choices" not in written:
        read_nested(draft, path, nested, written)
        return
    is_list = isinstance(written, list) and not fields.is_sequence(field)
    if is_list and path[1] != "name" and written and all(isinstance(w, dict) for w in written):
        for i, domain in enumerate(written):
            read_domain(draft, (*path, i), field, domain)
            if "when" not in domain and len(written) > 1:
                draft.add_problem(
                    (*path, i),
                    "needs a condition, since the key has several ranges: add one such as "
                    "when: {optimizer: sgd}",
                )
    elif is_list:
        choice = read_choice(draft, path, field, written)
        if choice is not None:
            draft.set_searched(path, field, choice)
    elif isinstance(written, dict) and "by_model" in written:
        read_by_model(draft, path, field, written)
    elif isinstance(written, dict):
        read_domain(draft, path, field, written)
    else:
        draft.set_fixed(path, field, written)


def read_domain(
    draft: Draft, location: DomainLocation, field: FieldInfo, written: Mapping[str, Any]
) -> None:
    """A range or a choice that is written as a mapping, with its condition."""
    domain: Range | Choice | None
    if "choices" in written:
        report_unknown_keys(draft, location, written, CHOICE_KEYS)
        inner = written["choices"]
        domain = read_choice(
            draft, (*location, "choices"), field, inner if isinstance(inner, list) else [inner]
        )
    else:
        domain = read_range(draft, location, field, written)
    if domain is not None:
        draft.set_searched(location, field, domain)
    if "when" in written:
        draft.conditions[location] = written["when"]


def read_nested(
    draft: Draft, path: KeyPath, schema: type[BaseModel], written: Mapping[str, Any]
) -> None:
    """A key whose value is a mapping of keys, of which each may be searched.

    Only the keys that are written become values: what is left out is off.
    """
    allowed = schema.model_fields
    if not written:
        draft.add_problem(path, f"an empty mapping; name at least one of {', '.join(allowed)}")
    for key, value in written.items():
        if key in allowed:
            read_key(draft, (*path, key), allowed[key], value)
        else:
            draft.add_problem((*path, key), f"unknown key{suggest_names(key, allowed)}")


def report_unknown_keys(
    draft: Draft, path: DomainLocation, written: Mapping[str, Any], allowed: Sequence[str]
) -> None:
    for key in written:
        if key not in allowed:
            close = (
                f"; did you mean {OTHER_TOOLS_KEYS[key]!r}?"
                if OTHER_TOOLS_KEYS.get(key) in allowed
                else nearest_hint(key, allowed)
            )
            draft.add_problem(
                (*path, key),
                f"unknown key{close} (a range has {', '.join(RANGE_KEYS)}; a choice has "
                f"{', '.join(CHOICE_KEYS)})",
            )


def read_by_model(
    draft: Draft, path: KeyPath, field: FieldInfo, written: Mapping[str, Any]
) -> None:
    """The value of a key of the recipe for each model of the file.

    A model that is not named has the default.
    """
    report_unknown_keys(draft, path, written, BY_MODEL_KEYS)
    values, place = written["by_model"], (*path, "by_model")
    models = draft.possible_values(("model", "name")) or ()
    if path[0] != "recipe":
        draft.add_problem(place, "only the keys of the recipe can differ by model")
        return
    if not isinstance(values, dict) or not values:
        example = next(iter(models), "MODEL")
        draft.add_problem(
            place, f"expected a mapping such as {{{example}: …}}, got {describe_value(values)}"
        )
        return
    fitted = {}
    for name, value in values.items():
        if name not in models:
            known = suggest_names(name, map(str, models))
            draft.add_problem((*place, name), f"is no model of this file{known}")
        try:
            fitted[name] = fields.convert_value(field, value)
        except fields.InvalidValue as error:
            draft.add_invalid_value((*place, name), error)
    draft.by_model[path] = fitted
    default = field.get_default(call_default_factory=True)
    draft.values[path] = fitted.get(draft.values.get(("model", "name")), default)


def read_choice(
    draft: Draft, path: Sequence[str | int], field: FieldInfo, written: list[Any]
) -> Choice | None:
    """None when something is wrong with it."""
    before = len(draft.problems)
    if not written:
        draft.add_problem(
            path, f"an empty list of choices; name at least one: {fields.describe_expected(field)}"
        )
    options: list[Any] = []
    for i, option in enumerate(written):
        if isinstance(option, (list, dict)):
            draft.add_problem(
                (*path, i), f"a choice must be a plain value, got {describe_value(option)}"
            )
            continue
        try:
            fitted = fields.convert_value(field, option)
        except fields.InvalidValue as error:
            draft.add_invalid_value((*path, i), error)
            continue
        if fitted in options:
            draft.add_problem(
                (*path, i), f"{fields.format_value(option)} is listed twice; name each choice once"
            )
        options.append(fitted)
    return Choice(tuple(options)) if len(draft.problems) == before else None


def read_range(
    draft: Draft, path: DomainLocation, field: FieldInfo, written: Mapping[str, Any]
) -> Range | None:
    """None when something is wrong with it."""
    before = len(draft.problems)
    if not fields.is_number(field):
        draft.add_problem(
            path,
            f"a range is for numbers; expected {fields.describe_expected(field)}, or a list of "
            "them",
        )
        return None
    report_unknown_keys(draft, path, written, RANGE_KEYS)
    low, high = (read_bound(draft, path, field, key, written) for key in ("low", "high"))
    log, step = written.get("log", False), written.get("step")
    if low is not None and high is not None and not low < high:
        draft.add_problem(path, f"low ({low}) must be below high ({high})")
    if not isinstance(log, bool):
        draft.add_problem((*path, "log"), f"expected true or false, got {describe_value(log)}")
    elif log and low is not None and low <= 0:
        draft.add_problem((*path, "low"), f"log needs low above 0, got {low}")
    whole = fields.is_integer(field) or all(
        isinstance(n, int) for n in (low, high, 1 if step is None else step)
    )
    if step is not None:
        check_step(draft, path, step, log=log is True, whole=fields.is_integer(field))
    if len(draft.problems) > before or low is None or high is None:
        return None
    if not whole and not is_between(field, low, high):
        draft.add_problem(
            path,
            f"low ({low}) and high ({high}) are of two kinds; write two of one kind: "
            f"{field.description}",
        )
        return None
    return Range(low, high, log, step, whole)


def is_between(field: FieldInfo, low: float, high: float) -> bool:
    """Whether a field that takes both ends of a range takes the numbers between them too.

    Where a key is a share or a count, one end may be the one and the other end the other.
    """
    try:
        fields.convert_value(field, (low + high) / 2)
    except fields.InvalidValue:
        return False
    return True


def read_bound(
    draft: Draft, path: DomainLocation, field: FieldInfo, key: str, written: Mapping[str, Any]
) -> float | None:
    """One end of a range; None when something is wrong with it."""
    if key not in written:
        draft.add_problem(path, f"a range needs low and high; {key} is missing")
        return None
    value = written[key]
    if isinstance(value, (str, bool, list, dict)) or value is None:
        draft.add_problem((*path, key), f"expected a number, got {describe_value(value)}")
        return None
    try:
        bound: float = fields.convert_value(field, value)
    except fields.InvalidValue as error:
        draft.add_invalid_value((*path, key), error)
        return None
    return bound


def check_step(draft: Draft, path: DomainLocation, step: Any, *, log: bool, whole: bool) -> None:
    if not fields.is_finite_number(step) or step <= 0:
        draft.add_problem((*path, "step"), f"expected a number above 0, got {describe_value(step)}")
    elif log:
        draft.add_problem((*path, "step"), "log and step exclude each other; drop one")
    elif whole and not isinstance(step, int):
        draft.add_problem(
            (*path, "step"), f"expected a whole number, since {path[1]} is one, got {step}"
        )
