"""A space in the making: what has been read so far, and every problem found on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from tuner import fields
from tuner.document import Document
from tuner.space import Choice, KeyPath, Range


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

    def fix(self, path: KeyPath, field: FieldInfo, value: Any) -> None:
        """The key has this one value, if its field takes it."""
        self.fields[path] = field
        try:
            self.values[path] = fields.fit(field, value)
        except fields.Unfit as error:
            self.wrong(path, str(error))

    def search(self, path: KeyPath, field: FieldInfo, leaf: Range | Choice) -> None:
        """The key is searched; its default is the field's, brought into the leaf."""
        self.leaves[path] = leaf
        self.values[path] = leaf.clip(
            None if field.is_required() else field.get_default(call_default_factory=True)
        )
