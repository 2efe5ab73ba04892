"""Parameters that a person wants a search to try next, as files in the study's folder.

A command of its own writes them, so that the study's coordinator stays the only one who writes the
study. The coordinator takes each file up once.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any

from tuner.files import removal
from tuner.files.atomic import atomic_path


def write_enqueued(folder: Path, params: dict[str, Any]) -> Path:
    """Writes the parameters of one trial. Raises StorageError."""
    path = folder / f"enqueued-{time.time_ns():020d}-{secrets.token_hex(4)}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(params), encoding="utf-8")
    return path


def list_enqueued(folder: Path) -> list[Path]:
    """The files that wait, the oldest first."""
    return sorted(
        path for path in folder.glob("enqueued-*") if removal.ENQUEUED.fullmatch(path.name)
    )


def read_enqueued(path: Path) -> dict[str, Any] | None:
    """The parameters in a file; None where it is damaged."""
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return params if isinstance(params, dict) else None
