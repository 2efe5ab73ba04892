"""`when:` conditions: which keys they name, and which values these keys can have.

The order in which dimensions are sampled follows from the conditions.
"""

from collections.abc import Collection, Mapping
from typing import Any

from tuner.config import fields
from tuner.config.draft import Draft
from tuner.config.space import Choice, Dimension, KeyPath
from tuner.config.yaml_document import describe_value
from tuner.errors import nearest_hint

Condition = Mapping[KeyPath, tuple[Any, ...]]


def order_dimensions(draft: Draft) -> tuple[Dimension, ...]:
    """The searched keys in the order of the schema, but each after the keys on which it depends."""
    whens = {path: resolve_condition(draft, path, when) for path, when in draft.conditions.items()}
    needed = {path: needed_keys(draft, when) for path, when in whens.items()}
    done: list[KeyPath] = []
    waiting = list(draft.domains)
    while waiting:
        ready = next((path for path in waiting if not needed.get(path, set()) & set(waiting)), None)
        if ready is None:
            circle = find_cycle(waiting, needed)
            draft.add_problem(
                (*circle[0], "when"),
                "these conditions depend on each other: "
                f"{', '.join('.'.join(path) for path in circle)}",
            )
            break
        done.append(ready)
        waiting.remove(ready)
    return tuple(Dimension(path, draft.domains[path], whens.get(path, {})) for path in done)


def needed_keys(draft: Draft, condition: Condition) -> set[KeyPath]:
    """The keys that must be sampled before it is known whether a condition is met."""
    differs_by_model = any(path in draft.by_model for path in condition)
    return set(condition) | ({("model", "name")} if differs_by_model else set())


def find_cycle(
    unordered: list[KeyPath], conditions: Mapping[KeyPath, Collection[KeyPath]]
) -> list[KeyPath]:
    """Keys that depend on each other in a circle; each unordered key depends on another one."""
    trail = [unordered[0]]
    while True:
        following = next(path for path in conditions[trail[-1]] if path in unordered)
        if following in trail:
            return sorted(trail[trail.index(following) :], key=unordered.index)
        trail.append(following)


def resolve_condition(draft: Draft, path: KeyPath, when: Any) -> Condition:
    """The condition with key paths as keys, and with values as their fields take them."""
    if not isinstance(when, dict) or not when:
        draft.add_problem(
            (*path, "when"),
            f"expected a mapping such as {{optimizer: sgd}}, got {describe_value(when)}",
        )
        return {}
    resolved: dict[KeyPath, tuple[Any, ...]] = {}
    for key, written in when.items():
        values = written if isinstance(written, list) else [written]
        if not values:
            draft.add_problem(
                (*path, "when", key), "an empty list is never met; name at least one value"
            )
        target = find_condition_key(draft, path, key)
        if target is not None:
            resolved[target] = tuple(
                check_condition_value(draft, (*path, "when", key), target, value)
                for value in values
            )
    return resolved


def find_condition_key(draft: Draft, path: KeyPath, key: str) -> KeyPath | None:
    """The key that a condition names: one of the same mapping or section, or section.key."""
    parts = tuple(key.split("."))
    candidates = ((*path[:-1], *parts), (path[0], *parts), parts)
    target = next((candidate for candidate in candidates if candidate in draft.fields), None)
    if target is None:
        near = [p[1] for p in draft.fields if p[0] == path[0] and p != path]
        draft.add_problem(
            (*path, "when", key),
            f"no such key to depend on{nearest_hint(key, near)} (write a key of {path[0]}, or "
            "section.key)",
        )
    elif target == path:
        draft.add_problem((*path, "when", key), "a key cannot depend on itself")
        target = None
    return target


def check_condition_value(draft: Draft, path: KeyPath, target: KeyPath, value: Any) -> Any:
    """The converted value; adds a problem where `target` never has this value."""
    try:
        fitted = fields.convert_value(draft.fields[target], value)
    except fields.InvalidValue as error:
        draft.add_invalid_value(path, error)
        return value
    name, leaf = ".".join(target), draft.domains.get(target)
    if target not in draft.values:
        return fitted  # what is wrong there is said there
    possible = draft.possible_values(target)
    if possible is None:
        draft.add_problem(
            path,
            f"{name} is searched without steps and is never exactly {fields.format_value(value)}; "
            "give it a step or a list of choices",
        )
    elif fitted not in possible:
        says = (
            f"{possible[0]} to {possible[-1]}"
            if leaf is not None and not isinstance(leaf, Choice)
            else fields.join_alternatives(map(fields.format_value, possible))
        )
        draft.add_problem(path, f"{fields.format_value(value)} is never chosen; {name} is {says}")
    return fitted
