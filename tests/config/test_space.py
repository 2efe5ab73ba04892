"""parsing.py and space.py: from text to a Space, and from a Space to runs and back to text."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import FixedTrial

from tuner.config import parsing, yaml_document
from tuner.config.space import Choice, Dimension, Range, Space, dump_yaml
from tuner.errors import SpaceError

PARTS = "task: classification\ndata: digits\nmodel: resnet18_slim\n"


def space(text: str = "", *overrides: str) -> Space:
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(PARTS + text, "space.yaml"), overrides)
    )


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(SpaceError) as caught:
        space(text, *overrides)
    return list(caught.value.problems)


def leaf(text: str) -> Range | Choice:
    (dimension,) = space(f"recipe: {{{text}}}").dimensions
    return dimension.domain


# -- what is written


def test_a_scalar_is_fixed_a_list_a_choice_a_mapping_a_range() -> None:
    assert space("recipe: {lr: 1}").sample(None).recipe.lr == 1.0
    assert leaf("optimizer: [sgd, adamw]") == Choice(("sgd", "adamw"))
    assert leaf("patience: [null, 3]") == Choice((None, 3))
    assert leaf("lr: {low: 1e-4, high: 1e-1, log: true}") == Range(0.0001, 0.1, log=True)
    assert leaf("epochs: {low: 2, high: 8, step: 2}") == Range(2, 8, step=2, integer=True)
    assert leaf("momentum: {low: 0, high: 0.9, step: 0.3}") == Range(0.0, 0.9, step=0.3)


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    for written, value in (("0.5", 0.5), ("0", 0), ("1", 1), ("500", 500)):
        warmup = space(f"recipe: {{warmup: {written}}}").sample(None).recipe.warmup
        assert warmup == value and type(warmup) is type(value)
    assert leaf("warmup: {low: 100, high: 500}") == Range(100, 500, integer=True)
    assert leaf("warmup: {low: 0, high: 0.3}") == Range(0, 0.3)
    assert leaf("warmup: [0.1, 500]") == Choice((0.1, 500))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("0.7", "must be at most 0.5 or a whole number, got 0.7"),
        ("-1", "must be at least 0, got -1"),
        ("{low: 0.1, high: 500}", "low (0.1) and high (500) are of two kinds; write two of one "),
    ],
)
def test_a_share_above_a_half_and_a_range_from_a_share_to_steps_are_refused(
    written: str, says: str
) -> None:
    (problem,) = problems(f"recipe: {{warmup: {written}}}")
    assert problem.startswith(f"space.yaml:4: recipe.warmup: {says}")


def test_short_forms_equal_long_ones() -> None:
    long = "task: {name: classification}\ndata: {name: digits}\nmodel: {name: resnet18_slim}\nengine: {name: inline}\nexport: [onnx]\n"
    short = (
        "task: classification\ndata: digits\nmodel: resnet18_slim\nengine: inline\nexport: onnx\n"
    )
    assert parsing.parse_space(yaml_document.parse_document(long, "a")) == parsing.parse_space(
        yaml_document.parse_document(short, "a")
    )


def test_models_can_be_searched_and_each_run_keeps_its_own_keys() -> None:
    found = parsing.parse_space(
        yaml_document.parse_document(
            "task: classification\ndata: digits\nmodel: {name: [resnet18, vgg11], weights: [none, default]}",
            "f",
        )
    )
    assert [d.name for d in found.dimensions] == ["model.name", "model.weights"]
    assert [
        (run.model.name, run.model.options["weights"]) for run in found.plugin_combinations()
    ] == [
        ("resnet18", "none"),
        ("resnet18", "default"),
        ("vgg11", "none"),
        ("vgg11", "default"),
    ]


def test_each_model_is_combined_with_its_own_weights_alone() -> None:
    weights = "[{choices: [none], when: {name: vgg11}}, {choices: [w.pth], when: {name: resnet18}}]"
    found = parsing.parse_space(
        yaml_document.parse_document(
            "task: classification\ndata: digits\n"
            f"model: {{name: [resnet18, vgg11], weights: {weights}}}",
            "f",
        )
    )
    runs = [run.model for run in found.plugin_combinations()]
    assert {model.name: model.options["weights"] for model in runs} == {
        "resnet18": "w.pth",
        "vgg11": "none",
    }
    assert len(runs) == 2


def test_the_metric_is_the_tasks_first_unless_written() -> None:
    assert space().settings.search.metric == "accuracy"
    assert space("search: {metric: f1}").settings.search.metric == "f1"


# -- what is refused, each with its place


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: 0.1", "4: lr: unknown section; 'lr' is a key of recipe (allowed: task, data, model, recipe, seed, try, search, engine, storage, export, track)"),
        ("recipe: 5", "4: recipe: expected a mapping of keys, got 5"),
        ("recipe: [a]", "4: recipe: expected a mapping of keys, got a list"),
        ("recipe: {lr: {low: 0.1, high: 0.1}}", "4: recipe.lr: low (0.1) must be below high (0.1)"),
        ("recipe: {lr: {low: 0.1}}", "4: recipe.lr: a range needs low and high; high is missing"),
        ("recipe: {lr: {low: null, high: 1}}", "4: recipe.lr.low: expected a number, got nothing"),
        ("recipe: {lr: {low: 1e-3, high: 1, step: 0}}", "4: recipe.lr.step: expected a number above 0, got 0"),
        ("recipe: {lr: {low: 1e-3, high: 1, log: 1}}", "4: recipe.lr.log: expected true or false, got 1"),
        ("recipe: {epochs: {low: 1.5, high: 4}}", "4: recipe.epochs.low: expected a whole number, got 1.5"),
        ("recipe: {optimizer: {low: 1, high: 2}}", "4: recipe.optimizer: a range is for numbers; expected sgd, adam, adamw, nadam, radam, adamax, adagrad, rmsprop, adadelta or adafactor, or a list of them"),
        ("recipe: {optimizer: {choices: [sgd], log: true}}", "4: recipe.optimizer.log: unknown key (a range has low, high, log, step, when; a choice has choices, when)"),
        ("seed: -1", "4: seed: must be at least 0, got -1"),
        ("seed: {low: 0, high: 3}", "4: seed: expected a whole number or null, got a mapping"),
        ("search: 5", "4: search: expected a mapping of keys, got 5"),
        ("search: {metric: acuracy}", "4: search.metric: 'acuracy' is not a metric of classification; did you mean 'accuracy'? (allowed: accuracy, balanced_accuracy, f1, log_likelihood, auroc, average_precision, kappa, quadratic_kappa, top_3, top_5, log_loss, expected_calibration_error); your own goes as package.module:function"),
        ("engine: locl", "4: engine.name: 'locl' is not known; did you mean 'local'? (allowed: inline, local, ray); your own goes as package.module:attribute"),
        ("engine: {address: local}", "4: engine.address: 'local', but only the engine ray has this key; drop it, or write engine: {name: ray, …}"),
        ("engine: {name: inline, ship: true}", "4: engine.ship: True, but only the engine ray has this key; drop it, or write engine: {name: ray, …}"),
        ("engine: {name: ray, address: 'ray://h:10001'}", "4: engine.address: Ray's client protocol hides which node fails, and its port runs anyone's code; start the command on a machine of the cluster and write auto, or HOST:PORT of its head, got the string 'ray://h:10001'"),
        ("engine: {name: ray, address: somewhere}", "4: engine.address: write auto, local, or HOST:PORT of the cluster's head, such as 10.0.0.1:6379, got the string 'somewhere'"),
        ("engine: {name: ray, gpus_per_trial: 1.5}", "4: engine.gpus_per_trial: must be at most 1 with Ray, got 1.5; several GPUs train one model with engine: {name: local}"),
        ("export: {a: b}", "4: export: expected a list of formats (onnx, onnx_fp16, onnx_int8, openvino, pretrained, safetensors, torch_export), got a mapping"),
        ("export: [onnx, onix]", "4: export.1: 'onix' is not known; did you mean 'onnx'? (allowed: onnx, onnx_fp16, onnx_int8, openvino, pretrained, safetensors, torch_export); your own goes as package.module:attribute"),
        ("storage: 5", "4: storage: expected a database URL such as postgresql://host/name, got 5"),
        ("storage: postgres://u@h/d", "4: storage: the scheme is called postgresql://, not postgres://"),
    ],
)  # fmt: skip
def test_a_problem_says_where_what_and_what_is_allowed(text: str, says: str) -> None:
    assert problems(text) == [f"space.yaml:{says}"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "",
            [
                "task: needs a name: classification, detection, instance_segmentation, multilabel, regression, segmentation, text_classification, text_generation, text_multilabel, text_regression, token_classification, or your own as package.module:attribute"
            ],
        ),
        (
            "task: {nmae: classification}",
            ["task.nmae: unknown key; did you mean 'name'? (allowed: name)"],
        ),
        (
            "task: [classification]",
            ["task.name: one task per study; scores on different ones do not compare"],
        ),
        ("task: 3", ["task: expected a name or a mapping of keys, got 3"]),
        ("task: {name: classification, x: 1}", ["task.x: unknown key (allowed: name)"]),
    ],
)
def test_a_part_needs_a_known_name(text: str, says: list[str]) -> None:
    with pytest.raises(SpaceError) as caught:
        parsing.parse_space(
            yaml_document.parse_document(f"data: digits\nmodel: vgg11\n{text}", "f")
        )
    assert [problem.partition(": ")[2] for problem in caught.value.problems] == says


def test_every_problem_is_reported_at_once_and_once() -> None:
    found = problems(
        "recipe:\n  lr: 1\n  lr: {low: 1, high: 0}\n  warmup: {low: 0.0, high: 0.2, step: 0.1, when: {label_smoothing: 0.1}}\n"
        "  label_smoothing: {choices: [0.0, 0.1], when: {warmup: 0.1}}\n  epocs: 3\nsearch: {trials: 0}\nexport: [x]\n",
        "recipe.nesterov=1",
        "nonsense",
    )
    assert [problem.split(": ")[:2] for problem in found] == [
        ["space.yaml:6", "recipe.lr"],
        ["command line", "'nonsense'"],
        ["space.yaml:9", "recipe.epocs"],
        ["space.yaml:6", "recipe.lr.high"],
        ["command line", "recipe.nesterov"],
        ["space.yaml:7", "recipe.warmup.when"],
        ["space.yaml:10", "search.trials"],
        ["space.yaml:11", "export.0"],
    ]


def test_a_study_is_named_like_a_folder_although_only_the_file_says_so() -> None:
    def named(file: str) -> str:
        with pytest.raises(SpaceError) as caught:
            parsing.parse_space(yaml_document.parse_document(PARTS, file))
        return str(caught.value)

    assert named("x" * 256 + ".yaml").endswith(
        "search.name: a study's name is a folder's name: at most 255 bytes, got 256"
    )
    assert named("...yaml").endswith(
        "search.name: a study cannot be called '..'; write search: {name: …}"
    )
    assert named("\udcff.yaml").endswith(
        "search.name: a study cannot be called '\\udcff'; write search: {name: …}"
    )
    assert problems("search: {name: '" + "\N{SNOWMAN}" * 100 + "'}") == [
        "space.yaml:4: search.name: a study's name is a folder's name: at most 255 bytes, got 300"
    ]
    assert (
        parsing.parse_space(
            yaml_document.parse_document(PARTS, "é" * 120 + " {x} 50% #1.yaml")
        ).settings.search.name
        is None
    )


# -- overrides


def test_an_override_is_read_like_the_file() -> None:
    found = space(
        "recipe: {lr: 1.0}",
        "recipe.lr=1e-3",
        "search.trials=5",
        "recipe.epochs={low: 1, high: 3}",
        "model.weights=none",
        "data.size=null",
    )
    assert found.dimensions == (Dimension(("recipe", "epochs"), Range(1, 3, integer=True)),)
    run = found.make_run({})
    assert (run.recipe.lr, found.settings.search.trials, run.data.options["size"]) == (
        0.001,
        5,
        None,
    )
    assert (run.model.name, run.model.options) == ("resnet18_slim", {"weights": "none"})


@pytest.mark.parametrize("name", ["my study #1", "#1", "90", "a: b"])
def test_the_quotes_that_messages_speak_of_reach_the_value(name: str) -> None:
    """As bash passes them on: search.name='"90"' arrives with the double quotes."""
    written = name if "#" in name else f'"{name}"'
    assert space("", f"search.name={written}").settings.search.name == name
    assert space(f'search: {{name: "{name}"}}').settings.search.name == name
    assert problems("search: {name: 90}") == [
        "space.yaml:4: search.name: expected text or null, got 90; put it in quotes"
    ]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recipe.lr=abc", "command line: recipe.lr: expected a number, got the string 'abc'"),
        (
            "recipe.lr={low: 1, hihg: 2, high: 3}",
            "command line: recipe.lr.hihg: unknown key; did you mean 'high'?",
        ),
        (
            "recipe.lr.low=1",
            "command line: recipe.lr.low: recipe.lr is 0.5, not a mapping; set the whole of it: recipe.lr=…",
        ),
        ("search.x.y=1", "command line: search.x: unknown key"),
        (
            "recipe.momentun=0.9",
            "command line: recipe.momentun: unknown key; did you mean 'momentum'?",
        ),
        ("recipe.lr", "command line: 'recipe.lr': expected key=value, such as recipe.lr=0.01"),
        ("=1", "command line: '=1': expected key=value, such as recipe.lr=0.01"),
        ("recipe.lr=[1", "command line: recipe.lr: not valid YAML: "),
        (
            "data.path=a: b",
            "command line: data.path: not valid YAML: mapping values are not allowed here; "
            "text goes in quotes, inside the shell's own: KEY='\"some text\"'",
        ),
        (
            "recipe.lr=1 # low",
            "command line: recipe.lr: expected a number, got the string '1 # low'",
        ),
        (
            "recipe.lr=[1] # low",
            "command line: recipe.lr: a value holds no comment (#); text goes in",
        ),
        (
            "search.name=90",
            "command line: search.name: expected text or null, got 90; for text write search.name='\"90\"'",
        ),
        (
            "model.name=[resnet18, 3]",
            "command line: model.name.1: expected text, got 3; for text write model.name='[…, \"3\", …]'",
        ),
        (
            "recipe.lr=1\nseed: 3",
            "command line: recipe.lr: expected one value; a mapping goes as {key: value, …}",
        ),
        (
            "recipe.lr={low: 1, low: 2, high: 3}",
            "command line: recipe.lr: low: duplicate key, first written in line 1; keep one",
        ),
        (
            "model.name=resnet81",
            "command line: model.name: 'resnet81' is not known; did you mean 'resnet18'?",
        ),
    ],
)
def test_an_override_is_checked_like_the_file(override: str, says: str) -> None:
    (problem,) = problems("recipe: {lr: 0.5}", override)
    assert problem.startswith(says)


# -- conditions

CONDITIONS = "recipe:\n  optimizer: [sgd, adamw]\n  momentum: {low: 0.8, high: 0.99, when: {optimizer: sgd}}\n  nesterov: {choices: [true, false], when: {momentum: 0.9, optimizer: [sgd]}}\n"


def test_a_key_is_sampled_only_under_its_condition() -> None:
    found = space(CONDITIONS.replace("0.99,", "0.9, step: 0.1,"))
    sgd = FixedTrial({"optimizer": "sgd", "momentum": 0.9, "nesterov": True})
    adamw = FixedTrial({"optimizer": "adamw", "momentum": 0.8, "nesterov": True})
    assert found.sample(sgd).recipe.nesterov is True
    assert list(sgd.distributions) == ["optimizer", "momentum", "nesterov"]
    assert found.sample(adamw).recipe.model_dump(include={"momentum", "nesterov"}) == {
        "momentum": 0.9,
        "nesterov": False,
    }
    assert list(adamw.distributions) == ["optimizer"]


def test_a_key_is_sampled_after_those_it_depends_on() -> None:
    found = space(
        "recipe: {optimizer: {choices: [sgd, adamw], when: {epochs: [1, 2]}}, epochs: {low: 1, high: 3}}"
    )
    assert [d.name for d in found.dimensions] == ["epochs", "optimizer"]


def test_a_condition_reaches_into_another_section_and_onto_fixed_keys() -> None:
    found = space(
        "recipe: {lr: {low: 0.1, high: 1, when: {model.name: resnet18_slim, optimizer: adamw}}}"
    )
    assert found.default_params() == {"lr": 0.1}
    assert (
        parsing.parse_space(yaml_document.parse_document(dump_yaml(found.to_dict()), "space.yaml"))
        == found
    )


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("when: {optimiser: sgd}", "when.optimiser: no such key to depend on; did you mean 'optimizer'? (write a key of recipe, or section.key)"),
        ("when: {lr: 0.1}", "when.lr: a key cannot depend on itself"),
        ("when: {optimizer: sgd}", "when.optimizer: sgd is never chosen; recipe.optimizer is adamw"),
        ("when: {optimizer: admaw}", "when.optimizer: expected sgd, adam, adamw, nadam, radam, adamax, adagrad, rmsprop, adadelta or adafactor, got the string 'admaw'; did you mean 'adamw'?"),
        ("when: {epochs: 9}", "when.epochs: 9 is never chosen; recipe.epochs is 2 to 8"),
        ("when: {warmup: 0.1}", "when.warmup: recipe.warmup is searched without steps and is never exactly 0.1; give it a step or a list of choices"),
        ("when: {schedule: constant}", "when.schedule: constant is never chosen; recipe.schedule is cosine"),
        ("when: {optimizer: []}", "when.optimizer: an empty list is never met; name at least one value"),
        ("when: {}", "when: expected a mapping such as {optimizer: sgd}, got a mapping"),
        ("when: sgd", "when: expected a mapping such as {optimizer: sgd}, got the string 'sgd'"),
    ],
)  # fmt: skip
def test_a_condition_that_is_never_met_is_refused(recipe: str, says: str) -> None:
    others = "epochs: {low: 2, high: 8}, warmup: {low: 0.0, high: 0.2}, schedule: [cosine]"
    assert problems(f"recipe: {{lr: {{low: 0.1, high: 1, {recipe}}}, {others}}}") == [
        f"space.yaml:4: recipe.lr.{says}"
    ]


def test_a_circle_of_conditions_is_named_without_those_that_only_hang_on_it() -> None:
    circle = "warmup: {choices: [0.0, 0.1], when: {nesterov: true}}, nesterov: {choices: [true, false], when: {warmup: 0.1}}"
    assert problems(f"recipe: {{lr: {{low: 0.1, high: 1, when: {{warmup: 0.1}}}}, {circle}}}") == [
        "space.yaml:4: recipe.nesterov.when: these conditions depend on each other: recipe.nesterov, recipe.warmup"
    ]


# -- values of a Space


def test_the_default_is_the_default_recipe_brought_into_the_space() -> None:
    text = "recipe: {lr: {low: 0.01, high: 0.1, log: true}, momentum: {low: 0.1, high: 0.95, step: 0.25}, epochs: {low: 2, high: 8}, batch_size: [16, 64], optimizer: [adamw, sgd], patience: {low: 3, high: 9}}"
    assert space(text).default_params() == {
        "optimizer": "adamw",
        "lr": 0.01,
        "momentum": 0.85,
        "epochs": 8,
        "batch_size": 16,
        "patience": 3,
    }


def test_optuna_takes_the_default_and_every_point_of_the_grid_as_members() -> None:
    found = space(
        CONDITIONS.replace("0.99,", "0.99, step: 0.05,").replace("0.9,", "0.85,")
        + "  epochs: {low: 1, high: 8, step: 3}\n"
    )
    for point in (found.default_params(), *found.grid_params()):
        trial = FixedTrial(point)
        found.sample(trial)  # a value that Optuna thinks outside of the range warns, which fails
        assert trial.params == point


def test_outside_its_condition_a_key_has_its_own_default_and_not_the_nearest_of_its_range() -> None:
    text = """recipe:
  optimizer: [sgd, adamw]
  momentum: {low: 0.95, high: 0.99, when: {optimizer: adamw}}
