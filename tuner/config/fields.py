"""Checks one value against one field: the value as it is meant, or a message that teaches."""

import functools
import math
import operator
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tuner.config.yaml_document import describe_value
from tuner.errors import nearest_hint

ROUNDING = 1e-9  # relative, of a value that is a number of steps
_STRICT_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)
_BOUND_WORDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_ITEM_TYPES = {"string_type": "text", "int_type": "a whole number", "float_type": "a number"}
_TYPE_NAMES = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


class InvalidValue(Exception):
    """A value that the field does not take; the message says what it takes.

    `text`: the value as text, where the field would take that.
    """

    def __init__(self, sentence: str, text: str | None = None) -> None:
        super().__init__(sentence)
        self.text = text


def convert_value(field: FieldInfo, value: Any) -> Any:
    """The value, converted only where nothing is lost (1 -> 1.0, list -> tuple).

    Raises InvalidValue.
    """
    if isinstance(value, list) and any(
        tuple in (k, typing.get_origin(k)) for k in plain_types(field.annotation)
    ):
        value = tuple(value)
    try:
        return _adapter(field).validate_python(value)
    except ValidationError as error:
        raise _invalid_value(field, value, error) from None


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[(annotation, *field.metadata)]
    return TypeAdapter(annotation, config=_STRICT_CONFIG)


def _invalid_value(field: FieldInfo, value: Any, error: ValidationError) -> InvalidValue:
    text = None
    if isinstance(value, (bool, int, float)) and str in plain_types(field.annotation):
        text = format_value(value)
        try:
            _adapter(field).validate_python(text)
        except ValidationError as of_text:  # quotes alone do not help; this says what does
            text, error = None, of_text
    return InvalidValue(_format_error(field, value, error), text)


def _format_error(field: FieldInfo, value: Any, error: ValidationError) -> str:
    given = describe_value(list(value) if isinstance(value, tuple) else value)
    for problem in error.errors():
        if problem["type"] in _BOUND_WORDS and not isinstance(value, (bool, str)):
            bound, key = _BOUND_WORDS[problem["type"]]
            limit = _format_bound(problem["ctx"][key])
            return f"must be {bound} {limit}{_or_whole(field, value)}, got {given}"
        if problem["type"] == "value_error":
            return f"{problem['ctx']['error']}, got {given}"
        if problem["type"] == "finite_number":
            return f"must be a finite number, got {given}"
        place = problem["loc"][-1] if problem["loc"] else None
        if isinstance(value, tuple) and isinstance(place, int) and problem["type"] in _ITEM_TYPES:
            return (
                f"expected {describe_expected(field)}; item {place + 1} of it must be "
                f"{_ITEM_TYPES[problem['type']]}, got {describe_value(value[place])}"
            )
    is_pattern = any(e["type"] == "string_pattern_mismatch" for e in error.errors())
    if is_pattern or any(getattr(m, "pattern", None) for m in field.metadata):
        return f"expected {field.description}, got {given}"
    words = [option for option in literal_choices(field) if isinstance(option, str)]
    hint = nearest_hint(value, words) if isinstance(value, str) else ""
    return f"expected {describe_expected(field)}, got {given}{hint}"


def _or_whole(field: FieldInfo, value: Any) -> str:
    """What else a field takes that is a share or a count, where the value is no count."""
    is_either = {int, float} <= set(plain_types(field.annotation))
    return " or a whole number" if is_either and isinstance(value, float) else ""


def _format_bound(bound: float) -> str:
    return f"{int(bound):,}" if bound == int(bound) else str(bound)


def plain_types(annotation: Any) -> list[Any]:
    """The plain types and literal values that an annotation is made of."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [k for part in typing.get_args(annotation) for k in plain_types(part)]
    if origin is Annotated:
        return plain_types(typing.get_args(annotation)[0])
    if origin is Literal:
        return list(typing.get_args(annotation))
    return [annotation]


def nested_section(field: FieldInfo) -> type[BaseModel] | None:
    """The keys of the mapping that one value of this field can be; None where it cannot."""
    sections = (k for k in plain_types(field.annotation) if _is_section(k))
    return next(sections, None)


def without_section(field: FieldInfo) -> FieldInfo:
    """The field without the mapping that one value of it can be."""
    parts = [part for part in typing.get_args(field.annotation) if not _is_section(part)]
    plain = FieldInfo.from_annotation(functools.reduce(operator.or_, parts))
    return FieldInfo.merge_field_infos(plain, default=field.default, description=field.description)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def literal_choices(field: FieldInfo) -> list[Any]:
    """The literal values a field names, if any."""
    return [
        k
        for k in plain_types(field.annotation)
        if not isinstance(k, type) and typing.get_origin(k) is None and k is not Any
    ]


def mapping_schema(field: FieldInfo) -> type[BaseModel] | None:
    """The keys of a field whose value can be a mapping in the file; None where it cannot."""
    kinds = (k for k in plain_types(field.annotation) if isinstance(k, type))
    return next((k for k in kinds if issubclass(k, BaseModel)), None)


def is_sequence(field: FieldInfo) -> bool:
    """Whether a list in the file is one value of this field and not a choice."""
    return any(
        k in (tuple, list) or typing.get_origin(k) in (tuple, list)
        for k in plain_types(field.annotation)
    )


def is_number(field: FieldInfo) -> bool:
    return any(k in (int, float, Any) for k in plain_types(field.annotation))


def is_integer(field: FieldInfo) -> bool:
    types = plain_types(field.annotation)
    return int in types and float not in types


def describe_expected(field: FieldInfo) -> str:
    words: list[str] = []
    for k in plain_types(field.annotation):
        members = typing.get_args(k)
        if (
            typing.get_origin(k) is tuple
            and Ellipsis not in members
            and set(members) <= {int, float}
        ):
            words.append(f"a list of {len(members)} numbers")
        elif k in (tuple, list) or members:
            words.append("a list")
        elif _is_section(k):
            *others, last = k.model_fields
            words.append(f"a mapping of {', '.join(others)} and {last}")
        else:
            words.append(_TYPE_NAMES.get(k, str(k)) if isinstance(k, type) else repr(k).strip("'"))
    return join_alternatives(words)


def join_alternatives(words: Iterable[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    *head, last = words
    return f"{', '.join(head)} or {last}" if head else last


def format_value(value: Any) -> str:
    """A plain value as the file says it."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


def is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a value is one of the allowed ones. A sampler makes 0.30000000000000004 of three
    steps of 0.1, and a condition says 0.3.
    """
    return value in allowed or (
        isinstance(value, float)
        and any(
            isinstance(one, float) and math.isclose(value, one, rel_tol=ROUNDING) for one in allowed
        )
    )
