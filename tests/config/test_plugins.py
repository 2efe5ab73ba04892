"""plugins.py: the folders are the registry; the user's own goes as package.module:attribute."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner.config import parsing, plugins, yaml_document
from tuner.config.space import Range, Space
from tuner.errors import SpaceError

OWN = '''
import functools
import os
from os import system
from typing import Annotated, Literal

from pydantic import Field

METRICS = ("dice", "iou")


def build(outputs, *, width: Annotated[int, Field(ge=1)] = 8, act: Literal["relu", "gelu"] = "relu", drop: float, sizes: tuple[int, ...] = (1, 2)):
    """A model, supposedly."""


def untyped(outputs, *, depth=3):
    pass


def callback(outputs, *, act: object = print):
    pass


class Net:
    def __init__(self, outputs, *, width: int = 8):
        pass


partial = functools.partial(untyped, depth=4)
number = 3
'''


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of the user's in the current folder."""
    (tmp_path / "ownpkg").mkdir()
    (tmp_path / "ownpkg" / "parts.py").write_text(OWN)
    (tmp_path / "ownpkg" / "broken.py").write_text(
        "raise ImportError('libfoo is missing\\nand more')"
    )
    (tmp_path / "ownpkg" / "leaving.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    plugins.read_keys.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "ownpkg"]:
        del sys.modules[name]


def space(model: str, more: str = "", task: str = "classification") -> Space:
    return parsing.parse_space(
        yaml_document.parse_document(f"task: {task}\ndata: digits\nmodel: {model}\n{more}", "f")
    )


def problems(model: str, more: str = "", task: str = "classification") -> list[str]:
    with pytest.raises(SpaceError) as caught:
        space(model, more, task)
    return list(caught.value.problems)


def test_the_folders_are_listed_without_importing() -> None:
    tasks = {
        "classification",
        "detection",
        "instance_segmentation",
        "multilabel",
        "regression",
        "segmentation",
        "text_classification",
        "text_generation",
        "text_multilabel",
        "text_regression",
        "token_classification",
    }
    assert set(plugins.list_names("task")) == tasks
    assert {"digits", "folder", "cifar10", "synthetic"} <= set(plugins.list_names("data"))
    assert plugins.list_names("export") == [
        "onnx",
        "onnx_fp16",
        "onnx_int8",
        "openvino",
        "pretrained",
        "safetensors",
        "torch_export",
    ]
    assert {"inline", "local"} <= set(plugins.list_names("engine")) and not any(
        n.startswith("_") for n in plugins.list_names("engine")
    )
    assert {"resnet18_slim", "resnet50", "vgg16_bn"} <= set(plugins.list_names("model"))
    assert (
        plugins.find_model_family("wide_resnet50_2") == "resnet"
        and plugins.find_model_family("resnet81") is None
    )


def test_keyword_only_arguments_are_the_keys() -> None:
    found = plugins.read_keys("data", "folder")
    assert found.fields["path"].is_required() and found.fields["size"].default is None
    made = found.to_arguments(
        {key: found.fields[key].get_default() for key in found.fields if key != "path"}
        | {"path": "photos"}
    )
    assert (
        set(made) == {"path", "image"} and made["path"] == "photos" and made["image"].valid == 0.15
    )
    assert list(plugins.read_keys("model", "resnet18").fields) == ["weights"]


def test_a_models_own_keys_are_checked_searched_and_kept() -> None:
    found = space(
        "{name: 'ownpkg.parts:build', drop: 0.1, act: [relu, gelu], width: {low: 4, high: 8}, sizes: [3, 4]}"
    )
    assert [d.name for d in found.dimensions] == ["model.width", "model.act"]
    assert found.dimensions[0].domain == Range(4, 8, integer=True)
    assert found.make_run({}).model.options == {
        "width": 8,
        "act": "relu",
        "drop": 0.1,
        "sizes": (3, 4),
    }
    assert space("ownpkg.parts:Net").make_run({}).model.options == {"width": 8}
    assert space("{name: 'ownpkg.parts:partial', depth: 5}").make_run({}).model.options == {
        "depth": 5
    }


def test_untyped_arguments_take_any_plain_value() -> None:
    assert space("{name: 'ownpkg.parts:untyped', depth: {low: 1, high: 3}}").dimensions[
        0
    ].domain == Range(1, 3, integer=True)
    assert space("{name: 'ownpkg.parts:untyped', depth: {low: 1, high: 3, step: 0.5}}").dimensions[
        0
    ].domain == Range(1, 3, step=0.5)


def test_a_models_own_keys_are_refused_with_key_and_cause() -> None:
    assert problems("{name: 'ownpkg.parts:build', width: 0, act: tanh, wdith: 3}") == [
        "f:3: model.wdith: unknown key; did you mean 'width'? (allowed: name, width, act, drop, sizes)",
        "f:3: model.width: must be at least 1, got 0",
        "f:3: model.act: expected relu or gelu, got the string 'tanh'",
        "f:3: model.drop: is needed: a number",
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ownpkg.parts:biuld", "module ownpkg.parts has no 'biuld'; did you mean 'build'?"),
        ("ownpkg.broken:x", "importing ownpkg.broken failed (ImportError: libfoo is missing)"),
        ("ownpkg.leaving:x", "importing ownpkg.leaving failed (SystemExit: 0)"),
        ("nopkg:x", "importing nopkg failed (ModuleNotFoundError: No module named 'nopkg')"),
        ("ownpkg.parts:number", "number is not a function or class of yours; model needs one"),
        ("ownpkg.parts:system", "system is not a function or class of yours; model needs one"),
        ("ownpkg.parts:os", "os is not a function or class of yours; model needs one"),
        ("os:system", "system is not a function or class of yours; model needs one"),
        ("shutil:rmtree", "rmtree is not a function or class of yours; model needs one"),
        ("builtins:dict", "dict is not a function or class of yours; model needs one"),
        ("ownpkg.parts:", "your own model goes as package.module:attribute"),
        (":x", "your own model goes as package.module:attribute"),
        (
            "ownpkg.parts:callback",
            "its argument 'act' is not made of numbers, text, true/false, null, Literal and lists of them",
        ),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_named(name: str, says: str) -> None:
    assert problems(f"{{name: '{name}'}}") == [f"f:3: model.name: {name!r}: {says}"]


def test_own_engines_and_exports_are_imported_before_anything_else() -> None:
    assert problems(
        "vgg11", "engine: {name: 'nopkg:x'}\nexport: [onnx, 'ownpkg.parts:number']"
    ) == [
        "f:4: engine.name: 'nopkg:x': importing nopkg failed (ModuleNotFoundError: No module named 'nopkg')",
        "f:5: export.1: 'ownpkg.parts:number': number is not a function or class of yours; export needs one",
    ]


def test_an_own_task_says_its_metrics_beside_itself() -> None:
    assert space("vgg11", task="ownpkg.parts:Net").settings.search.metric == "dice"
    assert problems("vgg11", "search: {metric: accuracy}", task="ownpkg.parts:Net") == [
        "f:4: search.metric: 'accuracy' is not a metric of ownpkg.parts:Net (allowed: dice, iou); your own goes as package.module:function"
    ]
    Path("ownpkg/bare.py").write_text("def task(outputs, recipe): pass")
    assert problems("vgg11", task="ownpkg.bare:task") == [
        "f:1: search.metric: is needed: ownpkg.bare:task has no METRICS beside it to take the first of"
    ]
