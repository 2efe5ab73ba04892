"""A space that is being read: what has been read so far, and every problem."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from tuner.config import fields
from tuner.config.fields import InvalidValue
from tuner.config.space import Choice, KeyPath, Range
from tuner.config.yaml_document import COMMAND_LINE, Document, format_key_path

# where a domain is written: a key's path, and an index if the key has several domains
DomainLocation = tuple[str | int, ...]


def path_of(location: DomainLocation) -> KeyPath:
    """The path of the key whose domain is written at a location."""
    return tuple(part for part in location if isinstance(part, str))


@dataclass
class Draft:
    """The shared state of one reading of a space file.

    Five modules fill one draft, each its own part: `parsing` (sections and plug-ins),
    `section_keys` (values, choices and ranges), `settings` (search, engine, storage, export),
    `conditions` (`when`) and `fields` through the methods below (one value against its field). None
    of them raises at a problem: each adds it to `problems` and goes on, so that the user sees every
    problem of the file at once. `parsing.parse_space` makes the draft, calls the other modules, and
    builds the Space at the end if there was no problem.

    `fields`: every key that the file may have, as far as the plug-ins are known. `values`: the
    value of each key that has no problem; a searched key has its default. `domains`: the ranges and
    choices of the searched keys, by their locations. `conditions`: each `when` as it is written, by
    the location of its domain. `by_model`: the values of each key that has another one, or another
    default, with another model.
    """

    document: Document
    problems: list[str] = field(default_factory=list)
    fields: dict[KeyPath, FieldInfo] = field(default_factory=dict)
    values: dict[KeyPath, Any] = field(default_factory=dict)
    domains: dict[DomainLocation, Range | Choice] = field(default_factory=dict)
    conditions: dict[DomainLocation, Mapping[str, Any]] = field(default_factory=dict)
    by_model: dict[KeyPath, Mapping[str, Any]] = field(default_factory=dict)

    def add_problem(self, path: Sequence[str | int], what: str) -> None:
        self.problems.append(self.document.format_problem(path, what))

    def add_invalid_value(self, path: Sequence[str | int], error: InvalidValue) -> None:
        """Adds the problem of a value that its field does not take; says how to quote it if text is
        meant.
        """
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
        """Gives the key this one value, if its field takes it."""
        self.fields[path] = field
        try:
            self.values[path] = fields.convert_value(field, value)
        except InvalidValue as error:
            self.add_invalid_value(path, error)

    def defaults(self) -> dict[KeyPath, Any]:
        """The default of each key that has one, as its plug-in or schema states it."""
        return {
            path: field.get_default(call_default_factory=True)
            for path, field in self.fields.items()
            if not field.is_required()
        }

    def set_searched(
        self, location: DomainLocation, field: FieldInfo, domain: Range | Choice
    ) -> None:
        """Makes the key a searched one; its default is the nearest value in its first domain."""
        self.domains[location] = domain
        self.values.setdefault(
            path_of(location),
            domain.nearest_value(
                None if field.is_required() else field.get_default(call_default_factory=True)
            ),
        )

    def domains_of(self, path: KeyPath) -> list[Range | Choice]:
        """The domains of a key; none if it is not searched."""
        return [domain for location, domain in self.domains.items() if path_of(location) == path]

    def possible_values(self, path: KeyPath) -> tuple[Any, ...] | None:
        """The values that a key can have; None for a continuum."""
        domains = self.domains_of(path)
        if not domains:
            values = [self.values.get(path), *self.by_model.get(path, {}).values()]
            return tuple(value for i, value in enumerate(values) if value not in values[:i])
        members: dict[Any, None] = {}  # a dict keeps the order
        for domain in domains:
            of_domain = domain.values()
            if of_domain is None:
                return None
            members |= dict.fromkeys(of_domain)
        return tuple(members)
