"""What a task, its data and its models must have in common, and what a model's people begin with."""

import fnmatch
from typing import Any

import pytest

from tuner.config import parsing, plugins, related_tasks, yaml_document
from tuner.config.run import Recipe
from tuner.errors import SpaceError

TEXT = "task: classification\ndata: {name: digits}\nmodel: {name: resnet18}\nrecipe: {epochs: 3}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(SpaceError) as caught:
        parsing.parse_space(yaml_document.parse_document(text, "f"))
    return list(caught.value.problems)


@pytest.mark.parametrize("kind", ["data", "model"])
def test_every_part_says_which_tasks_it_is_for(kind: str) -> None:
    tasks = set(plugins.list_names("task"))
    for name in plugins.list_names(kind):
        found = plugins.list_tasks(kind, name)
        assert found and set(found) <= tasks, name


def test_every_task_has_data_and_models() -> None:
    for kind in ("data", "model"):
        served = {
            task for name in plugins.list_names(kind) for task in plugins.list_tasks(kind, name)
        }
        assert served == set(plugins.list_names("task"))


def test_recipes_and_exports_that_a_model_states_exist() -> None:
    exports, names = set(plugins.list_names("export")), plugins.list_names("model")
    for name in names:
        tasks = set(plugins.list_tasks("model", name))
        recipes: dict[str, dict[str, Any]] = plugins.read_model_constant(name, "RECIPES", {})
        assert set(recipes) <= tasks, name
        for recipe in recipes.values():
            assert Recipe(**recipe), name  # every key is a recipe's, every value one it takes
        named = plugins.read_model_constant(name, "NAMED_RECIPES", {})
        for pattern, changes in named.items():
            assert set(changes) <= tasks, name
            assert all(Recipe(**recipes.get(task, {}) | keys) for task, keys in changes.items())
            listed = fnmatch.filter(names, pattern)
            example = listed[0] if listed else pattern.replace("*", "x")
            assert plugins.find_model_family(example) == plugins.find_model_family(name)
        holds = plugins.read_model_constant(name, "EXPORTS", ("safetensors",))
        assert "safetensors" in holds and set(holds) <= exports, name


def stating(monkeypatch: pytest.MonkeyPatch, **constants: Any) -> None:
    real = plugins.read_constant
    monkeypatch.setattr(
        plugins,
        "read_constant",
        lambda kind, file, name: (
            constants[name] if name in constants and kind == "model" else real(kind, file, name)
        ),
    )


def test_a_model_for_another_task_is_refused_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stating(monkeypatch, TASKS=("detection",))
    assert problems(TEXT)[0].startswith(
        "f:3: model.name: resnet18 is for detection, not for classification (allowed: "
    )


def test_the_default_recipe_is_what_the_models_people_begin_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stating(
        monkeypatch, RECIPES={"classification": {"optimizer": "adamw", "lr": 2e-5, "epochs": 4}}
    )
    found = (
        parsing.parse_space(yaml_document.parse_document(TEXT + "search: {trials: 3}", "f"))
        .make_run({})
        .recipe
    )
    assert (found.optimizer, found.lr, found.epochs, found.momentum) == (
        "adamw",
        2e-5,
        3,
        0.9,
    )  # what is written wins
    searched = parsing.parse_space(
        yaml_document.parse_document(
            TEXT.replace("epochs: 3", "lr: {low: 1e-6, high: 1e-3, log: true}"), "f"
        )
    )
    assert searched.default_params() == {"lr": 2e-5}


def test_a_recipe_may_follow_the_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stating(
        monkeypatch,
        RECIPES={"classification": {"lr": 2e-5, "epochs": 4}},
        NAMED_RECIPES={
            "vgg*": {"classification": {"lr": 3.0}},
            "resnet1*": {"classification": {"lr": 1.0}},
        },
    )
    assert related_tasks.read_recipe("resnet18", "classification") == {"lr": 1.0, "epochs": 4}
    assert related_tasks.read_recipe("resnet50", "classification") == {"lr": 2e-5, "epochs": 4}
    assert related_tasks.read_recipe("resnet18", "detection") == {}
    found = parsing.parse_space(yaml_document.parse_document(TEXT, "f")).make_run({}).recipe
    assert found.lr == 1.0


def test_a_format_that_cannot_hold_the_model_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stating(monkeypatch, EXPORTS=("safetensors", "onnx"))
    assert problems(TEXT + "export: [onnx, torch_export]") == [
        "f:5: export.1: torch_export cannot hold resnet18; safetensors or onnx can"
    ]
    assert parsing.parse_space(yaml_document.parse_document(TEXT, "f")).settings.export == (
        "safetensors",
        "onnx",
    )
