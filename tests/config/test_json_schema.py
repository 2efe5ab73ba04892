"""schema.py: what editors check agrees with what tuner checks."""

from pathlib import Path

import jsonschema
import pytest

from tuner.config import parsing, yaml_document
from tuner.config.json_schema import space_schema
from tuner.errors import SpaceError

SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
PARTS = {"task": "classification", "data": "digits", "model": "resnet18_slim"}


@pytest.fixture(scope="module")
def check() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(space_schema())


@pytest.mark.slow
def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(space_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_and_their_resolved_forms_are_valid(
    path: Path, check: jsonschema.Draft202012Validator
) -> None:
    space = parsing.load_space(path)
    check.validate(yaml_document.read_document(path).content)
    check.validate(space.to_dict())
    check.validate(next(space.plugin_combinations()).to_dict())


@pytest.mark.parametrize(
    "more",
    [
        {"model": ["resnet18", "vgg11"]},
        {
            "model": ["resnet18", "vgg11"],
            "recipe": {"lr": {"by_model": {"resnet18": 0.1, "vgg11": 0.01}}},
        },
        {
            "model": {
                "name": {"choices": ["resnet18", "vgg11"], "when": {"recipe.optimizer": "sgd"}}
            },
            "recipe": {"optimizer": ["sgd", "adamw"]},
        },
        {"engine": "inline", "export": "onnx", "storage": "postgresql://h/d", "seed": 3},
        {"export": None, "storage": None, "seed": None},
        {"search": {"confirm": "none", "compare": "none"}},
        {"search": {"confirm": {"top": 2}}},
        {
            "recipe": {
                "patience": [None, 3],
                "lr": {"low": 1e-3, "high": 1, "log": True},
                "nesterov": {"choices": [True]},
            }
        },
        {
            "data": {
                "name": "digits",
                "mean": [0.1, 0.2, 0.3],
                "size": {"low": 16, "high": 32, "step": 16},
            }
        },
    ],
)
def test_what_tuner_takes_the_schema_takes(
    more: dict[str, object], check: jsonschema.Draft202012Validator
) -> None:
    parsing.parse_space(yaml_document.Document("f", PARTS | more))
    check.validate(PARTS | more)


@pytest.mark.parametrize(
    "more",
    [
        {"recipes": {}},
        {"task": "segmentations"},
        {"model": {"weights": "none"}},
        {"model": "resnet81"},
        {"data": {"name": "folder"}},
        {"data": {"name": "digits", "sise": 32}},
        {"recipe": {"momentun": 0.9}},
        {"recipe": {"lr": "abc"}},
        {"recipe": {"lr": {"low": 0.1}}},
        {"recipe": {"lr": {"low": 0.1, "hihg": 1}}},
        {"recipe": {"optimizer": []}},
        {"recipe": {"optimizer": ["sgd", "sgd"]}},
        {"recipe": {"optimizer": {"low": 1, "high": 2}}},
        {"recipe": {"epochs": 1.5}},
        {"recipe": {"epochs": 1_000_000_000}},
        {"search": {"trials": 0}},
        {"search": {"trials": [1, 2]}},
        {"search": {"confirm": {"top": 0}}},
        {"search": {"confirm": {"tops": 2}}},
        {"search": {"confirm": "never"}},
        {"engine": "locl"},
        {"export": ["onix"]},
        {"seed": -1},
    ],
)
def test_what_the_schema_refuses_tuner_refuses(
    more: dict[str, object], check: jsonschema.Draft202012Validator
) -> None:
    assert not check.is_valid(PARTS | more)
    with pytest.raises(SpaceError):
        parsing.parse_space(yaml_document.Document("f", PARTS | more))


def test_every_key_is_explained_and_has_its_default(check: jsonschema.Draft202012Validator) -> None:
    recipe = space_schema()["properties"]["recipe"]["properties"]
    assert (
        recipe["lr"]["default"] == 0.0005
        and recipe["lr"]["description"] == "learning rate at its highest"
    )
    assert all("description" in key for key in recipe.values())
