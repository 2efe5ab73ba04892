"""A space in the making: what has been read so far, and every problem found on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from tuner.config import fields
from tuner.config.fields import InvalidValue
from tuner.config.space import Choice, KeyPath, Range
from tuner.config.yaml_document import COMMAND_LINE, Document, format_key_path


@dataclass
class Draft:
    """`fields` holds every key the file may have so far.

    `values` those that are sound, searched ones at their default.
    """

    document: Document
    problems: list[str] = field(default_factory=list)
    fields: dict[KeyPath, FieldInfo] = field(default_factory=dict)
    values: dict[KeyPath, Any] = field(default_factory=dict)
    domains: dict[KeyPath, Range | Choice] = field(default_factory=dict)
    conditions: dict[KeyPath, Mapping[str, Any]] = field(default_factory=dict)

    def add_problem(self, path: Sequence[str | int], what: str) -> None:
        self.problems.append(self.document.format_problem(path, what))

    def add_invalid_value(self, path: Sequence[str | int], error: InvalidValue) -> None:
        """A value that its field does not take, with how to write it as text where that helps."""
        hint = ""
        if error.text is not None and self.document.location(path) == COMMAND_LINE:
            key = [part for part in path if isinstance(part, str)]
            quoted = f'"{error.text}"' if len(key) == len(path) else f'[…, "{error.text}", …]'
            # a shell removes the outer quotes
            hint = f"; for text write {format_key_path(key)}='{quoted}'"
        elif error.text is not None:
            hint = "; put it in quotes"
        self.add_problem(path, f"{error}{hint}")

    def set_fixed(self, path: KeyPath, field: FieldInfo, value: Any) -> None:
        """The key has this one value, if its field takes it."""
        self.fields[path] = field
        try:
            self.values[path] = fields.convert_value(field, value)
        except InvalidValue as error:
            self.add_invalid_value(path, error)

    def defaults(self) -> dict[KeyPath, Any]:
        """Each key's default as its plug-in or schema has it, of the keys that have one."""
        return {
            path: field.get_default(call_default_factory=True)
            for path, field in self.fields.items()
            if not field.is_required()
        }

    def set_searched(self, path: KeyPath, field: FieldInfo, domain: Range | Choice) -> None:
        """The key is searched; its default is the field's, brought into the leaf."""
        self.domains[path] = domain
        self.values[path] = domain.nearest_value(
            None if field.is_required() else field.get_default(call_default_factory=True)
        )
