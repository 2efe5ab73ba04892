"""One key with several ranges, each under a condition: lr for sgd and lr for adamw."""

import jsonschema
import optuna
import pytest
from optuna.trial import FixedTrial

from tuner.config import cases, parsing, yaml_document
from tuner.config.json_schema import space_schema
from tuner.config.space import Choice, Dimension, Range, Space, dump_yaml, key_of_parameter
from tuner.errors import SpaceError

TWO = """recipe:
  optimizer: [sgd, adamw]
  lr:
    - {low: 1e-3, high: 1e-1, log: true, when: {optimizer: sgd}}
    - {low: 1e-5, high: 1e-4, log: true, when: {optimizer: adamw}}
"""
PARTS = "task: classification\ndata: digits\nmodel: resnet18_slim\n"
OPTIMIZER, LR = ("recipe", "optimizer"), ("recipe", "lr")


def space(text: str, *overrides: str) -> Space:
    document = yaml_document.parse_document(PARTS + text, "space.yaml")
    return parsing.parse_space(parsing.apply_overrides(document, overrides))


def problems(text: str) -> list[str]:
    with pytest.raises(SpaceError) as caught:
        space(text)
    return list(caught.value.problems)


def again(found: Space) -> Space:
    return parsing.parse_space(
        yaml_document.parse_document(dump_yaml(found.to_dict()), "space.yaml")
    )


def test_each_range_is_a_dimension_with_its_condition_and_a_name_of_its_own() -> None:
    assert space(TWO).dimensions == (
        Dimension(OPTIMIZER, Choice(("sgd", "adamw"))),
        Dimension(LR, Range(1e-3, 1e-1, log=True), {OPTIMIZER: ("sgd",)}, "sgd"),
        Dimension(LR, Range(1e-5, 1e-4, log=True), {OPTIMIZER: ("adamw",)}, "adamw"),
    )
    assert [d.name for d in space(TWO).dimensions] == ["optimizer", "lr[sgd]", "lr[adamw]"]
    assert {key_of_parameter(d.name) for d in space(TWO).dimensions} == {"optimizer", "lr"}


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
def test_a_trial_has_a_value_of_the_range_of_its_case(sampler: type) -> None:
    study = optuna.create_study(sampler=sampler(seed=0), direction="maximize")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found, seen = space(TWO), set()
    for _ in range(20):
        trial = study.ask()
        recipe = found.sample(trial).recipe
        low, high = {"sgd": (1e-3, 1e-1), "adamw": (1e-5, 1e-4)}[recipe.optimizer]
        assert low <= recipe.lr <= high
        assert trial.params == {
            "optimizer": recipe.optimizer,
            f"lr[{recipe.optimizer}]": recipe.lr,
        }
        seen.add(recipe.optimizer)
        study.tell(trial, recipe.lr)
    assert seen == {"sgd", "adamw"}


def test_the_default_recipe_has_the_nearest_value_of_the_range_of_its_case() -> None:
    assert space(TWO).default_params() == {"optimizer": "adamw", "lr[adamw]": 1e-4}
    # what the space says without a trial agrees with the default recipe
    assert space(TWO).values[LR] == 1e-4
    assert space(TWO).make_run({}).recipe.lr == 1e-4


def test_a_grid_has_each_range_only_in_its_case() -> None:
    text = """recipe:
  optimizer: [sgd, adamw]
  lr: [{choices: [0.1, 0.2], when: {optimizer: sgd}}, {choices: [0.001], when: {optimizer: adamw}}]
search: {sampler: grid}
"""
    found = space(text)
    assert found.grid_params() == [
        {"optimizer": "sgd", "lr[sgd]": 0.1},
        {"optimizer": "sgd", "lr[sgd]": 0.2},
        {"optimizer": "adamw", "lr[adamw]": 0.001},
    ]
    for point in (found.default_params(), *found.grid_params()):
        trial = FixedTrial(point)
        found.sample(trial)
        assert trial.params == point


def test_a_grid_counts_the_values_of_all_ranges_of_a_key() -> None:
    sides = (
        "{low: 1, high: 200, when: {nesterov: true}}, {low: 1, high: 201, when: {nesterov: false}}"
    )
    text = f"recipe: {{nesterov: [true, false], batch_size: [{sides}], epochs: {{low: 1, high: 300}}}}\nsearch: {{sampler: grid}}"
    assert problems(text) == [
        "space.yaml:5: search.sampler: the grid has 240,600 combinations, at most 100,000 are possible; use larger steps, or sampler tpe or random"
    ]


