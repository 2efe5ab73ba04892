"""The keys that all trials of a study share, and whether a space file has the same.

Only a file with the same identity continues the study.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from tuner.config.space import KeyPath, Space

# The data may lie elsewhere: their digest says whether they are the same.
LOCATIONS = ("data.path", "data.images")
# What a study did before there were these keys. Their defaults, or those of a model family's
# recipe, may be others.
BEFORE_THE_KEY: dict[str, Any] = {
    "recipe.head_lr": 1.0,
    "recipe.backbone_lr": 1.0,
    "recipe.auxiliary_lr": 1.0,
    "recipe.layer_decay": 1.0,
    "recipe.decay_norms": True,
    "recipe.ema": 0.0,
    "recipe.beta2": None,
    "recipe.epsilon": None,
    "recipe.unfreeze_every": 0,
    "recipe.accumulate": 1,
    "recipe.min_lr": 0.0,
}


def identity(space: Space) -> dict[str, Any]:
    """Return the keys of a space file that every trial of a study shares.

    Returns:
        The sections with these keys, with every default.
    """
    sections = space.to_dict()
    search = space.settings.search
    shared = ("task", "data", "model", "recipe", "seed")
    return {section: sections[section] for section in shared if section in sections} | {
        "search": {"metric": search.metric, "seed": search.seed}
    }


def defaulted_keys(space: Space) -> list[str]:
    """Return the dotted keys that a space file leaves at their defaults."""
    return sorted(".".join(path) for path in space.values if not _is_written(space, path))


def _is_written(space: Space, path: KeyPath) -> bool:
    section = space.document.content.get(path[0])
    if len(path) == 1 or path[1] == "name":
        return section is not None
    return isinstance(section, dict) and path[1] in section


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted keys.

    A value that depends on the model is one value.
    """
    if not isinstance(content, dict) or "by_model" in content:
        return {path: content}
    keys: dict[str, Any] = {}
    for key, value in content.items():
        keys |= flat(value, f"{path}.{key}" if path else key)
    return keys


class Comparison:
    """The differences between a study's identity and a file's identity.

    A study may be older than this version of tuner. A key that only one of the two versions knows
    is no difference while it has its default. Where a default has changed, the study continues with
    the earlier default; so it does where a new key has another default than what was done before.
    Every other difference is a problem.

    Attributes:
        earlier: The earlier values of defaults that have changed, by dotted key.
        problems: The other differences, for messages.

    Args:
        study: The study's identity.
        study_defaulted: The dotted keys that the study leaves at their defaults.
        file: The file's identity.
        file_defaulted: The dotted keys that the file leaves at their defaults.
    """

    def __init__(
        self,
        study: Mapping[str, Any],
        study_defaulted: Collection[str],
        file: Mapping[str, Any],
        file_defaulted: Collection[str],
    ) -> None:
        known, now = flat(study), flat(json.loads(json.dumps(file)))
        before = BEFORE_THE_KEY | known
        self.earlier: dict[str, Any] = {}
        self.problems: list[str] = []
        for key in sorted((before.keys() | now.keys()) - set(LOCATIONS)):
            if before.get(key) == now.get(key):
                continue
            before_defaulted = key not in known or key in study_defaulted
            now_defaulted = key not in now or key in file_defaulted
            if not (before_defaulted and now_defaulted):
                self.problems.append(_difference(key, known, now))
            elif key in before and key in now:
                self.earlier[key] = before[key]


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    created = f"with {key}={_shown(before[key])}" if key in before else f"without {key}"
    file_has = f"has {_shown(now[key])}" if key in now else "does not have it"
    return f"{created}, this file {file_has}"


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
