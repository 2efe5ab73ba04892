"""Where models are searched, each has its own family's recipe for the keys that the file leaves open."""

import itertools
from typing import Any

import pytest
from optuna.trial import FixedTrial

from tests.conftest import SMALL
from tuner.config import parsing, plugins, yaml_document
from tuner.config.run import Recipe, Run
from tuner.config.space import Space, dump_yaml
from tuner.errors import SpaceError
from tuner.search.study_identity import Comparison, defaulted_keys, identity

DETECTORS = ("yolox_s", "rtdetr_r18", "fasterrcnn_resnet50_fpn")


def read(text: str) -> Space:
    return parsing.parse_space(yaml_document.parse_document(text, "space.yaml"))


def space(models: str = "[yolox_s, rtdetr_r18]", recipe: str = "{freeze_depth: [0, 1]}") -> Space:
    return read(
        f"task: detection\ndata: {{name: voc, path: x}}\nmodel: {{name: {models}}}\n"
        f"recipe: {recipe}\n"
    )


def sample(searched: Space, model: str, **params: Any) -> Run:
    return searched.sample(FixedTrial({"model.name": model, **params}))


@pytest.mark.parametrize("models", list(itertools.permutations(DETECTORS)))
def test_each_model_has_its_own_familys_recipe(models: tuple[str, ...]) -> None:
    searched = space(f"[{', '.join(models)}]")
    for name in models:
        alone = space(name, "{freeze_depth: 1}").sample(None)
        assert sample(searched, name, freeze_depth=1) == alone
        stated = plugins.read_recipe(name, "detection")
        assert alone.recipe == Recipe(**stated, freeze_depth=1)
    assert {run.model.name: run.recipe.optimizer for run in searched.plugin_combinations()} == {
        name: "adamw" if name == "rtdetr_r18" else "sgd" for name in models
    }


def test_what_the_file_writes_holds_for_every_model() -> None:
    searched = space(recipe="{lr: 0.5, optimizer: [sgd, adamw], epochs: {low: 1, high: 3}}")
    for name in ("yolox_s", "rtdetr_r18"):
        recipe = sample(searched, name, optimizer="sgd", epochs=2).recipe
        assert (recipe.lr, recipe.optimizer, recipe.epochs) == (0.5, "sgd", 2)


def test_the_resolved_file_and_each_of_its_runs_read_back_equal() -> None:
    searched = space()
    resolved = read(dump_yaml(searched.to_dict()))
    assert resolved == searched
    assert resolved.to_dict()["recipe"]["optimizer"] == {
        "by_model": {"yolox_s": "sgd", "rtdetr_r18": "adamw"}
    }
    for name in ("yolox_s", "rtdetr_r18"):
        run = sample(searched, name, freeze_depth=0)
        assert sample(resolved, name, freeze_depth=0) == run
        best = read(dump_yaml(run.to_dict() | searched.settings.to_dict()))
        assert best.sample(None) == run and "by_model" not in str(best.to_dict())


def test_models_of_one_mind_are_as_they_were() -> None:
    assert space("[yolox_s, yolox_m]").by_model == {}
    assert space("yolox_s").by_model == {}


def test_a_condition_looks_at_the_recipe_of_the_trials_own_model() -> None:
    searched = space(recipe="{lr: {low: 1e-5, high: 1e-3, log: true, when: {optimizer: adamw}}}")
    assert sample(searched, "rtdetr_r18", lr=5e-4).recipe.lr == 5e-4
    assert sample(searched, "yolox_s").recipe.lr == 0.0025  # its own default, not the other's
    first = space(
        "[rtdetr_r18, yolox_s]", "{lr: {low: 1e-5, high: 1e-3, when: {optimizer: adamw}}}"
    )
    assert sample(first, "yolox_s").recipe.lr == 0.0025
    assert first.default_params() == {"model.name": "rtdetr_r18", "lr": 0.0001}


def test_the_model_is_chosen_before_what_depends_on_it() -> None:
    text = (
        "task: detection\ndata: {name: voc, path: x}\n"
        "model: {name: {choices: [yolox_s, rtdetr_r18], when: {recipe.batch_size: 8}}}\n"
        "recipe: {batch_size: [4, 8], lr: {low: 1e-5, high: 1e-3, when: {optimizer: adamw}}}\n"
    )
    assert [d.name for d in read(text).dimensions] == ["batch_size", "model.name", "lr"]


def test_the_longest_training_is_that_of_any_model() -> None:
    searched = space("[fasterrcnn_resnet50_fpn, rtdetr_r18]")
    assert searched.highest(("recipe", "epochs")) == 30
    assert searched.highest(("recipe", "epochs"), "fasterrcnn_resnet50_fpn") == 10


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("{lr: {by_model: {yolox_s: 0.1}}}", None),
        (
            "{lr: {by_model: {yolox: 0.1}}}",
            "recipe.lr.by_model.yolox: is no model of this file; did you mean 'yolox_s'? (allowed: "
            "yolox_s, rtdetr_r18)",
        ),
        (
            "{lr: {by_model: {yolox_s: fast}}}",
            "recipe.lr.by_model.yolox_s: expected a number, got the string 'fast'",
        ),
        (
            "{lr: {by_model: 5}}",
            "recipe.lr.by_model: expected a mapping such as {yolox_s: …}, got 5",
        ),
        (
            "{lr: {by_model: {yolox_s: 0.1}, low: 1}}",
            "recipe.lr.low: unknown key (a range has low, high, log, step, when; a choice has "
            "choices, when)",
        ),
    ],
)
def test_a_file_may_write_values_by_model_itself(written: str, says: str | None) -> None:
    if says is None:
        searched = space(recipe=written)
        assert sample(searched, "yolox_s").recipe.lr == 0.1
        assert sample(searched, "rtdetr_r18").recipe.lr == 0.0001
        return
    with pytest.raises(SpaceError) as error:
        space(recipe=written)
    assert error.value.problems == (f"space.yaml:4: {says}",)


def test_only_the_recipe_differs_by_model() -> None:
    with pytest.raises(SpaceError, match="only the keys of the recipe can differ by model"):
        read(SMALL.replace("size: 32", "size: {by_model: {resnet18_slim: 32}}"))


def test_a_study_with_the_first_models_recipe_goes_on_with_it() -> None:
    searched = space()
    study = identity(searched)
    study["recipe"] = dict(study["recipe"]) | {"optimizer": "sgd", "clip_norm": None}
    defaulted = defaulted_keys(searched)
    comparison = Comparison(study, defaulted, identity(searched), defaulted)
    assert comparison.problems == []
    assert comparison.earlier == {"recipe.optimizer": "sgd", "recipe.clip_norm": None}
    values = {tuple(key.split(".")): value for key, value in comparison.earlier.items()}
    recipe = sample(
        parsing.with_values(searched.document, values), "rtdetr_r18", freeze_depth=0
    ).recipe
    assert (recipe.optimizer, recipe.clip_norm, recipe.lr) == ("sgd", None, 0.0001)
