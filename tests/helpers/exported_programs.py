"""The programs in the README of an export, and how they run where tuner cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

MAX_LINES = 10
# each argument is a program, which begins with nothing but Python
WITHOUT_TUNER = (
    "import sys; sys.modules['tuner'] = None\nfor program in sys.argv[1:]: exec(program, {})"
)


def programs(export: Path) -> dict[str, str]:
    """The program of each format, none of which is longer than ten lines."""
    found = re.findall(
        r"## (\w+)\n\n```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL
    )
    for name, program in found:
        lines = [line for line in program.splitlines() if line]
        assert len(lines) <= MAX_LINES, f"{name}: {len(lines)} lines"
    return dict(found)


def run_programs(export: Path, *names: str) -> list[str]:
    """What the programs of these formats print, a line each. They read `image.jpg` in the export."""
    written = programs(export)
    ended = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_TUNER, *(written[name] for name in names)],
        cwd=export,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()
