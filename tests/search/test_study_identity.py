"""Which files continue a study: equal keys, whatever the version of tuner that wrote each of the two."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import SMALL, CommandResult
from tuner.config import parsing, yaml_document
from tuner.config.space import Space
from tuner.search.study_identity import Comparison, defaulted_keys, identity


def space(*overrides: str) -> Space:
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SMALL, "small.yaml"), overrides)
    )


def compared(change: Callable[[dict[str, Any], set[str]], None], *overrides: str) -> Comparison:
    """The study of a file whose version of tuner had other keys and defaults, beside the file with overrides."""
    study, defaulted = identity(space()), set(defaulted_keys(space()))
    change(study, defaulted)
    file = space(*overrides)
    return Comparison(study, defaulted, identity(file), defaulted_keys(file))


def test_keys_that_the_file_names_are_told_from_those_at_their_default() -> None:
    keys = set(defaulted_keys(space("data.valid=0.3")))
    assert {"recipe.head", "recipe.schedule", "data.seed", "data.test"} <= keys
    assert not {"recipe.lr", "recipe.batch_size", "model.weights", "data.valid", "data.name"} & keys
    short = parsing.parse_space(
        yaml_document.parse_document(SMALL.replace("{name: digits}", "digits"), "x")
    )
    assert not {"task.name", "data.name"} & set(defaulted_keys(short))


def test_a_key_that_a_later_version_added_is_no_difference_at_its_default() -> None:
    def older(study: dict[str, Any], defaulted: set[str]) -> None:
        del study["recipe"]["head"], study["data"]["seed"], study["recipe"]["schedule"]
        defaulted -= {"recipe.head", "data.seed", "recipe.schedule"}

    same = compared(older)
    assert (same.problems, same.earlier) == ([], {})
    assert compared(older, "recipe.head=fresh").problems == [
        "without recipe.head, this file has fresh"
    ]


def test_a_study_that_is_older_than_a_key_goes_on_as_it_did() -> None:
    """It decayed all parameters, and had one rate; a default or a family's recipe may say otherwise now."""

    def older(study: dict[str, Any], defaulted: set[str]) -> None:
        for key in ("decay_norms", "head_lr"):
            del study["recipe"][key]
            defaulted.discard(f"recipe.{key}")

    same = compared(older)
    assert (same.problems, same.earlier) == ([], {"recipe.decay_norms": True})
    assert compared(older, "recipe.decay_norms=true").earlier == {}
    other = compared(older, "recipe.decay_norms=false", "recipe.head_lr=2")
    assert other.problems == [
        "without recipe.decay_norms, this file has false",
        "without recipe.head_lr, this file has 2.0",
    ]


def test_a_key_that_a_later_version_dropped_is_no_difference_if_it_was_at_its_default() -> None:
    def older(study: dict[str, Any], defaulted: set[str]) -> None:
        study["recipe"] |= {"old": 1, "own": 2}
        defaulted.add("recipe.old")

    assert compared(older).problems == ["with recipe.own=2, this file does not have it"]


def test_a_default_that_has_changed_is_kept_and_what_somebody_wrote_is_not_replaced() -> None:
    def older(study: dict[str, Any], defaulted: set[str]) -> None:
        study["recipe"]["weight_decay"] = 0.123
        study["recipe"]["schedule"] = "linear"  # written in the file then
        defaulted.discard("recipe.schedule")

    found = compared(older)
    assert found.earlier == {"recipe.weight_decay": 0.123}
    assert [problem.partition(",")[0] for problem in found.problems] == [
        "with recipe.schedule=linear"
    ]
    explicit = compared(older, "recipe.schedule=linear", "recipe.weight_decay=0.0")
    assert explicit.earlier == {}
    assert explicit.problems == ["with recipe.weight_decay=0.123, this file has 0.0"]


def test_a_range_that_is_gone_is_a_difference_and_so_is_one_that_is_new() -> None:
    fixed, searched = space(), space("recipe.weight_decay=[0.0, 0.1]")
    for study, file in ((fixed, searched), (searched, fixed)):
        found = Comparison(
            identity(study), defaulted_keys(study), identity(file), defaulted_keys(file)
        )
        assert len(found.problems) == 1 and not found.earlier


def test_where_the_data_lie_is_left_to_their_digest() -> None:
    def elsewhere(study: dict[str, Any], _: set[str]) -> None:
        study["data"]["path"] = "/mnt/other"

    assert compared(elsewhere).problems == []


def test_a_study_goes_on_with_the_defaults_it_was_made_with(
    tuner: Callable[..., CommandResult], small: Path
) -> None:
    grid = ["recipe.lr=[0.01, 0.1]", "recipe.epochs=1", "recipe.freeze_depth=5"]
    fixed = ["recipe.momentum=0.9", "search.sampler=grid", "search.retrain=false", "search.keep=0"]
    words = ("run", small, *grid, *fixed)
    first = tuner(*words, "search.trials=1", "data.seed=7", "recipe.weight_decay=0.125")
    assert first.code == 0, first.err
    assert "the grid has 4 combinations, of which 1 are tried" in first.err
    folder = small.parent / "studies/small"
    with sqlite3.connect(folder / "study.db") as database:  # as if these had been defaults then
        query = "select value_json from study_user_attributes where key = 'tuner:defaulted'"
        defaulted = json.loads(database.execute(query).fetchone()[0])
        defaulted += ["data.seed", "recipe.weight_decay"]
        database.execute(
            "update study_user_attributes set value_json = ? where key = 'tuner:defaulted'",
            (json.dumps(defaulted),),
        )
    database.close()
    second = tuner(*words, "search.trials=2")
    assert second.code == 0, second.err
    says = (
        "goes on with the defaults that it was created with: data.seed=7, recipe.weight_decay=0.125"
    )
    assert says in second.out + second.err
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert (best["data"]["seed"], best["recipe"]["weight_decay"]) == (7, 0.125)
