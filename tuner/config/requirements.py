"""How to install what an optional part of tuner needs."""

import contextlib
import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "tuner-finetune"
EXTRA = re.compile(r"""(?P<requirement>[^;]+?)\s*;\s*extra == ["'](?P<extra>[\w-]+)["']""")


def pip_install(extra: str) -> str:
    """The command that installs what `[extra]` needs, package by package.

    `pip install tuner-finetune[extra]` would ask an index for tuner itself, and it is on none.
    """
    return f"pip install {' '.join(map(shlex.quote, needed(extra)))}"


def needed(extra: str) -> list[str]:
    """From the installed package, or from pyproject.toml where tuner runs in its clone without
    being installed, or was installed from there before there was such an extra.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        stated = metadata.requires(DISTRIBUTION) or []
        matches = [match for match in map(EXTRA.fullmatch, stated) if match]
        found = [match["requirement"] for match in matches if match["extra"] == extra]
        if found:
            return found
    project = Path(__file__).parents[2] / "pyproject.toml"
    content = tomllib.loads(project.read_text(encoding="utf-8"))
    return list(content["project"]["optional-dependencies"][extra])
