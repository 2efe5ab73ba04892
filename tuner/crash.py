"""Named places at which a process can be told to die, so that each can be tested: TUNER_CRASH_AT=file.renamed."""

import os

ENVIRONMENT = "TUNER_CRASH_AT"
POINTS = (
    "file.begun",  # the temporary file is there, empty
    "file.written",  # it is whole, perhaps only in memory
    "file.synced",  # it is on the disk, under its temporary name
    "file.renamed",  # it has its name
    "checkpoint.begun",  # the same of a checkpoint, which is not always synced
    "checkpoint.written",
    "checkpoint.synced",
    "checkpoint.renamed",
)


def crash(point: str) -> None:
    """Ends the process here, as SIGKILL would, where TUNER_CRASH_AT names this point (or, with `:n` behind it, at the nth passing)."""
    wanted, _, count = os.environ.get(ENVIRONMENT, "").partition(":")
    if wanted != point:
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] >= int(count or 1):
        os._exit(137)


_passed: dict[str, int] = {}
