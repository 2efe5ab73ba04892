"""A space in the making: what has been read so far, and every problem found on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from tuner.config import fields
from tuner.config.fields import Unfit
from tuner.config.space import Choice, KeyPath, Range
from tuner.config.yaml_document import COMMAND_LINE, Document, dotted


@dataclass
class Draft:
    """`fields` holds every key the file may have so far; `values` those that are sound, searched ones at their default."""

    doc: Document
    problems: list[str] = field(default_factory=list)
    fields: dict[KeyPath, FieldInfo] = field(default_factory=dict)
    values: dict[KeyPath, Any] = field(default_factory=dict)
    leaves: dict[KeyPath, Range | Choice] = field(default_factory=dict)
    whens: dict[KeyPath, Mapping[str, Any]] = field(default_factory=dict)

    def wrong(self, path: Sequence[str | int], what: str) -> None:
        self.problems.append(self.doc.problem(path, what))

    def unfit(self, path: Sequence[str | int], error: Unfit) -> None:
        """A value that its field does not take, with how to write it as text where that helps."""
        hint = ""
        if error.text is not None and self.doc.where(path) == COMMAND_LINE:
            key = [part for part in path if isinstance(part, str)]
            quoted = f'"{error.text}"' if len(key) == len(path) else f'[…, "{error.text}", …]'
            hint = f"; for text write {dotted(key)}='{quoted}'"  # a shell removes the outer quotes
        elif error.text is not None:
            hint = "; put it in quotes"
        self.wrong(path, f"{error}{hint}")

    def fix(self, path: KeyPath, field: FieldInfo, value: Any) -> None:
        """The key has this one value, if its field takes it."""
        self.fields[path] = field
        try:
            self.values[path] = fields.fit(field, value)
        except Unfit as error:
            self.unfit(path, error)

    def defaults(self) -> dict[KeyPath, Any]:
        """Each key's default as its plug-in or schema has it, of the keys that have one."""
        return {
            path: field.get_default(call_default_factory=True)
            for path, field in self.fields.items()
            if not field.is_required()
        }

    def search(self, path: KeyPath, field: FieldInfo, leaf: Range | Choice) -> None:
        """The key is searched; its default is the field's, brought into the leaf."""
        self.leaves[path] = leaf
        self.values[path] = leaf.clip(
            None if field.is_required() else field.get_default(call_default_factory=True)
        )
