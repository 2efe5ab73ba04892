"""With TUNER_TESTS_STRICT set, as .ci/run does in continuous integration, a missing program fails its tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tuner

ROOT = Path(tuner.__file__).parents[1]
TESTS = """
import pytest

def test_fixture():
    pytest.skip("chromium is not installed")

@pytest.mark.skipif(True, reason="PostgreSQL's server programs are not installed")
def test_marked(): ...

def test_machine():
    pytest.skip("this machine has a GPU")
"""


def outcomes(folder: Path, **environment: str) -> list[str]:
    """What pytest's last line counts."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest"]
    command += ["--rootdir", ".", "--continue-on-collection-errors"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return sorted(run.stdout.splitlines()[-1].partition(" in ")[0].split(", "))


@pytest.mark.slow
def test_a_missing_program_skips_its_tests_and_fails_them_where_strict(tmp_path: Path) -> None:
    (tmp_path / "test_lacking.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such')\n")
    assert outcomes(tmp_path, TUNER_TESTS_STRICT="") == ["4 skipped"]
    strict = outcomes(tmp_path, TUNER_TESTS_STRICT="1")
    assert strict == ["1 failed", "1 skipped", "2 errors"]
