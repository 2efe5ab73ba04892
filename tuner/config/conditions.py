"""`when:` conditions: which keys they name, and which values these keys can have.

The order in which dimensions are sampled follows from the conditions.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tuner.config import fields
from tuner.config.cases import Condition, check_cases, name_cases
from tuner.config.draft import DomainLocation, Draft, path_of
from tuner.config.space import Choice, Dimension, KeyPath, Range
from tuner.config.yaml_document import describe_value
from tuner.errors import nearest_hint


def order_dimensions(draft: Draft) -> tuple[Dimension, ...]:
    """The searched keys in the order of the schema, but each after the keys on which it depends."""
    problem_count = len(draft.problems)
    whens = {
        location: resolve_condition(draft, location, when)
        for location, when in draft.conditions.items()
    }
    if len(draft.problems) == problem_count:
        check_cases(draft, whens)
    needed = {location: needed_keys(draft, when) for location, when in whens.items()}
    done: list[DomainLocation] = []
    waiting = list(draft.domains)
    while waiting:
        unknown = {path_of(location) for location in waiting}
        ready = next((place for place in waiting if not needed.get(place, set()) & unknown), None)
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
    labels = name_cases(whens)
    return tuple(
        Dimension(
            path_of(location),
            draft.domains[location],
            whens.get(location, {}),
            labels.get(location, ""),
        )
        for location in done
    )


def needed_keys(draft: Draft, condition: Condition) -> set[KeyPath]:
    """The keys that must be sampled before it is known whether a condition is met."""
    differs_by_model = any(path in draft.by_model for path in condition)
    return set(condition) | ({("model", "name")} if differs_by_model else set())


def find_cycle(
    unordered: list[DomainLocation], needed: Mapping[DomainLocation, Collection[KeyPath]]
) -> list[KeyPath]:
    """Keys that depend on each other in a circle; each unordered key depends on another one."""
    paths = list(dict.fromkeys(map(path_of, unordered)))
    needed_by_path = {
        path: [
            key
            for location in unordered
            if path_of(location) == path
            for key in needed.get(location, ())
        ]
        for path in paths
    }
    trail = [paths[0]]
    while True:
        following = next(path for path in needed_by_path[trail[-1]] if path in paths)
        if following in trail:
            return sorted(trail[trail.index(following) :], key=paths.index)
        trail.append(following)


def resolve_condition(draft: Draft, path: DomainLocation, when: Any) -> Condition:
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


def find_condition_key(draft: Draft, path: DomainLocation, key: str) -> KeyPath | None:
    """The key that a condition names: one of the same mapping or section, or section.key; the
    name of a section alone is the name in it.
    """
    own, parts = path_of(path), tuple(key.split("."))
    candidates = ((*own[:-1], *parts), (own[0], *parts), parts, (*parts, "name"))
    target = next((candidate for candidate in candidates if candidate in draft.fields), None)
    if target is None:
        near = [p[1] for p in draft.fields if p[0] == own[0] and p != own]
        draft.add_problem(
            (*path, "when", key),
            f"no such key to depend on{nearest_hint(key, near)} (write a key of {own[0]}, or "
            "section.key)",
        )
    elif target == own:
        draft.add_problem((*path, "when", key), "a key cannot depend on itself")
        target = None
    return target


def check_condition_value(draft: Draft, path: DomainLocation, target: KeyPath, value: Any) -> Any:
    """The converted value; adds a problem where `target` never has this value."""
    try:
        fitted = fields.convert_value(draft.fields[target], value)
    except fields.InvalidValue as error:
        draft.add_invalid_value(path, error)
        return value
    name = ".".join(target)
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
        says = " or ".join(map(describe_domain, draft.domains_of(target))) or describe_values(
            possible
        )
        draft.add_problem(path, f"{fields.format_value(value)} is never chosen; {name} is {says}")
    return fitted


def describe_domain(domain: Range | Choice) -> str:
    """The values of a domain, as a message names them."""
    if isinstance(domain, Choice):
        return describe_values(domain.options)
    return f"{fields.format_value(domain.lowest)} to {fields.format_value(domain.highest)}"


def describe_values(values: Iterable[Any]) -> str:
    return fields.join_alternatives(map(fields.format_value, values))
