"""Rows 1 to 11 of the faults: files that are refused before anything is made, through the command line itself."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandResult
from tuner.config.run import Recipe

PARTS = "task: classification\ndata: digits\nmodel: {name: resnet18_slim}\n"
INLINE = "engine: {name: inline, device: cpu}\n"

OWN = """
from torch import nn

def nothing(outputs):
    return 3

def model(outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, outputs))
"""

# row, what follows PARTS, the lines on stderr after `tuner: error: space.yaml:`
ROWS = [
    (1, "recipe: {momentun: 0.9}", ["4: recipe.momentun: unknown key; did you mean 'momentum'? (allowed: " + ", ".join(Recipe.model_fields) + ")"]),
    (2, "recipe:\n  lr: 0.1\n  epochs: 2\n  lr: 0.2\n", ["7: recipe.lr: duplicate key, first written in line 5; keep one"]),
    (3, 'recipe: {lr: {low: "abc", high: 1e-1}}', ["4: recipe.lr.low: expected a number, got the string 'abc'"]),
    (4, "recipe: {lr: {low: 1e-1, high: 1e-3}}", ["4: recipe.lr: low (0.1) must be below high (0.001)"]),
    (5, "recipe: {weight_decay: {low: 0, high: 1, log: true}}", ["4: recipe.weight_decay.low: log needs low above 0, got 0.0"]),
    (5, "recipe: {lr: {low: .nan, high: .inf}}", ["4: recipe.lr.low: must be a finite number, got nan", "4: recipe.lr.high: must be a finite number, got inf"]),
    (5, "recipe: {lr: {low: 1e-3, high: 1, log: true, step: 0.1}}", ["4: recipe.lr.step: log and step exclude each other; drop one"]),
    (5, "recipe: {epochs: {low: 1, high: 9, step: 0.5}}", ["4: recipe.epochs.step: expected a whole number, since epochs is one, got 0.5"]),
    (6, "recipe: {lr: []}", ["4: recipe.lr: an empty list of choices; name at least one: a number"]),
    (6, "recipe: {optimizer: [sgd, adamw, sgd]}", ["4: recipe.optimizer.2: sgd is listed twice; name each choice once"]),
    (6, "recipe: {lr: [0.1, [0.2]]}", ["4: recipe.lr.1: a choice must be a plain value, got a list"]),
    (7, "recipe: &r {lr: 0.1}\nsearch: *r\n", ["4: anchors (&) and aliases (*) are not allowed; write the value out"]),
    (7, "recipe: !!python/object:os.system {}", ["4: tags such as 'tag:yaml.org,2002:python/object:os.system' are not allowed; write the plain value"]),
    (7, "recipe: " + "[" * 20_000, ["4: nested deeper than 50 levels"]),
    (8, "recipe: {epochs: 1000000000}", ["4: recipe.epochs: must be at most 100,000, got 1000000000"]),
    (8, "search: {trials: 0}", ["4: search.trials: must be at least 1, got 0"]),
    (8, "search: {trials: -1}", ["4: search.trials: must be at least 1, got -1"]),
    (8, "search: {trials: 1.5}", ["4: search.trials: expected a whole number, got 1.5"]),
    (8, "search: {trials: true}", ["4: search.trials: expected a whole number, got true"]),
    (10, "engine: {name: 'os:system'}", ["4: engine.name: 'os:system': system is not a function or class of yours; engine needs one"]),
    (10, "export: ['mypkg:missing']", ["4: export.0: 'mypkg:missing': importing mypkg failed (ModuleNotFoundError: No module named 'mypkg')"]),
]  # fmt: skip

MODELS = [
    (
        10,
        "os:system",
        "3: model.name: 'os:system': system is not a function or class of yours; model needs one",
    ),
    (
        10,
        "mypkg:missing",
        "3: model.name: 'mypkg:missing': importing mypkg failed (ModuleNotFoundError: No module named 'mypkg')",
    ),
    (
        10,
        "faultymod:x",
        "3: model.name: 'faultymod:x': importing faultymod failed (ImportError: libfoo is missing)",
    ),
    (11, "resnet81", "3: model.name: 'resnet81' is not known; did you mean 'resnet18'? (allowed: "),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # own plug-ins put the current folder on it
    return tmp_path / "home"


def made(folder: Path) -> list[str]:
    """What a command left behind beside the files that a test wrote."""
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix not in (".yaml", ".py") and p.name != "__pycache__"
    )


@pytest.mark.parametrize("command", ["run", "check", "train"])
@pytest.mark.parametrize(("row", "text", "says"), ROWS, ids=lambda value: str(value)[:20])
def test_a_faulty_file_is_refused_before_anything_is_made(
    command: str,
    row: int,
    text: str,
    says: list[str],
    tuner: Callable[..., CommandResult],
    home: Path,
    tmp_path: Path,
) -> None:
    Path("space.yaml").write_text(PARTS + text)
    said = tuner(command, "space.yaml")
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines() == [f"tuner: error: space.yaml:{line}" for line in says]
    assert made(tmp_path) == []


@pytest.mark.parametrize(("row", "name", "says"), MODELS)
def test_a_model_that_is_not_there_is_refused_before_anything_is_made(
    row: int, name: str, says: str, tuner: Callable[..., CommandResult], home: Path, tmp_path: Path
) -> None:
    Path("faultymod.py").write_text("raise ImportError('libfoo is missing')")
    Path("space.yaml").write_text(PARTS.replace("resnet18_slim", f"'{name}'"))
    said = tuner("run", "space.yaml")
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert said.err.startswith(f"tuner: error: space.yaml:{says}")
    assert made(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ":1: the file is empty; `tuner init` lists examples to begin with"),
        (
            b"- task\n- data\n",
            ":1: expected a mapping (task:, data:, model:, …) at the top, got a list",
        ),
        (b"\x89PNG\r\n\x00", ":1: not a text file in UTF-8 (byte 0)"),
        (
            b"# " + b"x" * 5_000_000,
            ":1: the file is too large; a space file has at most 200,000 bytes",
        ),
        (None, ": no such file"),
    ],
    ids=["empty", "list", "binary", "5MB", "missing"],
)
def test_row_7_what_is_no_space_file(
    content: bytes | None,
    says: str,
    tuner: Callable[..., CommandResult],
    home: Path,
    tmp_path: Path,
) -> None:
    if content is not None:
        Path("space.yaml").write_bytes(content)
    said = tuner("run", "space.yaml")
    assert (said.code, said.out, said.err) == (2, "", f"tuner: error: space.yaml{says}\n")
    assert made(tmp_path) == []


def test_every_fault_of_a_file_and_of_the_command_line_is_reported_at_once(
    tuner: Callable[..., CommandResult], home: Path, tmp_path: Path
) -> None:
    text = "recipe:\n  lr: {low: 1, high: 0}\n  lr: 0.1\n  epocs: 3\nsearch: {trials: 0}\n"
    Path("space.yaml").write_text(PARTS + text)
    said = tuner("run", "space.yaml", "recipe.lr=abc", "recipe.warmup=0.9")
    assert said.code == 2
    assert [line.split(": ")[2:4] for line in said.err.splitlines()] == [
        ["space.yaml:6", "recipe.lr"],
        ["space.yaml:7", "recipe.epocs"],
        ["command line", "recipe.lr"],
        ["command line", "recipe.warmup"],
        ["space.yaml:8", "search.trials"],
    ]
    assert made(tmp_path) == []


# -- rows that need the model: found before training by a worker that writes nothing


def test_row_3_numbers_that_yaml_takes_for_text(
    tuner: Callable[..., CommandResult], home: Path
) -> None:
    Path("space.yaml").write_text(PARTS + "recipe: {lr: {low: 1e-3, high: 1e-1}}\n" + INLINE)
    said = tuner("check", "space.yaml", "--print")
    assert (said.code, said.err) == (0, "")
    assert "  lr: {low: 0.001, high: 0.1}\n" in said.out


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("depth", "says"),
    [
        ("{low: 0, high: 9}", "recipe.freeze_depth.high: 9, but resnet18 allows 0..5"),
        ("[0, 9]", "recipe.freeze_depth: 9, but resnet18 allows 0..5"),
        ("9", "recipe.freeze_depth: 9, but resnet18 allows 0..5"),
    ],
)
def test_row_9_a_freeze_depth_that_the_model_does_not_have(
    command: str,
    depth: str,
    says: str,
    tuner: Callable[..., CommandResult],
    home: Path,
    tmp_path: Path,
) -> None:
    Path("space.yaml").write_text(
        PARTS.replace("resnet18_slim", "resnet18") + f"recipe: {{freeze_depth: {depth}}}\n" + INLINE
    )
    said = tuner(command, "space.yaml")
    assert (said.code, said.out, said.err) == (2, "", f"tuner: error: space.yaml:4: {says}\n")
    assert made(tmp_path) == [] and not [path for path in home.rglob("*") if path.is_file()]


def test_row_10_a_factory_that_returns_no_module(
    tuner: Callable[..., CommandResult], home: Path, tmp_path: Path
) -> None:
    Path("ownfactory.py").write_text(OWN)
    Path("space.yaml").write_text(PARTS.replace("resnet18_slim", "'ownfactory:nothing'") + INLINE)
    said = tuner("run", "space.yaml")
    says = "model.name: ownfactory:nothing returned int; expected an nn.Module or a tuner.api.StagedModel"
    assert (said.code, said.out, said.err) == (2, "", f"tuner: error: space.yaml:3: {says}\n")
    assert made(tmp_path) == [] and not [path for path in home.rglob("*") if path.is_file()]


def test_row_10_a_factory_that_returns_one(tuner: Callable[..., CommandResult], home: Path) -> None:
    Path("ownfactory.py").write_text(OWN)
    Path("space.yaml").write_text(
        PARTS.replace("resnet18_slim", "'ownfactory:model'").replace(
            "digits", "{name: digits, size: 8}"
        )
        + INLINE
    )
    said = tuner("check", "space.yaml")
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith("ownfactory:model freeze depth 0..1\n")


def test_the_schema_is_printed(tuner: Callable[..., CommandResult]) -> None:
    said = tuner("schema")
    assert said.code == 0 and said.out.startswith(
        '{\n  "$schema": "https://json-schema.org/draft/2020-12/schema"'
    )
