"""From a document to a Space. Every problem is found before any is reported, each with its line and the way out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from tuner import document, fields, plugins
from tuner.document import Document, kind
from tuner.errors import SpaceError, nearest, suggest
from tuner.run import Engine, Recipe, Search, Settings
from tuner.space import Choice, Dimension, KeyPath, Range, Space

PARTS = ("task", "data", "model")
SECTIONS = (*PARTS, "recipe", "seed", "search", "engine", "storage", "export")
SEED = FieldInfo(annotation=int | None, default=None)
RANGE_KEYS = ("low", "high", "log", "step", "when")
FOREIGN = {"min": "low", "max": "high", "values": "choices", "value": "choices", "minval": "low", "maxval": "high"}
EXPORTS = ("safetensors", "torch_export", "onnx")


def load(path: Path, overrides: Sequence[str] = ()) -> Space:
    """The space in a file, with `key=value` overrides from the command line. Raises SpaceError with every problem."""
    return parse(override(document.read(path), overrides))


def override(doc: Document, overrides: Sequence[str]) -> Document:
    """Sets dotted keys; the values are read like the file's."""
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise SpaceError(f"command line: {text!r}: expected key=value, such as recipe.lr=0.01")
        parsed = document.parse(f"value: {value}", "command line")
        node = doc.tree
        for part in path[:-1]:
            inner = node.get(part)
            if not isinstance(inner, dict):
                inner = {} if inner is None else {"name": inner}
                node[part] = inner
            node = inner
        node[path[-1]] = parsed.tree["value"]
        doc.lines = {p: line for p, line in doc.lines.items() if p[: len(path)] != path}
        doc.lines[path] = "command line"
    return doc


def parse(doc: Document) -> Space:
    """Raises SpaceError with every problem of the document."""
    return _Parser(doc).space()


