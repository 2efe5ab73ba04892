"""A key with several ranges: each range has a condition, and in each case exactly one is met."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from tuner.config import fields
from tuner.config.draft import DomainLocation, Draft, path_of
from tuner.config.space import KeyPath
from tuner.config.yaml_document import format_key_path

Condition = Mapping[KeyPath, tuple[Any, ...]]
Case = Mapping[KeyPath, Any]  # one value for each of some keys
MAX_LABEL = 60  # characters; a table's column for it must stay readable


def several_conditions(
    conditions: Mapping[DomainLocation, Condition],
) -> dict[KeyPath, dict[DomainLocation, Condition]]:
    """The conditions of each key that has several ranges, by the key."""
    by_key: dict[KeyPath, dict[DomainLocation, Condition]] = {}
    for location, condition in conditions.items():
        if isinstance(location[-1], int):
            by_key.setdefault(path_of(location), {})[location] = condition
    return {path: of_key for path, of_key in by_key.items() if len(of_key) > 1}


def check_cases(draft: Draft, conditions: Mapping[DomainLocation, Condition]) -> None:
    """Adds a problem for each case in which a key has two ranges, or none."""
    for path, of_key in several_conditions(conditions).items():
        overlaps = False
        for (first, a), (second, b) in itertools.combinations(of_key.items(), 2):
            case = common_case(a, b)
            if case is not None:
                overlaps = True
                draft.add_problem(
                    (*second, "when"),
                    f"{describe_case(path, case)} is a case of {format_key_path(first)} too; "
                    "each case must have one range",
                )
        keys = {key for when in of_key.values() for key in when}
        possible = {
            key: values
            for key in sorted(keys & draft.values.keys())
            if (values := draft.possible_values(key)) is not None
        }
        if overlaps or possible.keys() != keys:
            continue  # what is wrong with the other keys is said there
        missing = uncovered_case(list(of_key.values()), possible)
        if missing is not None:
            draft.add_problem(
                path,
                f"no range for the case {describe_case(path, missing)}; add one with "
                f"when: {{{describe_case(path, missing)}}}, or one value: "
                f"{{choices: […], when: {{{describe_case(path, missing)}}}}}",
            )


def common_case(a: Condition, b: Condition) -> dict[KeyPath, Any] | None:
    """A case in which both conditions are met; None if there is none."""
    case: dict[KeyPath, Any] = {}
    for key in {**a, **b}:
        common = [
            value for value in a.get(key, b.get(key, ())) if value in b.get(key, a.get(key, ()))
        ]
        if not common:
            return None
        case[key] = common[0]
    return case


def uncovered_case(
    conditions: list[Condition], possible: Mapping[KeyPath, tuple[Any, ...]]
) -> Case | None:
    """A case in which no condition is met; None if there is none.

    The cases are counted instead of listed, since there may be very many of them.

    Args:
        conditions: At most one of them is met in each case.
        possible: The values that each key of the conditions can have.
    """
    case: dict[KeyPath, Any] = {}
    if is_covered(conditions, possible, case):
        return None
    for key, values in possible.items():
        named = {value for when in conditions for value in when.get(key, ())}
        # all values that no condition names are alike
        others = [value for value in values if value not in named][:1]
        case[key] = next(
            value
            for value in (*others, *(v for v in values if v in named))
            if not is_covered(conditions, possible, {**case, key: value})
        )
    return case


def is_covered(
    conditions: list[Condition], possible: Mapping[KeyPath, tuple[Any, ...]], case: Case
) -> bool:
    """Whether every case that agrees with `case` meets one of the conditions."""
    free = [key for key in possible if key not in case]
    covered = sum(
        math.prod(len(set(when.get(key, possible[key]))) for key in free)
        for when in conditions
        if all(value in when.get(key, (value,)) for key, value in case.items())
    )
    return covered == math.prod(len(possible[key]) for key in free)


def name_cases(conditions: Mapping[DomainLocation, Condition]) -> dict[DomainLocation, str]:
    """A label for each of the ranges of a key that has several: `sgd` in `lr[sgd]`.

    Where the labels would be long or equal, the ranges are numbered from 1.
    """
    labels: dict[DomainLocation, str] = {}
    for path, of_key in several_conditions(conditions).items():
        words = [label_of(path, condition) for condition in of_key.values()]
        if max(map(len, words)) > MAX_LABEL or len(set(words)) < len(words):
            words = [str(number) for number in range(1, len(words) + 1)]
        labels |= dict(zip(of_key, words, strict=True))
    return labels


def label_of(path: KeyPath, condition: Condition) -> str:
    """The label of one condition. Words such as `sgd` need no key."""
    parts = []
    for key, values in sorted(condition.items()):
        text = "|".join(map(fields.format_value, values))
        are_words = all(isinstance(value, str) for value in values)
        parts.append(text if are_words else f"{key_beside(path, key)}={text}")
    return ", ".join(parts)


def describe_case(path: KeyPath, case: Case) -> str:
    """A case as a condition of the key `path` says it."""
    return ", ".join(
        f"{key_beside(path, key)}: {fields.format_value(value)}" for key, value in case.items()
    )


def key_beside(path: KeyPath, key: KeyPath) -> str:
    """A key as a condition of the key `path` names it: without its section if that is the same."""
    return ".".join(key[1:] if key[0] == path[0] else key)
