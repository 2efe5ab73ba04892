"""Where models are searched, each has its own family's recipe for the keys that the file leaves open."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FixedTrial

from tests.conftest import SMALL
from tuner.config import parsing, related_tasks, yaml_document
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
        stated = related_tasks.read_recipe(name, "detection")
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


# -- what is frozen, and conditions by model

SHARES = """
task: classification
data: {name: synthetic, examples: 40, classes: 2, size: 32}
model: {name: [resnet18_slim, squeezenet1_1], weights: none}
recipe:
  freeze: {low: 0.0, high: 1.0}
  lr: [{low: 1e-3, high: 1e-1, log: true, when: {model: resnet18_slim}}, {low: 1e-5, high: 1e-3, log: true, when: {model: squeezenet1_1}}]
  momentum: {low: 0.8, high: 0.99, when: {model: squeezenet1_1}}
  epochs: 1
  batch_size: 8
search: {trials: 6, seed: 1, winner: best}
engine: {name: inline, device: cpu}
export: [safetensors]
"""


def test_a_share_of_the_stages_has_one_meaning_across_models() -> None:
    share = Recipe(freeze=0.5)
    assert [share.depth_of(deepest) for deepest in (1, 5, 7, 13)] == [1, 3, 4, 7]
    assert [Recipe(freeze=f).depth_of(7) for f in (0.0, 0.07, 0.08, 0.92, 0.93, 1.0)] == [
        0,
        0,
        1,
        6,
        7,
        7,
    ]
    assert Recipe(freeze_depth=3).depth_of(7) == 3


def test_a_key_can_depend_on_the_model() -> None:
    searched = read(SHARES)
    assert [d.name for d in searched.dimensions] == [
        "model.name", "lr[resnet18_slim]", "lr[squeezenet1_1]", "momentum", "freeze",
    ]  # fmt: skip
    resnet = sample(searched, "resnet18_slim", freeze=0.5, **{"lr[resnet18_slim]": 0.05})
    assert (resnet.recipe.lr, resnet.recipe.momentum, resnet.recipe.freeze) == (0.05, 0.9, 0.5)
    vgg = sample(
        searched, "squeezenet1_1", freeze=0.5, momentum=0.85, **{"lr[squeezenet1_1]": 1e-4}
    )
    assert (vgg.recipe.lr, vgg.recipe.momentum) == (1e-4, 0.85)
    assert read(dump_yaml(searched.to_dict())) == searched


def test_the_deepest_freeze_is_each_models_own() -> None:
    depths = "[{low: 0, high: 5, when: {model: resnet18_slim}}, {low: 0, high: 7, when: {model: squeezenet1_1}}]"
    searched = read(SHARES.replace("freeze: {low: 0.0, high: 1.0}", f"freeze_depth: {depths}"))
    path = ("recipe", "freeze_depth")
    assert (
        searched.highest(path, "resnet18_slim") == 5
        and searched.highest(path, "squeezenet1_1") == 7
    )
    one = SHARES.replace(
        "freeze: {low: 0.0, high: 1.0}",
        "freeze_depth: {low: 1, high: 6, when: {model: squeezenet1_1}}",
    )
    assert read(one).highest(path, "resnet18_slim") == 0


def test_what_is_frozen_is_said_in_one_way() -> None:
    with pytest.raises(SpaceError, match="freeze_depth says already how much is frozen"):
        read(SHARES.replace("freeze:", "freeze_depth: 2\n  freeze:"))
    read(SHARES.replace("freeze:", "freeze_depth: 0\n  freeze:"))  # as the resolved file has it


def test_a_search_over_models_and_shares(tmp_path: Path, tuner: Any) -> None:
    (tmp_path / "shares.yaml").write_text(SHARES)
    result = tuner("run", tmp_path / "shares.yaml", "--studies", tmp_path, "search.trials=3")
    assert result.code == 0, result.err
    assert "freeze " in result.out and "%" in result.out
    best = read((tmp_path / "shares" / "best.yaml").read_text())
    assert isinstance(best.values["recipe", "freeze"], float)
    card = (tmp_path / "shares" / "export" / "MODEL_CARD.md").read_text()
    assert f"freeze {best.values['recipe', 'freeze']:.0%}" in card