class _Parser:
    def __init__(self, doc: Document) -> None:
        self.doc = doc
        self.problems: list[str] = []
        self.fields: dict[KeyPath, FieldInfo] = {}
        self.values: dict[KeyPath, Any] = {}
        self.dimensions: list[Dimension] = []
        self.conditions: dict[KeyPath, Mapping[str, Any]] = {}

    def wrong(self, path: Sequence[str | int], what: str) -> None:
        self.problems.append(self.doc.problem(path, what))

    def space(self) -> Space:
        for key in self.doc.tree:
            if key not in SECTIONS:
                self.wrong((key,), f"unknown section{suggest(key, SECTIONS)}")
        for section in PARTS:
            self.part(section)
        self.section(("recipe",), self.mapping("recipe"), Recipe.model_fields)
        if self.doc.tree.get("seed") is not None:
            self.fixed(("seed",), SEED, self.doc.tree["seed"])
        self.resolve_conditions()
        settings = self.settings()
        if self.problems or settings is None:
            raise SpaceError(*self.problems)
        return Space(self.values, tuple(self.ordered()), settings, self.doc)

    def mapping(self, section: str) -> dict[str, Any]:
        """A section as written; `task: classification` is short for `task: {name: classification}`."""
        value = self.doc.tree.get(section)
        if isinstance(value, dict) and not set(value) & {"low", "high", "choices"}:
            return value
        if value is None:
            return {}
        if section in (*PARTS, "engine") and isinstance(value, (str, list, dict)):
            return {"name": value}
        self.wrong((section,), f"expected a mapping of keys, got {kind(value)}")
        return {}

    # -- task, data, model: the keys are the plug-in's own

    def part(self, section: str) -> None:
        written = self.mapping(section)
        if "name" not in written:
            if section not in self.doc.tree or isinstance(self.doc.tree[section], dict):
                allowed = ", ".join(plugins.names(section))
                self.wrong((section,), f"needs a name, such as {section}: {{name: …}}; known: {allowed}")
            return
        name = FieldInfo.from_annotation(str)
        self.node((section, "name"), name, written["name"])
        wanted: dict[str, FieldInfo] = {}
        for option in self.names(section, written["name"]):
            try:
                wanted.update(plugins.keys(section, option).fields)
            except SpaceError as error:
                self.problems.extend(self.doc.problem((section, "name"), p) for p in error.problems)
                return
        self.section((section,), {k: v for k, v in written.items() if k != "name"}, wanted)

    def names(self, section: str, written: Any) -> list[str]:
        if section != "model" and not isinstance(written, str):
            if isinstance(written, (list, dict)):
                self.wrong((section, "name"), f"one {section} per study; scores on different ones do not compare")
            return []
        options = written.get("choices", []) if isinstance(written, dict) else written
        return [o for o in (options if isinstance(options, list) else [options]) if isinstance(o, str)]

    # -- keys and values

    def section(self, path: KeyPath, written: Mapping[str, Any], wanted: Mapping[str, FieldInfo]) -> None:
        for key in written:
            if key not in wanted:
                self.wrong((*path, key), f"unknown key{suggest(key, wanted)}")
        for key, field in wanted.items():
            if key in written:
                self.node((*path, key), field, written[key])
            elif field.is_required():
                self.wrong((*path, key), f"is needed: {fields.expected(field)}")
            else:
                self.values[*path, key] = field.get_default(call_default_factory=True)
                self.fields[*path, key] = field

    def node(self, path: KeyPath, field: FieldInfo, written: Any) -> None:
        """A scalar is fixed, a list is a choice, a mapping is a range or a choice under a condition."""
        self.fields[path] = field
        if isinstance(written, list) and not fields.is_sequence(field):
            self.search(path, field, self.choice(path, field, written))
        elif isinstance(written, dict):
            when = written.get("when")
            if "choices" in written:
                self.unknown(path, written, ("choices", "when"))
                inner = written["choices"]
                listed = inner if isinstance(inner, list) else [inner]
                self.search(path, field, self.choice((*path, "choices"), field, listed))
            else:
                self.search(path, field, self.range(path, field, written))
            if when is not None:
                self.condition(path, when)
        else:
            self.fixed(path, field, written)

    def fixed(self, path: KeyPath, field: FieldInfo, written: Any) -> None:
        self.fields[path] = field
        try:
            self.values[path] = fields.fit(field, written)
        except fields.Unfit as error:
            self.wrong(path, str(error))

    def search(self, path: KeyPath, field: FieldInfo, leaf: Range | Choice | None) -> None:
        if leaf is not None:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            self.values[path] = leaf.clip(default)
            self.dimensions.append(Dimension(path, leaf))

    def choice(self, path: Sequence[str | int], field: FieldInfo, written: list[Any]) -> Choice | None:
        before = len(self.problems)
        if not written:
            self.wrong(path, "an empty list of choices; name at least one")
        options: list[Any] = []
        for i, option in enumerate(written):
            if isinstance(option, (list, dict)):
                self.wrong((*path, i), f"a choice must be a plain value, got {kind(option)}")
                continue
            try:
                fitted = fields.fit(field, option)
            except fields.Unfit as error:
                self.wrong((*path, i), str(error))
                continue
            if fitted in options:
                self.wrong((*path, i), f"{option!r} is listed twice")
            options.append(fitted)
        return Choice(tuple(options)) if len(self.problems) == before else None

    def unknown(self, path: KeyPath, written: Mapping[str, Any], allowed: Sequence[str]) -> None:
        for key in written:
            if key not in allowed:
                close = f"; did you mean {FOREIGN[key]!r}?" if key in FOREIGN else nearest(key, allowed)
                self.wrong((*path, key), f"unknown key{close} (a range has {', '.join(RANGE_KEYS)}; a choice has choices, when)")

    def range(self, path: KeyPath, field: FieldInfo, written: Mapping[str, Any]) -> Range | None:
        before = len(self.problems)
        self.unknown(path, written, RANGE_KEYS)
        if not fields.is_number(field):
            self.wrong(path, f"a range is for numbers; expected {fields.expected(field)}")
            return None
        ends = {key: self.bound(path, field, key, written) for key in ("low", "high")}
        low, high = ends["low"], ends["high"]
        log, step = written.get("log", False), written.get("step")
        if low is not None and high is not None and not low < high:
            self.wrong(path, f"low ({low:g}) must be below high ({high:g})")
        if not isinstance(log, bool):
            self.wrong((*path, "log"), f"expected true or false, got {kind(log)}")
        elif log and low is not None and low <= 0:
            self.wrong(path, f"log needs low above 0, got {low:g}")
        if step is not None:
            self.step(path, field, step, log=log is True)
        if len(self.problems) > before or low is None or high is None:
            return None
        integer = fields.is_integer(field) or (field.annotation is Any and isinstance(low, int) and isinstance(high, int))
        return Range(low, high, log, step, integer)

    def bound(self, path: KeyPath, field: FieldInfo, key: str, written: Mapping[str, Any]) -> float | None:
        if key not in written:
            self.wrong(path, f"a range needs low and high; {key} is missing")
            return None
        value = written[key]
        if isinstance(value, (str, bool, list, dict)) or value is None:
            self.wrong((*path, key), f"expected a number, got {kind(value)}")
            return None
        try:
            found: float = fields.fit(field, value)
        except fields.Unfit as error:
            self.wrong((*path, key), str(error))
            return None
        return found

    def step(self, path: KeyPath, field: FieldInfo, step: Any, *, log: bool) -> None:
        if not fields.finite(step) or step <= 0:
            self.wrong((*path, "step"), f"expected a number above 0, got {kind(step)}")
        elif log:
            self.wrong(path, "log and step exclude each other; drop one")
        elif fields.is_integer(field) and not isinstance(step, int):
            self.wrong((*path, "step"), f"expected a whole number, since {path[-1]} is one, got {step}")

    # -- conditions

    def condition(self, path: KeyPath, when: Any) -> None:
        if not isinstance(when, dict) or not when:
            self.wrong((*path, "when"), f"expected a mapping such as {{optimizer: sgd}}, got {kind(when)}")
        else:
            self.conditions[path] = when

    def resolve_conditions(self) -> None:
        resolved: dict[KeyPath, dict[KeyPath, tuple[Any, ...]]] = {}
        for path, when in self.conditions.items():
            for key, allowed in when.items():
                target = self.target(path, key)
                values = allowed if isinstance(allowed, list) else [allowed]
                if target is not None and values:
                    resolved.setdefault(path, {})[target] = tuple(self.allowed(path, key, target, v) for v in values)
        self.dimensions = [Dimension(d.path, d.leaf, resolved.get(d.path, {})) for d in self.dimensions]

    def target(self, path: KeyPath, key: str) -> KeyPath | None:
        for candidate in ((path[0], key), tuple(key.split("."))):
            if candidate in self.fields and candidate != path:
                return candidate
        near = [p[1] for p in self.fields if p[0] == path[0] and p != path]
        self.wrong((*path, "when", key), f"no such key to depend on{nearest(key, near)} (write a key of {path[0]}, or section.key)")
        return None

    def allowed(self, path: KeyPath, key: str, target: KeyPath, value: Any) -> Any:
        try:
            value = fields.fit(self.fields[target], value)
        except fields.Unfit as error:
            self.wrong((*path, "when", key), str(error))
            return value
        leaf = next((d.leaf for d in self.dimensions if d.path == target), None)
        possible = leaf.options if isinstance(leaf, Choice) else None if leaf else (self.values.get(target),)
        if possible is not None and value not in possible:
            self.wrong((*path, "when", key), f"{value!r} is never chosen; {'.'.join(target)} is {fields.alternatives(map(repr, possible))}")
        return value

    def ordered(self) -> list[Dimension]:
        """Dimensions after those they depend on, otherwise as written. A cycle is a problem."""
        waiting = list(self.dimensions)
        done: list[Dimension] = []
        while waiting:
            placed = {d.path for d in done} | {p for p in self.fields if p not in {w.path for w in waiting}}
            ready = [d for d in waiting if set(d.when) <= placed]
            if not ready:
                circle = ", ".join(".".join(d.path) for d in waiting)
                raise SpaceError(self.doc.problem((*waiting[0].path, "when"), f"these conditions depend on each other: {circle}"))
            done.append(ready[0])
            waiting.remove(ready[0])
        return done

    # -- search, engine, storage, export: no ranges

    def settings(self) -> Settings | None:
        before = len(self.problems)
        for section, schema in (("search", Search), ("engine", Engine)):
            for key, value in self.mapping(section).items():
                if isinstance(value, (list, dict)):
                    self.wrong((section, key), f"{section} holds no ranges or choices; expected one value")
            plain = {k: v for k, v in self.mapping(section).items() if not isinstance(v, (list, dict))}
            self.section((section,), plain, schema.model_fields)
        engine = self.values.get(("engine", "name"), "local")
        if ":" not in engine and engine not in plugins.names("engine"):
            self.wrong(("engine", "name"), f"{engine!r} is not known{suggest(engine, plugins.names('engine'))}")
        self.metric()
        storage, export = self.storage(), self.export()
        if len(self.problems) > before:
            return None
        search, engine_ = ({p[1]: self.values.pop(p) for p in list(self.values) if p[0] == section} for section in ("search", "engine"))
        return Settings(Search(**search), Engine(**engine_), storage, export)

    def metric(self) -> None:
        task = self.values.get(("task", "name"))
        metric = self.values.get(("search", "metric"))
        if task in plugins.names("task"):
            allowed = plugins.constant("task", task, "METRICS")
            if metric is None:
                self.values["search", "metric"] = allowed[0]
            elif metric not in allowed:
                self.wrong(("search", "metric"), f"{metric!r} is not a metric of {task}{suggest(metric, allowed)}")

    def storage(self) -> str | None:
        value = self.doc.tree.get("storage")
        if value is not None and not isinstance(value, str):
            self.wrong(("storage",), f"expected a database URL such as postgresql://host/name, got {kind(value)}")
            return None
        if value is not None and value.startswith("postgres://"):
            self.wrong(("storage",), "the scheme is called postgresql://, not postgres://")
        return value

    def export(self) -> tuple[str, ...]:
        written = self.doc.tree.get("export", list(EXPORTS))
        formats = [] if written is None else [written] if isinstance(written, str) else written
        known = plugins.names("export")
        if not isinstance(formats, list):
            self.wrong(("export",), f"expected a list of formats ({', '.join(known)}), got {kind(formats)}")
            return ()
        for i, name in enumerate(formats):
            if not isinstance(name, str) or (":" not in name and name not in known):
                self.wrong(("export", i), f"{kind(name)} is not a format{suggest(name, known)}")
        return tuple(dict.fromkeys(str(name) for name in formats))
