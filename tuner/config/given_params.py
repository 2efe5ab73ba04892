"""The parameters of a trial that a person gives: first guesses of a file, and enqueued trials."""

import math
from collections.abc import Mapping
from typing import Any

from tuner.config.fields import ROUNDING
from tuner.config.space import Choice, Dimension, Range, Space
from tuner.config.yaml_document import describe_value
from tuner.errors import SpaceError, nearest_hint, suggest_names


def _shown(value: Any) -> str:
    """0.0005 and not 5.00e-4: people know decimals better."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def checked_params(space: Space, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a trial as name -> value: those given, and the defaults of the others.

    Raises SpaceError where a key is not searched, or a value lies outside its range.
    """
    values: dict[str, Any] = {}
    known = list(dict.fromkeys(n for d in space.dimensions for n in (d.key, d.name)))
    for key, value in given.items():
        short = str(key).removeprefix("recipe.")
        if short not in known:
            raise SpaceError(f"{short}: not searched by this study{suggest_names(short, known)}")
        values[short] = value
    if not values:
        raise SpaceError(f"name at least one key, such as {known[0] if known else 'lr'}=…")
    used: set[str] = set()

    def value_of(dimension: Dimension) -> Any:
        for name in (dimension.name, dimension.key):
            if name in values:
                used.add(name)
                return checked_value(dimension, values[name])
        return space.default_value(dimension)

    params = space.choose_params(value_of)
    unused = [key for key in values if key not in used]
    if unused:
        raise SpaceError(f"{unused[0]}: not searched with these values of the other keys")
    return params


def checked_value(dimension: Dimension, value: Any) -> Any:
    """A value of a searched key. Raises SpaceError where it lies outside its domain."""
    domain = dimension.domain
    if isinstance(domain, Choice):
        for option in domain.options:
            if option == value and isinstance(option, bool) == isinstance(value, bool):
                return option
        allowed = ", ".join(map(_shown, domain.options))
        words = [option for option in domain.options if isinstance(option, str)]
        hint = nearest_hint(value, words) if isinstance(value, str) else ""
        raise SpaceError(f"{dimension.name}: {value!r} is none of its choices: {allowed}{hint}")
    return checked_number(dimension.name, domain, value)


def checked_number(name: str, domain: Range, value: Any) -> Any:
    """A number inside a range. Raises SpaceError."""
    between = f"{_shown(domain.low)} to {_shown(domain.high)}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise SpaceError(f"{name}: expected a number, {between}, got {describe_value(value)}")
    if not domain.low <= value <= domain.high:
        raise SpaceError(f"{name}: {value!r} is outside the study's range, {between}")
    if domain.integer and value != int(value):
        raise SpaceError(f"{name}: {value!r} is no whole number")
    if domain.step is None:
        return int(value) if domain.integer else float(value)
    nearest = domain.nearest_value(value)
    if not math.isclose(nearest, value, rel_tol=ROUNDING):
        raise SpaceError(
            f"{name}: {value!r} is no step of the study's range, {_shown(domain.low)} to "
            f"{_shown(domain.highest)} by {_shown(domain.step)}; the nearest is {_shown(nearest)}"
        )
    return nearest
