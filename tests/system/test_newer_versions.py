"""The script that says which bounded dependencies have newer releases never fails, whatever pip answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tuner

ROOT = Path(tuner.__file__).parents[1]
BOUNDED = {"torch", "torchvision", "optuna", "optuna-dashboard", "transformers", "libreyolo", "ray"}
BOUNDED |= {"datasets", "mkdocs-material"}


@pytest.mark.parametrize(
    ("pip", "answer"),
    [
        ("import sys; print(f'{sys.argv[-1]} (99.1)\\nAvailable versions: 99.1')", "NEWER: 99.1"),
        ("import sys; sys.exit('ERROR: no network')", "could not tell"),
    ],
)
def test_every_bounded_dependency_is_answered_for(pip: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").touch()
    (tmp_path / "pip/__main__.py").write_text(pip)
    run = subprocess.run(
        [sys.executable, "scripts/newer_versions.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert {line.partition("<")[0] for line in lines} == BOUNDED
    assert all(answer in line for line in lines)
