"""What a study's trials have in common, and whether a space file agrees with it. Only such a file continues the study."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from tuner.config.space import KeyPath, Space

LOCATIONS = (
    "data.path",
    "data.images",
)  # where the data lie; the digest says whether they are equal


def identity(space: Space) -> dict[str, Any]:
    """The keys of the file that every trial of a study shares, as sections, with every default."""
    sections = space.to_dict()
    search = space.settings.search
    shared = ("task", "data", "model", "recipe", "seed")
    return {section: sections[section] for section in shared if section in sections} | {
        "search": {"metric": search.metric, "seed": search.seed}
    }


def defaulted_keys(space: Space) -> list[str]:
    """The keys, dotted, that the file leaves at their default."""
    return sorted(".".join(path) for path in space.values if not _written(space, path))


def _written(space: Space, path: KeyPath) -> bool:
    section = space.document.content.get(path[0])
    if len(path) == 1 or path[1] == "name":
        return section is not None
    return isinstance(section, dict) and path[1] in section


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(content, dict):
        return {path: content}
    keys: dict[str, Any] = {}
    for key, value in content.items():
        keys |= flat(value, f"{path}.{key}" if path else key)
    return keys


class Comparison:
    """A study's identity beside a file's. `defaulted`: which keys each of them leaves at their default.

    A key that one of the two versions of tuner does not know is no difference while it is at its default. Where a
    default has changed since, the study goes on with the earlier one: `earlier`. All else that differs is a problem.
    """

    def __init__(
        self,
        study: Mapping[str, Any],
        study_defaulted: Collection[str],
        file: Mapping[str, Any],
        file_defaulted: Collection[str],
    ) -> None:
        before, now = flat(study), flat(json.loads(json.dumps(file)))
        self.earlier: dict[str, Any] = {}
        self.problems: list[str] = []
        for key in sorted((before.keys() | now.keys()) - set(LOCATIONS)):
            if before.get(key) == now.get(key):
                continue
            before_defaulted = key not in before or key in study_defaulted
            now_defaulted = key not in now or key in file_defaulted
            if not (before_defaulted and now_defaulted):
                self.problems.append(_difference(key, before, now))
            elif key in before and key in now:
                self.earlier[key] = before[key]


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    created = f"with {key}={_shown(before[key])}" if key in before else f"without {key}"
    return f"{created}, this file {f'has {_shown(now[key])}' if key in now else 'does not have it'}"


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
