"""Whatever the text, the reader answers with a Space or with a SpaceError that says where; and a Space survives its own dump."""

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.config import parsing, yaml_document
from tuner.config.run import Recipe, SearchSettings
from tuner.config.space import Space, dump_yaml
from tuner.errors import SpaceError

SHIPPED = [
    path.read_text()
    for path in sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
]
PLACE = re.compile(r"(f\.yaml:[1-9]\d*|command line): \S")
modest = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def answer(text: str, overrides: Sequence[str] = ()) -> Space | None:
    try:
        space = parsing.parse_space(
            parsing.apply_overrides(yaml_document.parse_document(text, "f.yaml"), overrides)
        )
    except SpaceError as error:
        found = error.problems
    else:
        assert (
            parsing.parse_space(yaml_document.parse_document(dump_yaml(space.to_dict()), "f.yaml"))
            == space
        )
        return space
    assert found and len(set(found)) == len(found)
    assert [problem for problem in found if not PLACE.match(problem) or "\n" in problem] == []
    return None


PIECES = st.sampled_from(
    ["task", "data", "model", "recipe", "search", "lr", "when", "choices", "by_model", "low", "high", "log", "step", "name", ": ", ":", "\n", "\n  ", " ", "- ", "[", "]", "{", "}", ", ", "&a", "*a", "!!", "!x ", "<<", "? ", "|", ">", "'", '"', "\\", "%YAML 1.1", "---", "...", "#", "\t", "1e-4", "-1", ".nan", ".inf", "true", "null", "~", "@", "`", "é", "\x00", "\x85", "\ufeff", "resnet18", "sgd"]
)  # fmt: skip


@modest
@given(st.text(max_size=80) | st.lists(PIECES, max_size=30).map("".join))
def test_any_text_is_answered(text: str) -> None:
    answer(text)
    answer(SHIPPED[0] + text)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A shipped file with a few stretches cut out, doubled or replaced."""
    text = draw(st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 12))
        text = text[:start] + draw(st.just("") | PIECES | st.just(text[start:end] * 2)) + text[end:]
    return text


@modest
@given(
    mutated(),
    st.lists(
        st.tuples(
            st.sampled_from(["recipe.lr", "search.trials", "model", "data.x.y", "recipe", ""]),
            PIECES,
        ),
        max_size=2,
    ),
)
def test_a_mutated_file_is_answered(text: str, overrides: list[tuple[str, str]]) -> None:
    answer(text, [f"{key}={value}" for key, value in overrides])


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["sgd", "digits", "resnet18", 10**299])
)
KEYS = st.sampled_from(
    [
        *Recipe.model_fields,
        *SearchSettings.model_fields,
        "low",
        "high",
        "log",
        "step",
        "choices",
        "when",
        "by_model",
        "name",
    ]
)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@modest
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(parsing.SECTIONS, TREES)),
    TREES,
    st.sampled_from(list(Recipe.model_fields)),
)
def test_any_tree_is_answered(tree: dict[str, Any], value: Any, key: str) -> None:
    answer(yaml.safe_dump(tree, allow_unicode=True))
    answer(
        yaml.safe_dump(
            {"task": "classification", "data": "digits", "model": "vgg11", "recipe": {key: value}}
        )
    )


def numbers(low: float, high: float, *, whole: bool = False) -> st.SearchStrategy[Any]:
    """A value, a list of choices or a range of numbers in [low, high]."""
    one: st.SearchStrategy[Any] = (
        st.integers(math.ceil(low), int(high)) if whole else st.floats(low, high)
    )
    pair = st.tuples(one, one).filter(lambda ends: ends[0] != ends[1]).map(sorted)
    steps = st.integers(1, 5) if whole else st.floats(1e-3, 1)
    return (
        one
        | st.lists(one, min_size=1, max_size=3, unique=True)
        | pair.map(lambda ends: {"low": ends[0], "high": ends[1]})
        | pair.filter(lambda ends: ends[0] > 0).map(
            lambda ends: {"low": ends[0], "high": ends[1], "log": True}
        )
        | st.builds(lambda ends, step: {"low": ends[0], "high": ends[1], "step": step}, pair, steps)
    )


def several(key: str, values: list[Any]) -> st.SearchStrategy[Any]:
    """A range or choice for each value of another key."""
    one = numbers(1, 20, whole=True)
    domains = st.lists(one, min_size=len(values), max_size=len(values))
    return domains.map(
        lambda written: [
            (w if isinstance(w, dict) else {"choices": w if isinstance(w, list) else [w]})
            | {"when": {key: value}}
            for w, value in zip(written, values, strict=True)
        ]
    )


SPACES = st.fixed_dictionaries(
    {
        "task": st.just("classification"),
        "data": st.fixed_dictionaries({"name": st.just("digits")}, optional={"size": numbers(8, 64, whole=True), "valid": st.floats(0.1, 0.4)}),
        "model": st.sampled_from(["resnet18_slim", ["vgg11", "resnet18"], {"name": "resnet18", "weights": {"choices": ["none", "1e-3", "true"], "when": {"recipe.optimizer": "sgd"}}}]),
        "recipe": st.fixed_dictionaries(
            {
                "optimizer": st.just(["adamw", "sgd"]),
                "nesterov": st.sampled_from([[True, False], {"choices": [False, True], "when": {"optimizer": ["sgd"]}}]),
            },
            optional={
                "lr": numbers(1e-6, 10) | several("optimizer", ["adamw", "sgd"]),
                "batch_size": several("nesterov", [True, False]),
                "momentum": numbers(0, 0.99),
                "weight_decay": numbers(0, 1).map(
                    lambda n: n | {"when": {"optimizer": "adamw"}} if isinstance(n, dict) and n.get("low") != 0 else 0.5
                ),
                "epochs": numbers(1, 20, whole=True),
                "warmup": st.sampled_from([0.1, {"choices": [0.1, 0.2], "when": {"data.name": "digits", "optimizer": "sgd"}}]),
                "patience": st.sampled_from([None, [None, 3], {"low": 1, "high": 9}]),
            },
        ),
    },
    optional={"seed": st.integers(0, 9), "search": st.fixed_dictionaries({"name": st.text("ab1 .é'\"#:{}", min_size=1, max_size=6).map("x".__add__)})},
)  # fmt: skip


class Draws:
    """A trial that draws from a generator of its own."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return (
            self.rng.uniform(low, high)
            if step is None
            else low + step * self.rng.randint(0, int((high - low) / step))
        )

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return self.rng.randrange(low, high + 1, step)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.rng.choice(choices)


@modest
@given(SPACES, st.randoms(use_true_random=False))
def test_a_space_survives_its_dump_and_so_does_each_of_its_runs(
    tree: dict[str, Any], rng: random.Random
) -> None:
    space = parsing.parse_space(yaml_document.parse_document(dump_yaml(tree), "f.yaml"))
    assert (
        parsing.parse_space(yaml_document.parse_document(dump_yaml(space.to_dict()), "f.yaml"))
        == space
    )
    run = space.sample(Draws(rng), seed=3)
    best = parsing.parse_space(yaml_document.parse_document(dump_yaml(run.to_dict()), "f.yaml"))
    assert best.dimensions == () and best.sample(None) == run
    assert set(space.default_params()) <= {d.name for d in space.dimensions}
    for dimension in space.dimensions:
        members, default = dimension.domain.values(), space.default_value(dimension)
        assert (
            default in members
            if members is not None
            else dimension.domain.nearest_value(default) == default
        )
