"""README's commands and paths are true: each command line is parsed by the command it names, and those that can be run are."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

from tests.conftest import CommandResult
from tuner import cli
from tuner.config import parsing, yaml_document

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SVG = "{http://www.w3.org/2000/svg}"
TRIAL = re.compile(
    r"#\d+ +acc 0\.\d{4} . \(best 0\.\d{4} #\d+\) +(?P<tried>(sgd|adamw) .* freeze \d/5 ep \d/\d) .*?(\| \d+/24\b.*)?"
)
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for _, block in BLOCKS
        for line in block.splitlines()
        if line.startswith("tuner ")
    }
)


def test_the_two_commands_install_what_constraints_pin() -> None:
    setup = [block for language, block in BLOCKS if language == "bash" and "pip install" in block]
    assert len(setup) == 2 and all("-c constraints.txt" in block for block in setup)
    assert "tuner run search_spaces/resnet.yaml" in setup[0] and "pytest" in setup[1]
    assert len(setup[0].strip().splitlines()) == len(setup[1].strip().splitlines()) == 1


def test_the_space_file_shown_is_the_shipped_one() -> None:
    shown = next(block for language, block in BLOCKS if language == "yaml" and "digits" in block)
    shipped = parsing.load_space(ROOT / "search_spaces" / "resnet.yaml")
    assert parsing.parse_space(yaml_document.parse_document(shown, "README.md")) == shipped


def test_the_space_file_for_photographs_is_understood() -> None:
    shown = next(block for language, block in BLOCKS if language == "yaml" and "folder" in block)
    space = parsing.parse_space(yaml_document.parse_document(shown, "photos.yaml"))
    assert {d.name for d in space.dimensions} == {"optimizer", "lr", "freeze_depth", "epochs"}


def test_the_end_of_a_run_is_that_of_the_tutorial() -> None:
    shown = next(block for _, block in BLOCKS if block.startswith("best "))
    assert shown in (ROOT / "docs/tutorial.md").read_text()
    assert shown in (ROOT / "README.zh.md").read_text()


def test_the_recipe_shown_is_understood() -> None:
    shown = next(block for language, block in BLOCKS if language == "yaml" and "mixup" in block)
    shown = shown.replace("data: {", "data: {name: folder, path: photos, ")
    text = f"task: classification\nmodel: {{name: resnet18, weights: default}}\n{shown}"
    space = parsing.parse_space(yaml_document.parse_document(text, "README.md"))
    searched = {"data.augment", "optimizer", "lr", "layer_decay", "ema", "mixup", "class_weights"}
    assert {d.key for d in space.dimensions} == searched
    assert space.settings.search.direction == "minimise"


def test_the_engines_and_storages_shown_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_DB_PASSWORD", "x")
    base = (ROOT / "search_spaces/resnet.yaml").read_text()
    shown = next(
        block for language, block in BLOCKS if language == "yaml" and "storage:" in block
    ).splitlines()
    assert len(shown) == 4
    for line in shown:
        parsing.parse_space(yaml_document.parse_document(f"{base}\n{line}", "README.md"))


def test_every_link_and_picture_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_options_exist(command: str, tuner: Callable[..., CommandResult]) -> None:
    words = shlex.split(command)
    names = [w for w in words if w.startswith("--")]
    said = tuner(words[1], "--help")
    assert said.code == 0
    assert all(name.split("=")[0] in said.out for name in names)


def test_every_command_is_in_the_table_in_help_and_in_a_test(
    tuner: Callable[..., CommandResult],
) -> None:
    names = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert {shlex.split(command)[1] for command in COMMANDS} == names
    listed = re.findall(r"^  ([a-z]+)  ", tuner("--help").out.partition("Commands:")[2], re.M)
    assert set(listed) == names
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    run = re.findall(r'(?:\btuner\(|TUNER,|"tuner",)\s*"([a-z]+)"', tests)
    assert names <= set(run)


def picture() -> list[str]:
    """The lines of docs/terminal.svg."""
    rows: dict[float, list[tuple[float, str]]] = {}
    drawn = ElementTree.parse(ROOT / "docs/terminal.svg").getroot()
    matrix = next(g for g in drawn.iter(f"{SVG}g") if g.get("class", "").endswith("-matrix"))
    for text in matrix.iter(f"{SVG}text"):
        row = rows.setdefault(float(text.get("y", "")), [])
        row.append((float(text.get("x", "")), (text.text or "").replace("\xa0", " ")))
    return ["".join(part for _, part in sorted(rows[y])).rstrip() for y in sorted(rows)]


def heading(lines: list[str]) -> list[str]:
    """What is printed of data, model and search, before the first trial."""
    return [line.rstrip() for line in lines if line.startswith(("data ", "model ", "search "))]


def ending(lines: list[str]) -> list[str]:
    """How the lines after the search begin, up to their first number; without those that go on from the line above."""
    begin = next(i for i, line in enumerate(lines) if line.startswith("best "))
    starts = [re.split(r"\d", line)[0].rstrip() for line in lines[begin:]]
    return [line for line in starts if line and not line.startswith(" " * 9)]


def trial_rows(lines: list[str]) -> list[str]:
    """The lines of the trials, without those of the repeats that confirm the best."""
    return [line for line in lines if line.startswith("#") and " again, " not in line]


def test_the_commands_of_the_table_run_one_after_the_other(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    """As a reader would type them, on the embedded data with a small budget."""
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    quick = ["search.trials=2", "recipe.epochs=1", "engine.name=inline", "export=[safetensors]"]
    ran = []
    for command in (c for _, block in BLOCKS for c in block.splitlines() if c.startswith("tuner ")):
        words = shlex.split(command.split("#")[0])[1:]
        if (
            words[0] == "dashboard"
            or {"photos", "photos.yaml"} & set(words)
            or any("*" in w or w.endswith((".jpg", ".png")) for w in words)
        ):
            continue  # the dashboard runs until it is stopped, and the reader's own pictures are not here; other tests run these
        if words[0] == "run":
            words += quick
        if words[0] == "plan":
            words += ["engine.name=inline"]  # no process of its own is started
        said = tuner(*words)
        assert said.code == 0, (command, said.err)
        if words[0] == "run" and "run" not in ran:
            printed = said.out.splitlines()
        ran.append(words[0])
    assert {"run", "init", "check", "train", "export", "models", "schema"} <= set(ran)
    assert {"ls", "trials", "show", "report", "status", "stop", "enqueue", "doctor"} <= set(ran)
    shown = picture()
    assert shown[0] == "$ tuner run search_spaces/resnet.yaml"
    assert heading(shown) == [
        line.replace("search 2 trials", "search 24 trials") for line in heading(printed)
    ]
    assert ending(shown) == ending(printed), "the picture is old: python docs/pictures.py"
    assert len(trial_rows(shown)) == 24


@pytest.mark.slow
def test_the_trials_of_the_terminal_picture_are_what_the_command_prints_but_for_times(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    """Scores may differ with the processor, and so may what follows from them, such as later proposals.

    Two trials are enough, since the lines of the others look alike. The lines before and after the
    trials are compared above.
    """
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    quick = ["search.trials=2", "engine.name=inline", "search.retrain=false"]
    quick += ["search.compare=none", "export=[safetensors]"]
    said = tuner("run", "search_spaces/resnet.yaml", *quick)
    assert said.code == 0, said.err
    rows, again = trial_rows(picture()), trial_rows(said.out.splitlines())
    assert (len(rows), len(again)) == (24, 2)
    for row, other in zip(rows[:2], again, strict=True):  # what these try follows from no score
        assert TRIAL.fullmatch(row)["tried"] == TRIAL.fullmatch(other)["tried"]  # type: ignore[index]
    assert all(map(TRIAL.fullmatch, (*rows, *again)))
