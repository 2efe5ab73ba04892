"""`search.metric` and `search.direction`: what a metric is called, which way is better, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.objective import metric_label
from tuner.config.run import SearchSettings
from tuner.errors import SpaceError

OWN = """
import os
import torch

METRICS = ("error", "score")
MINIMISED = ("error",)


def build(classes, recipe): ...


def hits(predictions, targets):
    return (predictions.argmax(1) == targets).float().mean()


def cost(predictions, targets):
    return 0.0


cost.minimised = True


def other(x): ...


number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own, by a name that no other test imported."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def read(*words: str) -> SearchSettings:
    document = yaml_document.parse_document(SMALL, "small.yaml")
    return parsing.parse_space(parsing.apply_overrides(document, words)).settings.search


def problem(*words: str) -> str:
    with pytest.raises(SpaceError) as refused:
        read(*words)
    (only,) = refused.value.problems
    return str(only)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        (None, "maximise"),
        ("auroc", "maximise"),
        ("log_loss", "minimise"),
        ("expected_calibration_error", "minimise"),
    ],
)
def test_a_metric_of_the_task_has_its_direction(metric: str | None, direction: str) -> None:
    words = [f"search.metric={metric}"] if metric else []
    assert read(*words).direction == direction
    assert read(*words, f"search.direction={direction}").direction == direction


def test_a_direction_that_contradicts_the_metric_is_refused() -> None:
    assert problem("search.metric=log_loss", "search.direction=maximise") == (
        "command line: search.direction: maximise, but log_loss is minimised; drop the key, or "
        "choose another metric"
    )
    assert "did you mean 'maximise'" in problem("search.direction=maximize")


def test_a_task_of_ones_own_says_what_is_minimised(own: str) -> None:
    task = f"task='{own}:build'"
    assert read(task).metric == "error" and read(task).direction == "minimise"
    assert read(task, "search.metric=score").direction == "maximise"


def test_a_metric_of_ones_own_is_maximised_unless_it_or_the_file_says_otherwise(own: str) -> None:
    hits, cost = f"search.metric='{own}:hits'", f"search.metric='{own}:cost'"
    assert read(hits).direction == "maximise" and read(cost).direction == "minimise"
    assert read(hits, "search.direction=minimise").direction == "minimise"
    assert read(cost, "search.direction=maximise").direction == "maximise"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("hist", "has no 'hist'; did you mean 'hits'?"),
        ("number", "number is not a function or class of yours; metric needs one"),
        ("other", "is called as function(predictions, targets), and takes others: too many"),
    ],
)
def test_a_metric_of_ones_own_that_cannot_be_called_is_named(
    own: str, function: str, says: str
) -> None:
    message = problem(f"search.metric='{own}:{function}'")
    assert message.startswith(f"command line: search.metric: '{own}:{function}'")
    assert says in message


def test_a_module_that_cannot_be_imported_is_named() -> None:
    message = problem("search.metric='no_such_module:cost'")
    assert "importing no_such_module failed (ModuleNotFoundError" in message


@pytest.mark.parametrize(
    ("metric", "label"), [("log_loss", "log loss"), ("my.module:my_cost", "my cost")]
)
def test_a_metric_as_people_read_it(metric: Any, label: str) -> None:
    assert metric_label(metric) == label


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("detection", ["recipe.class_weights=balanced", "recipe.focal_gamma=2"]),
        ("text_generation", ["recipe.sampling=[natural, balanced]"]),
        ("segmentation", ["recipe.sampling=balanced", "recipe.focal_gamma={low: 0, high: 2}"]),
    ],
)
def test_keys_for_rare_classes_are_refused_where_examples_have_no_class(
    task: str, words: list[str]
) -> None:
    document = yaml_document.parse_document(f"task: {task}", "space.yaml")
    with pytest.raises(SpaceError) as refused:
        parsing.parse_space(parsing.apply_overrides(document, words))
    of_recipe = [text for text in refused.value.problems if "recipe." in text]
    assert len(of_recipe) == len(words)
    assert all(f"{task} has no such key, only classification" in text for text in of_recipe)


def test_a_task_of_ones_own_names_the_keys_of_the_recipe_that_it_has(
    own: str, tmp_path: Path
) -> None:
    (tmp_path / f"{own}_keys.py").write_text(f'{OWN}\nRECIPE_KEYS = ("focal_gamma",)\n')
    focal = "recipe.focal_gamma=2"
    read(f"task='{own}_keys:build'", focal)
    assert "name it in RECIPE_KEYS beside METRICS" in problem(f"task='{own}:build'", focal)
