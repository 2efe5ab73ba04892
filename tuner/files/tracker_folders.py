"""The folders that tuner makes for trackers, and the mark by which it knows them again."""

import contextlib
from pathlib import Path

MARK = ".tuner"  # the file's name
HEADER = "tuner made this folder for a tracker"  # how it begins


def make_tracker_folder(folder: Path) -> None:
    """Makes the folder of a tracker with a mark; one that is there already stays as it is."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
        (folder / MARK).write_text(f"{HEADER}; `tuner clean STUDY --all` removes it\n")


def is_tracker_folder(folder: Path) -> bool:
    """Whether tuner made this folder for a tracker. Then whatever is in it is the tracker's."""
    try:
        return (folder / MARK).read_text(errors="replace").startswith(HEADER)
    except OSError:
        return False