def test_a_space_with_several_ranges_reads_back_and_its_runs_have_nothing_to_choose() -> None:
    found = space(TWO)
    assert again(found) == found
    assert found.to_dict()["recipe"]["lr"] == [
        {"low": 1e-3, "high": 1e-1, "log": True, "when": {"optimizer": ["sgd"]}},
        {"low": 1e-5, "high": 1e-4, "log": True, "when": {"optimizer": ["adamw"]}},
    ]
    run = found.sample(FixedTrial({"optimizer": "sgd", "lr[sgd]": 0.02}))
    best = parsing.parse_space(yaml_document.parse_document(dump_yaml(run.to_dict()), "best.yaml"))
    assert run.recipe.lr == 0.02 and best.dimensions == () and best.sample(None) == run


def test_the_highest_value_is_that_of_all_ranges() -> None:
    text = "recipe: {optimizer: [sgd, adamw], epochs: [{low: 1, high: 3, when: {optimizer: sgd}}, {low: 2, high: 9, when: {optimizer: adamw}}]}"
    assert space(text).highest(("recipe", "epochs")) == 9


def test_a_list_of_one_range_is_that_range() -> None:
    alone = "{low: 0.1, high: 0.5, when: {optimizer: sgd}}"
    text = "recipe: {{optimizer: [sgd, adamw], lr: {}}}"
    assert space(text.format(f"[{alone}]")) == space(text.format(alone))
    assert space("recipe: {lr: [{low: 0.1, high: 0.5}]}") == space(
        "recipe: {lr: {low: 0.1, high: 0.5}}"
    )


def test_another_key_may_depend_on_a_key_with_several_ranges() -> None:
    text = """recipe:
  epochs: {low: 1, high: 9, when: {batch_size: 64}}
  batch_size: [{choices: [8, 16], when: {optimizer: sgd}}, {choices: [16, 64], when: {optimizer: adamw}}]
  optimizer: [sgd, adamw]
"""
    found = space(text)
    names = [d.name for d in found.dimensions]
    assert names == ["optimizer", "batch_size[sgd]", "batch_size[adamw]", "epochs"]
    assert (
        found.sample(
            FixedTrial({"optimizer": "adamw", "batch_size[adamw]": 64, "epochs": 7})
        ).recipe.epochs
        == 7
    )
    assert problems(text.replace("64}", "65}"))[0] == (
        "space.yaml:5: recipe.epochs.when.batch_size: 65 is never chosen; recipe.batch_size is 8 or 16 or 16 or 64"
    )


def test_a_range_per_freeze_depth_gives_the_linear_probe_the_range_of_its_depth() -> None:
    text = """recipe:
  freeze_depth: {low: 0, high: 5}
  lr: [{low: 0.001, high: 0.002, when: {freeze_depth: [0, 1, 2]}}, {low: 0.1, high: 0.2, when: {freeze_depth: [3, 4, 5]}}]
"""
    found = space(text)
    deep = found.choose_params(
        lambda d: 5 if d.path == ("recipe", "freeze_depth") else found.default_value(d)
    )
    assert deep == {"freeze_depth": 5, "lr[freeze_depth=3|4|5]": 0.1}
    assert found.default_params() == {"freeze_depth": 0, "lr[freeze_depth=0|1|2]": 0.001}


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ("optimizer: [sgd]", "optimizer: adamw", ["sgd", "adamw"]),
        ("nesterov: true", "nesterov: false", ["nesterov=true", "nesterov=false"]),
        (
            "optimizer: [sgd, adamw], nesterov: true",
            "nesterov: false",
            ["nesterov=true, sgd|adamw", "nesterov=false"],
        ),
        ("model.name: resnet18", "model.name: vgg11", ["resnet18", "vgg11"]),
    ],
)
def test_the_name_of_a_range_says_its_case(first: str, second: str, labels: list[str]) -> None:
    keys = "optimizer: [sgd, adamw], nesterov: [true, false]"
    ranges = f"{{low: 1, high: 2, when: {{{first}}}}}, {{low: 3, high: 4, when: {{{second}}}}}"
    found = space(f"recipe: {{{keys}, lr: [{ranges}]}}", "model=[resnet18, vgg11]")
    assert [d.label for d in found.dimensions if d.path == LR] == labels
    assert again(found) == found


def test_ranges_whose_names_would_be_equal_or_long_are_numbered() -> None:
    a, b, c = (("model", key) for key in "abc")
    equal = {
        ("recipe", "lr", 0): {a: ("x",), b: ("y",)},
        ("recipe", "lr", 1): {b: ("x",), c: ("y",)},
    }
    assert list(cases.name_cases(equal).values()) == ["1", "2"]
    low, high = list(range(1, 30)), list(range(30, 61))
    lr = f"[{{low: 1, high: 2, when: {{epochs: {low}}}}}, {{low: 3, high: 4, when: {{epochs: {high}}}}}]"
    found = space(f"recipe: {{epochs: {{low: 1, high: 60}}, lr: {lr}}}")
    assert [d.name for d in found.dimensions] == ["epochs", "lr[1]", "lr[2]"]
    assert again(found) == found