"""
    found = space(text)
    sgd = found.sample(optuna.trial.FixedTrial({"optimizer": "sgd"}))
    assert sgd.recipe.momentum == 0.9
    adamw = found.sample(optuna.trial.FixedTrial({"optimizer": "adamw", "momentum": 0.97}))
    assert adamw.recipe.momentum == 0.97
    assert (
        found.default_params()["momentum"] == 0.95
    )  # the default recipe, as far as the space allows


def test_a_grid_holds_each_effective_combination_once() -> None:
    text = "recipe: {optimizer: [sgd, adamw], momentum: {low: 0.7, high: 0.9, step: 0.1, when: {optimizer: sgd}}, epochs: {low: 1, high: 2}}"
    assert space(text).grid_params() == [
        {"optimizer": o, **momentum, "epochs": e}
        for o, ms in (("sgd", (0.7, 0.8, 0.9)), ("adamw", (None,)))
        for m in ms
        for momentum in [{} if m is None else {"momentum": m}]
        for e in (1, 2)
    ]


@pytest.mark.parametrize(
    ("domain", "ends"),
    [
        (Range(1, 10, integer=True), (1, 10)),
        (Range(1, 10, step=4, integer=True), (1, 9)),
        (Range(0.001, 0.1, log=True), (0.001, 0.1)),
        (Range(0, 10**12, integer=True), (0, 10**12)),
        (Choice((3, 1, 20)), (1, 20)),
        (Choice((None, 0.5, 0.2)), (0.2, 0.5)),
    ],
)
def test_a_domain_has_the_ends_that_a_trial_can_reach(
    domain: Range | Choice, ends: tuple[float, float]
) -> None:
    assert (domain.lowest, domain.highest) == ends


def test_choices_of_several_kinds_are_combined_as_they_are() -> None:
    text = "task: classification\ndata: {name: digits, views: [auto, 2], limit: [null, 50]}\n"
    document = yaml_document.parse_document(f"{text}model: resnet18_slim\n", "space.yaml")
    options = [run.data.options for run in parsing.parse_space(document).plugin_combinations()]
    assert {(o["views"], o["limit"]) for o in options} == {
        ("auto", None),
        ("auto", 50),
        (2, None),
        (2, 50),
    }


def test_a_condition_knows_a_value_that_a_sampler_has_rounded() -> None:
    found = space(
        "recipe: {label_smoothing: {low: 0, high: 0.4, step: 0.1}, "
        "momentum: {low: 0.8, high: 0.9, when: {label_smoothing: 0.3}}}"
    )
    drawn = 0.1 * 3  # as Optuna adds steps
    assert drawn != 0.3
    trial = FixedTrial({"label_smoothing": drawn, "momentum": 0.85})
    assert found.sample(trial).recipe.momentum == 0.85
    other = FixedTrial({"label_smoothing": 0.2, "momentum": 0.85})
    assert found.sample(other).recipe.momentum == 0.9


def test_steps_are_counted_in_decimals() -> None:
    assert Range(0.1, 0.7, step=0.1).values() == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert (
        Range(0.0, 1.0, step=0.3).values() == (0.0, 0.3, 0.6, 0.9)
        and Range(0.0, 1.0, step=0.3).highest == 0.9
    )
    assert Range(1, 10, step=4, integer=True).values() == (1, 5, 9)
    assert Range(1, 10, step=4, integer=True).highest == 9
    assert Range(0.0, 1.0).values() is None
    assert Range(0, 10**12, integer=True).values() is None  # as good as a continuum


@pytest.mark.parametrize(
    "recipe",
    [
        "lr: {low: 0.1, high: 1}",
        "lr: {low: 0.1, high: 1, log: true}",
        "lr: {low: 0, high: 1, step: 1e-9}",
    ],
)
def test_a_grid_needs_steps(recipe: str) -> None:
    says = "sampler grid tries every value, and these are endless or too many; add a step, list choices, or use sampler tpe or random"
    assert problems(
        f"recipe:\n  {recipe.replace('low: 0,', 'low: 1e-9,')}\nsearch: {{sampler: grid}}"
    ) == [f"space.yaml:5: recipe.lr: {says}"]


def test_a_grid_must_be_held() -> None:
    text = "recipe: {epochs: {low: 1, high: 1000}, batch_size: {low: 1, high: 1000}}\nsearch: {sampler: grid}"
    assert problems(text) == [
        "space.yaml:5: search.sampler: the grid has 1,000,000 combinations, at most 100,000 are possible; use larger steps, or sampler tpe or random"
    ]


# -- laws


def test_a_run_is_a_space_with_nothing_left_to_choose() -> None:
    found = space(CONDITIONS.replace("momentum: 0.9, ", ""), "data.mean=[0.1, 0.2, 0.3]")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for seed in range(5):
        run = found.sample(study.ask(), seed)
        again = parsing.parse_space(
            yaml_document.parse_document(dump_yaml(run.to_dict()), "best.yaml")
        )
        assert again.dimensions == () and again.sample(None) == run
    with pytest.raises(ValueError, match="still to be chosen: optimizer, momentum, nesterov"):
        found.sample(None)


def test_the_seed_of_the_file_wins() -> None:
    assert space("seed: 7").sample(None, seed=3).seed == 7
    assert space("").sample(None, seed=3).seed == 3


@pytest.mark.parametrize(
    "name",
    [
        "1e-3",
        "true",
        "null",
        "yes",
        "010",
        "",
        "a: b",
        "#x",
        "'",
        "é\N{SNOWMAN}",
        "two\nlines",
        "x " * 200,
        "~",
    ],
)
def test_what_is_dumped_is_read_back(name: str) -> None:
    tree = {"a": {name: [name, 1e-7, 1e22, True, None, (0.1, 0.2)[0]]}, "b": [name] * 2}
    assert yaml_document.parse_document(dump_yaml(tree), "f").content == tree


def test_dumping_writes_no_aliases() -> None:
    twice = [1, 2]
    assert yaml_document.parse_document(dump_yaml({"a": twice, "b": twice}), "f").content == {
        "a": [1, 2],
        "b": [1, 2],
    }


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml")),
    ids=lambda p: p.name,
)
def test_shipped_spaces_resolve_to_themselves(path: Path) -> None:
    found = parsing.load_space(path)
    assert (
        parsing.parse_space(yaml_document.parse_document(dump_yaml(found.to_dict()), str(path)))
        == found
    )


def test_parsing_imports_neither_torch_nor_optuna() -> None:
    code = "import sys; from pathlib import Path; from tuner.config import json_schema, parsing; parsing.load_space(Path(sys.argv[1])); json_schema.space_schema(); sys.exit(str({'torch', 'optuna', 'numpy'} & set(sys.modules) or ''))"
    file = Path(__file__).parents[2] / "search_spaces" / "resnet.yaml"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert ended.stderr.strip() == ""


@pytest.mark.parametrize("text", ["\x85", "a\x85b", "a \x85\n b: 'c'", "\u2028", "\u2029 ", "\xa0"])
def test_every_line_break_of_unicode_is_read_back(text: str) -> None:
    document = yaml_document.parse_document(dump_yaml({"data": {"path": text}}), "x.yaml")
    assert document.content == {"data": {"path": text}}
