"""A search goes on when nobody reads what it prints; on Windows nothing begins."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner.commands.console import Console

WINDOWS = """
import sys
import typer
sys.platform = "win32"
sys.modules["fcntl"] = None  # as there
from tuner.cli import main
sys.argv = ["tuner", "run", "small.yaml"]
main()
"""


def test_a_search_goes_on_when_nobody_reads_its_lines(
    tuner: Callable[..., Any], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        words = ["search.trials=1", "search.retrain=false", "data.examples=30", "recipe.epochs=1"]
        assert tuner("run", small, *words).code == 0
        console = Console("json")
        console.note("a second command")
        console.warn("with the stream as it is left")
    assert (small.parent / "studies/small/export/manifest.json").is_file()


def test_on_windows_one_sentence_says_where_it_runs() -> None:
    process = subprocess.run(
        [sys.executable, "-c", WINDOWS], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr.startswith("tuner: error: tuner runs on Linux and macOS; on Windows use")
    assert len(process.stderr.splitlines()) == 1 and process.stdout == ""
