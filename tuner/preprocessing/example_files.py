"""The examples that a person names: paths, folders and globs of images; texts, and files of them.

A folder may hold millions of files, so they are given one after another and never listed at once.
"""

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tuner.errors import DataError, nearest_hint
from tuner.preprocessing.image_decoding import SUFFIXES

SORTED_ENTRIES = 10_000  # of a folder; one with more is read in the order of the disk


def find_images(patterns: Sequence[str]) -> Iterator[Path]:
    """The images that paths, folders and globs name, in order, each once.

    Every pattern is looked at before the first image is given.

    Raises:
        DataError: A pattern names no image.
    """
    sources = [_images_of(pattern) for pattern in patterns]
    return _each_once(patterns, sources)


def _each_once(patterns: Sequence[str], sources: Sequence[Iterator[Path]]) -> Iterator[Path]:
    """Remembers the folders and the files that were named, not the files in the folders."""
    folders: set[Path] = set()
    files: set[Path] = set()
    for pattern, source in zip(patterns, sources, strict=True):
        is_folder = os.path.isdir(pattern)
        for path in source:
            if path in files or not folders.isdisjoint(path.parents):
                continue
            if not is_folder:
                files.add(path)
            yield path
        if is_folder:
            folders.add(Path(pattern))


def _images_of(pattern: str) -> Iterator[Path]:
    """The images of one pattern, of which there is at least one. Raises DataError."""
    path = Path(pattern)
    # an existing path is no glob, because its name may contain glob characters
    if os.path.lexists(path):
        matches = walk_images(path) if path.is_dir() else iter([path])
    else:
        matches = _images_of_glob(pattern)
    first = next(matches, None)
    if first is None:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        siblings = [name for name in siblings if name != path.name]  # a folder without images
        raise DataError(f"{pattern}: no image there{nearest_hint(path.name, siblings)}")
    return itertools.chain([first], matches)


def _images_of_glob(pattern: str) -> Iterator[Path]:
    """The images that a glob matches, and those in folders that it matches; all files where none is
    an image.
    """
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if not path.is_dir()]
    images = [path for path in files if is_image(path.name)]
    below = (walk_images(path) for path in paths if path.is_dir())
    matches = itertools.chain(images, itertools.chain.from_iterable(below))
    first = next(matches, None)
    return iter(files) if first is None else itertools.chain([first], matches)


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def walk_images(folder: Path) -> Iterator[Path]:
    """The images in a folder and below, sorted; links to folders are not followed.

    Folders with more than SORTED_ENTRIES entries are given as the disk lists them.
    """
    for path, is_folder in _entries(folder):
        if is_folder:
            yield from walk_images(path)
        elif is_image(path.name):
            yield path


def _entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Each entry of a folder, and whether it is a folder itself."""
    with os.scandir(folder) as entries:
        first = list(itertools.islice(entries, SORTED_ENTRIES))
        if len(first) < SORTED_ENTRIES:
            first.sort(key=lambda entry: entry.name)
        for entry in itertools.chain(first, entries):
            is_folder = entry.is_dir(follow_symlinks=False)
            # os.path.isdir says no of a link that leads nowhere or to itself
            if is_folder or not (entry.is_symlink() and os.path.isdir(entry.path)):
                yield Path(entry.path), is_folder


def read_texts(examples: Iterable[str]) -> Iterator[str]:
    """The texts: each example is a text, or a file with one text a line.

    Raises DataError on a file that is no text.
    """
    for example in examples:
        if not os.path.isfile(example):
            yield example
            continue
        try:
            with open(example, encoding="utf-8") as file:
                for line in file:
                    if line.strip():
                        yield line.rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(
                f"{example}: not a text file in UTF-8; give a file with one text a line, or the "
                "text itself"
            ) from None
