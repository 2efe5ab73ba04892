"""What is installed: every file of the package, the example space files, and commands that work outside the clone."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import CommandResult
from tuner.commands.init import names
from tuner.config import plugins, requirements

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no file of an earlier build gets into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tuner", "search_spaces"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path.relative_to(ROOT) for path in (ROOT / "tuner").rglob("*") if path.is_file())
    wanted = {str(path) for path in files if "__pycache__" not in path.parts}
    wanted |= {f"tuner/search_spaces/{path.name}" for path in (ROOT / "search_spaces").iterdir()}
    assert held == wanted


def test_what_an_extra_needs_is_read_from_the_installed_package_or_the_clone(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path, [n for n in content.namelist() if ".dist-info/" in n])
    monkeypatch.syspath_prepend(tmp_path)
    stated = {extra: set(map(Requirement, lines)) for extra, lines in EXTRAS.items()}
    installed = {extra: set(map(Requirement, requirements.needed(extra))) for extra in EXTRAS}
    monkeypatch.setattr(requirements, "DISTRIBUTION", "tuner-that-nobody-installed")
    clone = {extra: set(map(Requirement, requirements.needed(extra))) for extra in EXTRAS}
    assert stated == installed == clone
    assert shlex.split(requirements.pip_install("text"))[2:] == EXTRAS["text"]


def test_every_extra_that_a_message_speaks_of_exists() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tuner").rglob("*.py"))
    asked = set(re.findall(r"""pip_install\(["'](\w+)["']\)""", sources))
    trackers = set(plugins.list_names("tracker"))  # the extra of a tracker has its name
    assert asked | trackers == set(EXTRAS) - {"test", "docs"}


def test_examples_are_listed_and_written_but_nothing_is_overwritten(
    tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    shipped = {path.stem: path.read_text() for path in (ROOT / "search_spaces").glob("*.yaml")}
    listed = tuner("init").out.splitlines()
    assert [line.split()[0] for line in listed[: len(shipped)]] == sorted(shipped)
    assert tuner("init", "--example").out.splitlines() == listed
    assert all(len(line) > 40 for line in listed[: len(shipped)])
    for name, text in shipped.items():
        answer = tuner("init", "--example", name)
        assert (answer.code, f"tuner check {name}.yaml" in answer.out) == (0, True)
        written = (tmp_path / f"{name}.yaml").read_text()
        assert written == text.replace(f"search_spaces/{name}.yaml", f"{name}.yaml")
        assert "search_spaces" not in written  # there is no such folder beside it
    (tmp_path / "resnet.yaml").write_text("mine")
    answer = tuner("init", "--example", "resnet")
    assert (answer.code, answer.err) == (
        2,
        "tuner: error: resnet.yaml is there already and stays as it is; rename it, or go to another folder\n",
    )
    assert (tmp_path / "resnet.yaml").read_text() == "mine"
    answer = tuner("init", "--example", "resnte")
    assert (
        answer.code == 2 and "no example is called 'resnte'; did you mean 'resnet'?" in answer.err
    )
    answer = tuner("init", "--example", "resnet", "-o", "other.yaml")
    assert answer.code == 0 and "tuner check other.yaml" in answer.out
    assert "tuner run other.yaml" in (tmp_path / "other.yaml").read_text()
    answer = tuner("init", "resnet")
    assert answer.code == 2 and "`tuner init --example resnet`" in answer.err


@pytest.mark.slow
def test_the_installed_wheel_works_in_a_fresh_environment_outside_the_clone(
    wheel: Path, tmp_path: Path
) -> None:
    """The packages that tuner needs come from this environment, tuner itself from the wheel alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    needed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "needed.pth").write_text("".join(f"{path}\n" for path in needed))
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "TUNER_HOME": str(tmp_path / "home"),
    }

    def tuner(*words: str) -> str:
        command = [tmp_path / "venv/bin/tuner", *words]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    where = [python, "-c", "import tuner; print(tuner.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert Path(found.stdout.decode().strip()).is_relative_to(tmp_path / "venv")
    tuner("init", "--example", "resnet")
    assert tuner("check", "resnet.yaml").startswith("ok: ")
    small = ["search.trials=2", "recipe.epochs=1", "recipe.freeze_depth=4", "data.limit=100"]
    tuner("run", "resnet.yaml", *small, "search.compare=none", "export=[safetensors]")
    assert (tmp_path / "studies/resnet/export/model.safetensors").exists()
    listed = tuner("init")
    assert all(f"{name} " in listed for name in names())
