"""Groups of examples that are never in different splits: by their names, or by those of files."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tuner.errors import DataError
from tuner.preprocessing.splits import Items


def group_by_name(items: Items, expression: str) -> tuple[Items, list[str]]:
    """The items with their groups, and warnings.

    Args:
        items: images; their examples are paths.
        expression: a regular expression. The group of an image is what its parentheses find in
            the file's name, or all that it finds if it has none. With a slash in it, it is looked
            for in the whole path. An image in which it finds nothing is a group of its own.

    Raises:
        DataError: it finds nothing in any image.
    """
    pattern = re.compile(expression)
    found = [_group_name(pattern, Path(path)) for path in items.examples]
    alone = [str(path) for path, name in zip(items.examples, found, strict=True) if name is None]
    if len(alone) == len(found):
        raise DataError(
            f"data.group: {expression!r} is found in none of {len(found)} names, such as "
            f"{Path(alone[0]).name if alone else None!r}; for person_12_a.jpg write "
            "'person_(\\d+)_'"
        )
    # a whole path is no other image's group by chance
    names = [
        str(path) if name is None else name
        for path, name in zip(items.examples, found, strict=True)
    ]
    warnings = (
        [
            f"data.group: {expression!r} is not found in {len(alone)} of {len(found)} names, such "
            f"as {Path(alone[0]).name}; each of these images is a group of its own"
        ]
        if alone
        else []
    )
    return with_groups(items, names), warnings


def with_groups(items: Items, names: Sequence[str]) -> Items:
    """The items with the group of each by its name; without names, as they are."""
    return replace(items, **number_groups(names)) if names else items


def number_groups(names: Sequence[str]) -> dict[str, Any]:
    """The fields `groups` and `group_names` of items whose groups have these names."""
    group_names = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(group_names)}
    groups = np.array([number[name] for name in names], np.int64)
    return {"groups": groups, "group_names": group_names}


def _group_name(pattern: re.Pattern[str], path: Path) -> str | None:
    """What the pattern finds in the name of a file; None where it finds nothing."""
    match = pattern.search(path.as_posix() if "/" in pattern.pattern else path.name)
    if match is None:
        return None
    return " ".join(part or "" for part in match.groups()) if match.groups() else match.group()
