"""A section's keys as written: a scalar is a value, a list a choice, a mapping a range or a choice under a condition."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuner.config import fields
from tuner.config.draft import Draft
from tuner.config.run import Engine, Recipe, Search
from tuner.config.space import Choice, KeyPath, Range
from tuner.config.yaml_document import kind
from tuner.errors import nearest, suggest

RANGE_KEYS = ("low", "high", "log", "step", "when")
CHOICE_KEYS = ("choices", "when")
FOREIGN = {
    "min": "low",
    "max": "high",
    "minval": "low",
    "maxval": "high",
    "values": "choices",
    "value": "choices",
    "q": "step",
}
HOMES: Mapping[str, type[BaseModel]] = {"recipe": Recipe, "search": Search, "engine": Engine}


def elsewhere(key: str) -> str:
    """`; 'lr' is a key of recipe` for a key that another section has."""
    home = next(
        (
            section
            for section, schema in HOMES.items()
            if key in schema.model_fields and key != "name"
        ),
        None,
    )
    return f"; {key!r} is a key of {home}" if home else ""


def section(
    draft: Draft,
    path: KeyPath,
    written: Mapping[str, Any],
    wanted: Mapping[str, FieldInfo],
    *,
    also: tuple[str, ...] = (),
) -> None:
    """Each wanted key as written or at its default. `also` are allowed keys that the caller reads itself."""
    for key in written:
        if key not in wanted and key not in also:
            allowed = (*also, *wanted)
            close = (
                suggest(key, allowed)
                if nearest(key, allowed)
                else elsewhere(key) + suggest(key, allowed)
            )
            draft.wrong((*path, key), f"unknown key{close}")
    for key, field in wanted.items():
        if key in written:
            node(draft, (*path, key), field, written[key])
        elif field.is_required():
            draft.fields[*path, key] = field
            draft.wrong((*path, key), f"is needed: {fields.expected(field)}")
        else:
            draft.fields[*path, key] = field
            draft.values[*path, key] = field.get_default(call_default_factory=True)


def node(draft: Draft, path: KeyPath, field: FieldInfo, written: Any) -> None:
    """One key of the file."""
    draft.fields[path] = field
    leaf: Range | Choice | None = None
    if isinstance(written, list) and not fields.is_sequence(field):
        leaf = choice(draft, path, field, written)
    elif isinstance(written, dict) and "choices" in written:
        unknown(draft, path, written, CHOICE_KEYS)
        inner = written["choices"]
        leaf = choice(
            draft, (*path, "choices"), field, inner if isinstance(inner, list) else [inner]
        )
    elif isinstance(written, dict):
        leaf = interval(draft, path, field, written)
    else:
        draft.fix(path, field, written)
    if leaf is not None:
        draft.search(path, field, leaf)
    if isinstance(written, dict) and "when" in written:
        draft.whens[path] = written["when"]


def unknown(
    draft: Draft, path: KeyPath, written: Mapping[str, Any], allowed: Sequence[str]
) -> None:
    for key in written:
        if key not in allowed:
            close = (
                f"; did you mean {FOREIGN[key]!r}?"
                if FOREIGN.get(key) in allowed
                else nearest(key, allowed)
            )
            draft.wrong(
                (*path, key),
                f"unknown key{close} (a range has {', '.join(RANGE_KEYS)}; a choice has {', '.join(CHOICE_KEYS)})",
            )


def choice(
    draft: Draft, path: Sequence[str | int], field: FieldInfo, written: list[Any]
) -> Choice | None:
    """None when something is wrong with it."""
    before = len(draft.problems)
    if not written:
        draft.wrong(path, f"an empty list of choices; name at least one: {fields.expected(field)}")
    options: list[Any] = []
    for i, option in enumerate(written):
        if isinstance(option, (list, dict)):
            draft.wrong((*path, i), f"a choice must be a plain value, got {kind(option)}")
            continue
        try:
            fitted = fields.fit(field, option)
        except fields.Unfit as error:
            draft.unfit((*path, i), error)
            continue
        if fitted in options:
            draft.wrong(
                (*path, i), f"{fields.written(option)} is listed twice; name each choice once"
            )
        options.append(fitted)
    return Choice(tuple(options)) if len(draft.problems) == before else None


def interval(
    draft: Draft, path: KeyPath, field: FieldInfo, written: Mapping[str, Any]
) -> Range | None:
    """None when something is wrong with it."""
    before = len(draft.problems)
    if not fields.is_number(field):
        draft.wrong(
            path, f"a range is for numbers; expected {fields.expected(field)}, or a list of them"
        )
        return None
    unknown(draft, path, written, RANGE_KEYS)
    low, high = (bound(draft, path, field, key, written) for key in ("low", "high"))
    log, step = written.get("log", False), written.get("step")
    if low is not None and high is not None and not low < high:
        draft.wrong(path, f"low ({low}) must be below high ({high})")
    if not isinstance(log, bool):
        draft.wrong((*path, "log"), f"expected true or false, got {kind(log)}")
    elif log and low is not None and low <= 0:
        draft.wrong((*path, "low"), f"log needs low above 0, got {low}")
    whole = fields.is_integer(field) or all(
        isinstance(n, int) for n in (low, high, 1 if step is None else step)
    )
    if step is not None:
        stride(draft, path, step, log=log is True, whole=fields.is_integer(field))
    if len(draft.problems) > before or low is None or high is None:
        return None
    return Range(low, high, log, step, whole)


def bound(
    draft: Draft, path: KeyPath, field: FieldInfo, key: str, written: Mapping[str, Any]
) -> float | None:
    """One end of a range; None when something is wrong with it."""
    if key not in written:
        draft.wrong(path, f"a range needs low and high; {key} is missing")
        return None
    value = written[key]
    if isinstance(value, (str, bool, list, dict)) or value is None:
        draft.wrong((*path, key), f"expected a number, got {kind(value)}")
        return None
    try:
        found: float = fields.fit(field, value)
    except fields.Unfit as error:
        draft.unfit((*path, key), error)
        return None
    return found


def stride(draft: Draft, path: KeyPath, step: Any, *, log: bool, whole: bool) -> None:
    if not fields.finite(step) or step <= 0:
        draft.wrong((*path, "step"), f"expected a number above 0, got {kind(step)}")
    elif log:
        draft.wrong((*path, "step"), "log and step exclude each other; drop one")
    elif whole and not isinstance(step, int):
        draft.wrong(
            (*path, "step"), f"expected a whole number, since {path[-1]} is one, got {step}"
        )
