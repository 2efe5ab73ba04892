"""`when:` conditions: the keys they name, the values those can take, and the order of sampling that follows."""

from collections.abc import Mapping
from typing import Any

from tuner.config import fields
from tuner.config.draft import Draft
from tuner.config.space import Choice, Dimension, KeyPath
from tuner.config.yaml_document import kind
from tuner.errors import nearest

When = Mapping[KeyPath, tuple[Any, ...]]


def dimensions(draft: Draft) -> tuple[Dimension, ...]:
    """The searched keys, each after those it depends on, otherwise in the order of the schema."""
    whens = {path: resolve(draft, path, when) for path, when in draft.whens.items()}
    done: list[KeyPath] = []
    waiting = list(draft.leaves)
    while waiting:
        ready = next(
            (path for path in waiting if not set(whens.get(path, ())) & set(waiting)), None
        )
        if ready is None:
            circle = cycle(waiting, whens)
            draft.wrong(
                (*circle[0], "when"),
                f"these conditions depend on each other: {', '.join('.'.join(path) for path in circle)}",
            )
            break
        done.append(ready)
        waiting.remove(ready)
    return tuple(Dimension(path, draft.leaves[path], whens.get(path, {})) for path in done)


def cycle(waiting: list[KeyPath], whens: Mapping[KeyPath, When]) -> list[KeyPath]:
    """Some keys that depend on each other, where each of `waiting` depends on another of them."""
    trail = [waiting[0]]
    while True:
        following = next(path for path in whens[trail[-1]] if path in waiting)
        if following in trail:
            return sorted(trail[trail.index(following) :], key=waiting.index)
        trail.append(following)


def resolve(draft: Draft, path: KeyPath, when: Any) -> When:
    """The condition with its keys as paths and its values as their fields take them."""
    if not isinstance(when, dict) or not when:
        draft.wrong(
            (*path, "when"), f"expected a mapping such as {{optimizer: sgd}}, got {kind(when)}"
        )
        return {}
    resolved: dict[KeyPath, tuple[Any, ...]] = {}
    for key, written in when.items():
        values = written if isinstance(written, list) else [written]
        if not values:
            draft.wrong((*path, "when", key), "an empty list is never met; name at least one value")
        target = find(draft, path, key)
        if target is not None:
            resolved[target] = tuple(
                admit(draft, (*path, "when", key), target, value) for value in values
            )
    return resolved


def find(draft: Draft, path: KeyPath, key: str) -> KeyPath | None:
    """The key that a condition names: one of the same section, or section.key."""
    target = next((p for p in ((path[0], key), tuple(key.split("."))) if p in draft.fields), None)
    if target is None:
        near = [p[1] for p in draft.fields if p[0] == path[0] and p != path]
        draft.wrong(
            (*path, "when", key),
            f"no such key to depend on{nearest(key, near)} (write a key of {path[0]}, or section.key)",
        )
    elif target == path:
        draft.wrong((*path, "when", key), "a key cannot depend on itself")
        target = None
    return target


def admit(draft: Draft, place: KeyPath, target: KeyPath, value: Any) -> Any:
    """The value as `target` takes it; a problem where `target` never has it."""
    try:
        fitted = fields.fit(draft.fields[target], value)
    except fields.Unfit as error:
        draft.unfit(place, error)
        return value
    name, leaf = ".".join(target), draft.leaves.get(target)
    if target not in draft.values:
        return fitted  # what is wrong there is said there
    possible = (draft.values[target],) if leaf is None else leaf.members()
    if possible is None:
        draft.wrong(
            place,
            f"{name} is searched without steps and is never exactly {fields.written(value)}; give it a step or a list of choices",
        )
    elif fitted not in possible:
        says = (
            f"{possible[0]} to {possible[-1]}"
            if leaf is not None and not isinstance(leaf, Choice)
            else fields.alternatives(map(fields.written, possible))
        )
        draft.wrong(place, f"{fields.written(value)} is never chosen; {name} is {says}")
    return fitted
