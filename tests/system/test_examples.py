"""The recipes for clusters: shells and manifests parse, and the commands in them are ones that exist."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tests.conftest import SMALL
from tuner.cli import app
from tuner.config import parsing
from tuner.config.run import parse_duration
from tuner.errors import SpaceError

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(FOLDER.rglob("*.sbatch"))
MANIFESTS = sorted((FOLDER / "kubernetes").rglob("*.yaml"))


def containers(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield from tree.get("containers", ())
        for value in tree.values():
            yield from containers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from containers(value)


def commands(path: Path) -> list[list[str]]:
    """The words of each `tuner` command in a recipe."""
    if path.suffix == ".sbatch":
        shells = [path.read_text()]
    else:
        parts = [c for tree in yaml.safe_load_all(path.read_text()) for c in containers(tree)]
        shells = [
            c["args"][0] if "args" in c else shlex.join(c["command"])
            for c in parts
            if "command" in c
        ]
    lines = [
        line
        for shell in shells
        for line in shell.splitlines()
        if re.match(r"\s*(exec )?tuner ", line)
    ]
    return [
        [w for w in shlex.split(line.strip().removeprefix("exec ").removesuffix("&")) if w]
        for line in lines
    ]


def test_there_is_a_recipe_for_each_way() -> None:
    assert [p.name for p in SCRIPTS] == ["postgres.sbatch", "ray.sbatch"] and [
        p.name for p in MANIFESTS
    ] == ["postgres.yaml", "ray.yaml"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shells_parse(path: Path) -> None:
    found = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_are_whole(path: Path) -> None:
    trees = list(yaml.safe_load_all(path.read_text()))
    assert all({"apiVersion", "kind", "metadata", "spec"} <= tree.keys() for tree in trees)
    for tree in trees:
        claimed = set(
            re.findall(r"'name': '(work|space)', '(?:persistentVolumeClaim|configMap)'", str(tree))
        )
        assert {mount["name"] for c in containers(tree) for mount in c["volumeMounts"]} <= claimed


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda p: f"{p.parent.name}-{p.name}")
def test_commands_exist_and_their_keys_are_known(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_DATABASE", "postgresql://host/studies")
    found = commands(path)
    assert found
    group: Any = typer.main.get_command(app)
    (tmp_path / "x.yaml").write_text(SMALL.replace("engine: {name: inline, device: cpu}\n", ""))
    for _, name, *words in found:
        context = group.commands[name].make_context(name, list(words))
        overrides = [w.replace("$ADDRESS", "10.0.0.1:6379") for w in context.params["overrides"]]
        space = parsing.load_space(tmp_path / "x.yaml", overrides)
        assert space.settings.engine.name == ("ray" if "ray" in path.name else "local")


def test_a_wrong_key_in_a_recipe_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(SMALL)
    with pytest.raises(SpaceError, match="unknown key"):
        parsing.load_space(tmp_path / "x.yaml", ["engine.adress=auto"])


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda path: path.name)
def test_the_running_epoch_has_what_the_cluster_leaves_it(path: Path) -> None:
    """`search.grace` ends some seconds before the cluster sends SIGKILL."""
    text = path.read_text()
    given = re.search(r"--signal=B:TERM@(\d+)|terminationGracePeriodSeconds: (\d+)", text)
    grace = re.search(r"search\.grace=(\w+)", text)
    assert given is not None and grace is not None
    assert 5 <= int(given[1] or given[2]) - parse_duration(grace[1]) <= 20
