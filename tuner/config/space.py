"""A Space is a Run with ranges where numbers would be.

A Run is a Space with nothing left to choose.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Protocol

import yaml

from tuner.config import fields, plugins
from tuner.config.run import PluginConfig, Recipe, Run, Settings
from tuner.config.yaml_document import Document, parse_scalar

MAX_VALUES = 100_000  # more values than that are as good as a continuum


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    def to_dict(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"log": True} if self.log else {}
        return (
            {"low": self.low, "high": self.high}
            | extra
            | ({"step": self.step} if self.step is not None else {})
        )

    def nearest_value(self, value: Any) -> Any:
        """The member nearest to `value`; the lowest where `value` is no number."""
        value = (
            min(max(value, self.low), self.high) if isinstance(value, (int, float)) else self.low
        )
        if self.step is None:
            return round(value) if self.integer else float(value)
        return self._value_at(
            min(round(self._steps_from_low(value)), int(self._steps_from_low(self.high)))
        )

    @property
    def lowest(self) -> float:
        """The smallest value that a trial can have."""
        return self.low

    @property
    def highest(self) -> float:
        """The largest value that a trial can have: `high`, or the last step that is not above it.

        It is 9 for `{low: 1, high: 10, step: 4}`.
        """
        if self.step is None:
            return self.high
        number: float = self._value_at(int(self._steps_from_low(self.high)))
        return number

    def _steps_from_low(self, value: float) -> Decimal:
        """From `low`, in decimals, since 0.3 is three steps of 0.1 to whoever wrote it."""
        return (Decimal(str(value)) - Decimal(str(self.low))) / Decimal(str(self.step or 1))

    def _value_at(self, step: int) -> Any:
        value = Decimal(str(self.low)) + step * Decimal(str(self.step or 1))
        return int(value) if self.integer else float(value)

    def values(self) -> tuple[Any, ...] | None:
        """Every value in order, where there are finitely many and they can be held.

        None for a continuum.
        """
        if (not self.integer and self.step is None) or self._steps_from_low(
            self.high
        ) >= MAX_VALUES:
            return None
        return tuple(self._value_at(i) for i in range(int(self._steps_from_low(self.high)) + 1))


@dataclass(frozen=True)
class Choice:
    options: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"choices": list(self.options)}

    def nearest_value(self, value: Any) -> Any:
        return value if value in self.options else self.options[0]

    @property
    def lowest(self) -> Any:
        """The smallest option but null. The others must be comparable, such as numbers."""
        return min((option for option in self.options if option is not None), default=None)

    @property
    def highest(self) -> Any:
        """The largest option but null. The others must be comparable, such as numbers."""
        return max((option for option in self.options if option is not None), default=None)

    def values(self) -> tuple[Any, ...]:
        return self.options


KeyPath = tuple[str, ...]
MODEL_NAME: KeyPath = ("model", "name")


@dataclass(frozen=True)
class Dimension:
    """One searched key, or one of the ranges of a key that has several.

    `condition` maps keys (by path) to the values under which this one is searched. `label` tells
    the ranges of one key apart; a key with one range has none.
    """

    path: KeyPath
    domain: Range | Choice
    condition: Mapping[KeyPath, tuple[Any, ...]] = field(default_factory=dict)
    label: str = ""

    @property
    def key(self) -> str:
        """The key; outside `recipe` with its section."""
        return ".".join(self.path[1:] if self.path[0] == "recipe" else self.path)

    @property
    def name(self) -> str:
        """The parameter's name in the study: `lr`, or `lr[sgd]` where lr has several ranges.

        A study can have only one domain for each name.
        """
        return f"{self.key}[{self.label}]" if self.label else self.key

    def to_dict(self) -> Any:
        if not self.condition:
            return (
                list(self.domain.options)
                if isinstance(self.domain, Choice)
                else self.domain.to_dict()
            )
        when = {
            ".".join(path[1:] if path[0] == self.path[0] else path): list(values)
            for path, values in self.condition.items()
        }
        return self.domain.to_dict() | {"when": when}


def key_of_parameter(name: str) -> str:
    """The key of a parameter of a trial: `lr` for `lr` and for `lr[sgd]`."""
    return name.partition("[")[0]


class SuggestsValues(Protocol):
    """What sampling needs of an Optuna trial."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Space:
    """`values` holds every key, searched ones at their default, brought into their range;
    `dimensions` are in the order of sampling. `defaults` are the keys' own: what a searched key
    has where its condition is not met. `by_model` has the keys of the recipe whose value, or
    default if they are searched, depends on the model.
    """

    values: Mapping[KeyPath, Any]
    dimensions: tuple[Dimension, ...]
    settings: Settings
    document: Document = field(compare=False)
    defaults: Mapping[KeyPath, Any] = field(compare=False, default_factory=dict)
    by_model: Mapping[KeyPath, Mapping[str, Any]] = field(default_factory=dict)
    first_guesses: tuple[Mapping[str, Any], ...] = ()  # parameters that are tried first

    def sample(self, trial: SuggestsValues | None, seed: int = 0) -> Run:
        """The run that `trial` chooses. Without a trial there must be nothing to choose."""
        if trial is not None:
            return self.make_run(self.choose_values(trial), seed)
        if self.dimensions:
            raise ValueError(f"still to be chosen: {', '.join(d.name for d in self.dimensions)}")
        return self.make_run({}, seed)

    def choose_values(self, trial: SuggestsValues) -> dict[KeyPath, Any]:
        """Every key with the value that it has in the run that `trial` chooses."""
        chosen: dict[KeyPath, Any] = {}
        for dimension in self.dimensions:
            if self._is_active(dimension, chosen):
                chosen[dimension.path] = _suggest_value(trial, dimension)
        unmet = {d.path for d in self.dimensions} - chosen.keys()
        model = chosen.get(MODEL_NAME, self.values[MODEL_NAME])
        fixed = self.fixed_values(model)
        return fixed | chosen | {path: self._default(path, model) for path in unmet}

    def _default(self, path: KeyPath, model: str) -> Any:
        """A key's own default, as it is for a model."""
        default = self.defaults.get(path, self.values[path])
        return self.by_model.get(path, {}).get(model, default)

    def fixed_values(self, model: str | None = None) -> dict[KeyPath, Any]:
        """Every key with a model, searched ones at their default; None: the model at its default.

        A key that is not searched may have another value with another model.
        """
        searched = {d.path for d in self.dimensions}
        name = self.values[MODEL_NAME] if model is None else model
        own = {
            path: values[name]
            for path, values in self.by_model.items()
            if name in values and path not in searched
        }
        return dict(self.values) | own

    def _is_active(self, dimension: Dimension, chosen: Mapping[KeyPath, Any]) -> bool:
        if not dimension.condition:
            return True
        searched = {d.path for d in self.dimensions}
        values = self.fixed_values(chosen.get(MODEL_NAME)) | dict(chosen)
        return all(
            (path in chosen or path not in searched) and fields.is_one_of(values[path], allowed)
            for path, allowed in dimension.condition.items()
        )

    def make_run(self, chosen: Mapping[KeyPath, Any], seed: int = 0) -> Run:
        """The run with these keys set; a `seed` in the file wins over the one given."""
        values = self.fixed_values(chosen.get(MODEL_NAME)) | dict(chosen)
        given = values.get(("seed",))
        return Run(
            task=self._plugin_config("task", values),
            data=self._plugin_config("data", values),
            model=self._plugin_config("model", values),
            recipe=Recipe(**_section_values("recipe", values)),
            seed=seed if given is None else given,
        )

    def _plugin_config(self, section: str, values: Mapping[KeyPath, Any]) -> PluginConfig:
        name = values[section, "name"]
        wanted = plugins.read_keys(section, name).fields
        options = _section_values(section, values)
        return PluginConfig(name, {key: options[key] for key in options if key in wanted})

    def default_params(self) -> dict[str, Any]:
        """The default recipe as far as the space allows, as parameter name -> value."""
        return self.choose_params(self.default_value)

    def default_choices(self) -> dict[KeyPath, Any]:
        """The default recipe as far as the space allows, as key -> value."""
        return {d.path: value for d, value in self._choose(self.default_value)}

    def default_value(self, dimension: Dimension) -> Any:
        """The value of a dimension that is nearest to the key's default."""
        return dimension.domain.nearest_value(self.defaults.get(dimension.path))

    def choose_params(self, value_of: Callable[[Dimension], Any]) -> dict[str, Any]:
        """The parameters of one trial, as parameter name -> value.

        Args:
            value_of: Chooses the value of a dimension whose condition is met.
        """
        return {d.name: value for d, value in self._choose(value_of)}

    def _choose(self, value_of: Callable[[Dimension], Any]) -> list[tuple[Dimension, Any]]:
        chosen: dict[KeyPath, Any] = {}
        values: list[tuple[Dimension, Any]] = []
        for d in self.dimensions:
            if self._is_active(d, chosen):
                chosen[d.path] = value_of(d)
                values.append((d, chosen[d.path]))
        return values

    def grid_params(self) -> list[dict[str, Any]]:
        """Every combination, each once although conditions switch keys off.

        Only for spaces without a continuum.
        """
        made = self._combine(self.dimensions)
        return [{d.name: value for d, value in chosen} for chosen in made]

    def plugin_combinations(self) -> Iterator[Run]:
        """A run for each combination of task, data and model that the space can reach. Other keys,
        also those of a mapping (`data.augment`), have their defaults; conditions on the recipe
        count as met.
        """
        outer = [
            replace(d, condition={p: c for p, c in d.condition.items() if p[0] != "recipe"})
            for d in self.dimensions
            if d.path[0] != "recipe" and len(d.path) <= 2
        ]
        made = self._combine(outer, most=64)
        return (self.make_run({d.path: value for d, value in chosen}) for chosen in made)

    def _combine(
        self, dimensions: Sequence[Dimension], most: int | None = None
    ) -> list[list[tuple[Dimension, Any]]]:
        """Each combination of values (of a continuum: its ends) that conditions allow."""
        combinations: list[list[tuple[Dimension, Any]]] = [[]]
        for d in dimensions:
            values = d.domain.values() or (d.domain.lowest, d.domain.highest)
            extended: list[list[tuple[Dimension, Any]]] = []
            for made in combinations:
                is_active = self._is_active(d, {other.path: value for other, value in made})
                extended += [[*made, (d, value)] for value in values] if is_active else [made]
            combinations = extended[:most]
        return combinations

    def highest(self, path: KeyPath, model: str | None = None) -> Any:
        """The largest value of a key that a trial, or a trial with this model, can have."""
        dimensions = [d for d in self.dimensions if d.path == path]
        domains = [
            d.domain
            for d in dimensions
            if model is None or model in d.condition.get(MODEL_NAME, (model,))
        ]
        if domains:
            return max(domain.highest for domain in domains)
        if dimensions:  # those of other models
            return self._default(path, str(model))
        if model is not None:
            return self.fixed_values(model)[path]
        return max([self.values[path], *self.by_model.get(path, {}).values()])

    def to_dict(self) -> dict[str, Any]:
        """The whole file, resolved: what `parse` reads back to an equal Space."""
        searched: dict[KeyPath, list[Dimension]] = {}
        for d in self.dimensions:
            searched.setdefault(d.path, []).append(d)
        tree: dict[str, Any] = {}
        for path, value in self.values.items():
            section = tree
            for key in path[:-1]:
                section = section.setdefault(key, {})
            section[path[-1]] = list(value) if isinstance(value, tuple) else value
            if path in searched:
                written = [d.to_dict() for d in searched[path]]
                section[path[-1]] = written if len(written) > 1 else written[0]
            elif path in self.by_model:
                section[path[-1]] = {"by_model": dict(self.by_model[path])}
        guesses = {"try": [dict(guess) for guess in self.first_guesses]}
        return tree | (guesses if self.first_guesses else {}) | self.settings.to_dict()


def _section_values(section: str, values: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """The keys of a section with their values; the keys of a mapping are in a mapping."""
    content: dict[str, Any] = {}
    for path, value in values.items():
        if path[0] == section and len(path) > 1:
            mapping = content
            for key in path[1:-1]:
                mapping = mapping.setdefault(key, {})
            mapping[path[-1]] = value
    return content


def _suggest_value(trial: SuggestsValues, dimension: Dimension) -> Any:
    leaf, name = dimension.domain, dimension.name
    if isinstance(leaf, Choice):
        return trial.suggest_categorical(name, leaf.options)
    if leaf.integer:
        return trial.suggest_int(
            name, int(leaf.low), int(leaf.highest), step=int(leaf.step or 1), log=leaf.log
        )
    return trial.suggest_float(name, leaf.low, leaf.highest, step=leaf.step, log=leaf.log)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that the strict reader would take for something else, escapes the line
    break U+0085, which PyYAML writes as spaces, and has no aliases.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quote = '"' if "\x85" in text else None if isinstance(parse_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quote)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """YAML that the strict reader reads back to the same tree."""
    return yaml.dump(
        dict(tree),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )
