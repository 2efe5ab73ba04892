"""The programs in the README of an export, and how they run where tuner cannot be imported."""

import re
from pathlib import Path

# each argument is a program, which begins with nothing but Python
WITHOUT_TUNER = (
    "import sys; sys.modules['tuner'] = None\nfor program in sys.argv[1:]: exec(program, {})"
)


def programs(export: Path) -> dict[str, str]:
    """The program of each format."""
    found = re.findall(
        r"## (\w+)\n\n```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL
    )
    return dict(found)