RANGE = "low: 0.1, high: 0.2"


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        (
            f"{{{RANGE}, when: {{optimizer: sgd}}}}, {{{RANGE}, when: {{optimizer: [sgd, adamw]}}}}",
            "recipe.lr.1.when: optimizer: sgd is a case of recipe.lr.0 too; each case must have one range",
        ),
        (
            f"{{{RANGE}, when: {{optimizer: sgd}}}}, {{{RANGE}, when: {{nesterov: true}}}}",
            "recipe.lr.1.when: optimizer: sgd, nesterov: true is a case of recipe.lr.0 too; each case must have one range",
        ),
        (
            f"{{{RANGE}, when: {{optimizer: sgd, nesterov: true}}}}, {{{RANGE}, when: {{optimizer: adamw}}}}",
            "recipe.lr: no range for the case nesterov: false, optimizer: sgd; add one with when: {nesterov: false, optimizer: sgd}, or one value: {choices: […], when: {nesterov: false, optimizer: sgd}}",
        ),
        (
            f"{{{RANGE}, when: {{epochs: 1}}}}, {{{RANGE}, when: {{epochs: [2, 3]}}}}",
            "recipe.lr: no range for the case epochs: 4; add one with when: {epochs: 4}, or one value: {choices: […], when: {epochs: 4}}",
        ),
        (
            f"{{{RANGE}, when: {{optimizer: sgd}}}}, {{{RANGE}}}",
            "recipe.lr.1: needs a condition, since the key has several ranges: add one such as when: {optimizer: sgd}",
        ),
        (
            f"{{{RANGE}, when: {{optimizer: sgd}}}}, {{low: 0.1, hihg: 1, when: {{optimizer: adamw}}}}",
            "recipe.lr.1.hihg: unknown key; did you mean 'high'? (a range has low, high, log, step, when; a choice has choices, when)",
        ),
        (
            f"{{{RANGE}, when: {{optimizer: sgd}}}}, 0.1",
            "recipe.lr.0: a choice must be a plain value, got a mapping",
        ),
        (
            f"{{{RANGE}, when: {{lr: 0.1}}}}, {{{RANGE}, when: {{optimizer: adamw}}}}",
            "recipe.lr.0.when.lr: a key cannot depend on itself",
        ),
        (
            f"{{{RANGE}, when: {{optimizer: sgd}}}}, {{{RANGE}, when: {{optimizer: adam}}}}",
            "recipe.lr.1.when.optimizer: adam is never chosen; recipe.optimizer is sgd or adamw",
        ),
    ],
)  # fmt: skip
def test_ranges_that_do_not_share_out_the_cases_are_refused(ranges: str, says: str) -> None:
    keys = "optimizer: [sgd, adamw], nesterov: [true, false], epochs: {low: 1, high: 9}"
    found = problems(f"recipe: {{{keys}, lr: [{ranges}]}}")
    assert found[0] == f"space.yaml:4: {says}"


def test_conditions_over_very_many_cases_are_checked_by_counting() -> None:
    wide = (
        "epochs: {low: 1, high: 50000}, batch_size: {low: 1, high: 50000}, optimizer: [sgd, adamw]"
    )
    first = "{low: 1, high: 2, when: {optimizer: sgd, epochs: 7, batch_size: 9}}"
    second = "{low: 1, high: 2, when: {optimizer: adamw}}"
    (said,) = problems(f"recipe: {{{wide}, lr: [{first}, {second}]}}")
    assert said.startswith(
        "space.yaml:4: recipe.lr: no range for the case batch_size: 1, epochs: 1, optimizer: sgd;"
    )


@pytest.mark.parametrize(
    ("lr", "valid"),
    [
        ([{"low": 1e-3, "high": 1, "when": {"optimizer": "sgd"}}, {"choices": [0.1], "when": {"optimizer": "adamw"}}], True),
        ([{"low": 1e-3, "when": {"optimizer": "sgd"}}, {"choices": [0.1], "when": {"optimizer": "adamw"}}], False),
        ([{"low": 1e-3, "high": 1, "wenn": {"optimizer": "sgd"}}], False),
        ([], False),
    ],
)  # fmt: skip
def test_editors_take_what_tuner_takes(lr: object, valid: bool) -> None:
    tree = {
        "task": "classification",
        "data": "digits",
        "model": "resnet18_slim",
        "recipe": {"optimizer": ["sgd", "adamw"], "lr": lr},
    }
    assert jsonschema.Draft202012Validator(space_schema()).is_valid(tree) is valid
    if valid:
        parsing.parse_space(yaml_document.Document("f", tree))
