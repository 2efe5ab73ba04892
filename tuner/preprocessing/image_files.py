"""Warns about files that lie among images and are not read, because of their ending."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tuner.errors import limit_listing
from tuner.preprocessing.image_decoding import SUFFIXES

# endings of what lies beside images on purpose: annotations, lists, notes, caches, programs
COMPANION_SUFFIXES = {
    *(".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".names", ".cache"),
    *(".md", ".rst", ".html", ".pdf", ".log", ".db", ".ini", ".cfg", ".py", ".ipynb"),
}
KNOWN_SUFFIXES = SUFFIXES | COMPANION_SUFFIXES
MAX_ENDINGS_LISTED = 10


def warn_about_unread_files(folders: Iterable[Path]) -> list[str]:
    """A warning if files below folders of images have endings of which no image is read.

    Hidden files and annotations are not meant. Linked folders below the folders are not visited.

    Args:
        folders: folders with images; one may lie in another.

    Returns:
        One line with the number of files of each ending, or none.
    """
    unread = _list_unread_files(folders)
    if not unread:
        return []
    counts = Counter(path.suffix.lower() or "without an ending" for path in unread)
    frequent_first = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    endings = [f"{count} {ending}" for ending, count in frequent_first]
    verb = "files are" if len(unread) > 1 else "file is"
    return [
        f"data: {len(unread)} {verb} left out, since no image is read by this ending: "
        f"{', '.join(limit_listing(endings, MAX_ENDINGS_LISTED))}; convert what is an image, "
        "such as to .png or .jpg"
    ]


def _list_unread_files(folders: Iterable[Path]) -> set[Path]:
    unread: set[Path] = set()
    for folder in folders:
        for parent, subfolders, names in os.walk(folder):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            unread |= {Path(parent, name) for name in names if _is_unread(name)}
    return unread


def _is_unread(name: str) -> bool:
    ending = os.path.splitext(name)[1].lower()
    return not name.startswith(".") and ending not in KNOWN_SUFFIXES
