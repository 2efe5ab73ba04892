"""One value against one field of the schema: the value as it is meant, or a sentence that teaches."""

import math
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tuner.document import kind
from tuner.errors import nearest

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_SPOKEN = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}


class Unfit(Exception):
    """A value that the field does not take; the message says what it takes."""


def fit(field: FieldInfo, value: Any) -> Any:
    """The value, converted only where nothing is lost (1 -> 1.0, list -> tuple). Raises Unfit."""
    if is_sequence(field) and isinstance(value, list):
        value = tuple(value)
    try:
        return _adapter(field).validate_python(value)
    except ValidationError as error:
        raise Unfit(_sentence(field, value, error)) from None


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[(annotation, *field.metadata)]
    return TypeAdapter(annotation, config=_STRICT)


def _sentence(field: FieldInfo, value: Any, error: ValidationError) -> str:
    given = kind(list(value) if isinstance(value, tuple) else value)
    for problem in error.errors():
        if problem["type"] in _BOUNDS and not isinstance(value, (bool, str)):
            bound, key = _BOUNDS[problem["type"]]
            return f"must be {bound} {problem['ctx'][key]:g}, got {given}"
        if problem["type"] == "value_error":
            return f"{problem['ctx']['error']}, got {given}"
        if problem["type"] == "finite_number":
            return f"must be finite, got {given}"
        if problem["type"] == "string_pattern_mismatch":
            return f"expected {field.description}, got {given}"
    words = [option for option in choices(field) if isinstance(option, str)]
    hint = nearest(value, words).rstrip() if isinstance(value, str) else ""
    return f"expected {expected(field)}, got {given}{hint}"


def kinds(annotation: Any) -> list[Any]:
    """The plain types and literal values that an annotation is made of."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [k for part in typing.get_args(annotation) for k in kinds(part)]
    if origin is Annotated:
        return kinds(typing.get_args(annotation)[0])
    if origin is Literal:
        return list(typing.get_args(annotation))
    return [annotation]


def choices(field: FieldInfo) -> list[Any]:
    """The literal values a field names, if any."""
    return [k for k in kinds(field.annotation) if not isinstance(k, type) and typing.get_origin(k) is None and k is not Any]


def is_sequence(field: FieldInfo) -> bool:
    """Whether a list in the file is one value of this field and not a choice."""
    return any(typing.get_origin(k) is tuple for k in kinds(field.annotation))


def is_number(field: FieldInfo) -> bool:
    return any(k in (int, float, Any) for k in kinds(field.annotation))


def is_integer(field: FieldInfo) -> bool:
    found = kinds(field.annotation)
    return int in found and float not in found


def expected(field: FieldInfo) -> str:
    words: list[str] = []
    for k in kinds(field.annotation):
        if typing.get_origin(k) is tuple:
            words.append(f"a list of {len(typing.get_args(k))} numbers")
        else:
            words.append(_SPOKEN.get(k, str(k)) if isinstance(k, type) else repr(k).strip("'"))
    return alternatives(words)


def alternatives(words: Iterable[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    *head, last = words
    return f"{', '.join(head)} or {last}" if head else last


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
