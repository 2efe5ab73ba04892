"""Files with the test of a run, as the coordinator, which has no torch, sees them.

A run is tested once. So what its test gave is kept: the winner's in its export, the default
recipe's in the study's folder, under a name that vouches for the content.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.files.atomic import atomic_path
from tuner.files.crash_points import crash_point
from tuner.files.removal import TESTED_RUN

FIELDS_KEY = "tested_run"  # of the metadata


def read_fields(content: bytes) -> dict[str, Any]:
    """What a file with a test says beside its tensors: the header of a safetensors file has it."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    fields: dict[str, Any] = json.loads(header["__metadata__"][FIELDS_KEY])
    return fields


def keep_tested_run(folder: Path, content: bytes) -> None:
    """Writes the test of a run into a study's folder, once. Raises StorageError."""
    path = folder / f"default-test-{hashlib.sha256(content).hexdigest()}.safetensors"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        crash_point("default.tested")


def find_tested_run(folder: Path, wanted: Mapping[str, Any], *others: Path) -> bytes | None:
    """The kept test with these fields, in a study's folder or in one of the other files.

    `wanted` are the run's digest, and the temperature and the flips with which it is tested: an
    earlier version had neither. None where there is no such test, or its file is damaged.
    """
    kept = [path.read_bytes() for path in sorted(folder.glob("default-test-*")) if is_intact(path)]
    contents = [*kept, *(path.read_bytes() for path in others if path.is_file())]
    earlier = {"temperature": None, "test_flips": False}
    return next((c for c in contents if wanted.items() <= (earlier | read_fields(c)).items()), None)


def is_intact(path: Path) -> bool:
    """Whether a file has the content that its name vouches for."""
    match = TESTED_RUN.fullmatch(path.name)
    return match is not None and hashlib.sha256(path.read_bytes()).hexdigest() == match[1]
