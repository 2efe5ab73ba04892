"""Print which dependencies with an upper bound in pyproject.toml have a release beyond it. Always ends with 0.

    python scripts/newer_versions.py

To raise a bound: install the release, run .ci/run, then change pyproject.toml and constraints.txt.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
SECONDS = 60  # for the answer to one question


def bounded(pyproject: Path) -> Iterator[Requirement]:
    """The dependencies, optional ones too, that state an upper bound."""
    project = tomllib.loads(pyproject.read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = [line for each in lists for line in each]
    for requirement in map(Requirement, dict.fromkeys(lines)):
        if any(bound.operator in ("<", "<=", "==", "~=") for bound in requirement.specifier):
            yield requirement


def newest_release(name: str) -> Version | None:
    """The newest release that pip can install here; None where pip cannot tell."""
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None
    first_line = re.match(r"\S+ \((\S+)\)", run.stdout)
    return Version(first_line[1]) if first_line else None


def report(requirement: Requirement, newest: Version | None) -> str:
    if newest is None:
        return f"{requirement}: pip could not tell the newest release"
    if requirement.specifier.contains(newest, prereleases=True):
        return f"{requirement}: up to date, {newest} is the newest release"
    return f"{requirement}: NEWER: {newest}; test it, then raise the bound in pyproject.toml"


def main() -> None:
    for requirement in bounded(PYPROJECT):
        print(report(requirement, newest_release(requirement.name)), flush=True)


if __name__ == "__main__":
    main()
