"""Your own images: a folder with one folder per class, or with train/ (and valid/, test/) that hold one folder per class."""

import os
from pathlib import Path

import numpy as np

from tuner.core import Data, Preprocess
from tuner.errors import DataError, nearest
from tuner.images import TEST, TRAIN, UNSPLIT, VALID, Items, dataset
from tuner.run import ImageOptions

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
PARTS = {"train": TRAIN, "valid": VALID, "val": VALID, "validation": VALID, "test": TEST}


def load(home: Path, wanted: Preprocess, *, path: str, image: ImageOptions) -> Data:
    root = Path(path).expanduser()
    parts = _parts(root, path)
    listed = {part: _classes(folder) for part, folder in parts.items()}
    classes = sorted(next(iter(listed.values())))
    _same_classes(parts, listed)
    pictures, labels, part_of = [], [], []
    for part, found in listed.items():
        for label, name in enumerate(classes):
            pictures += found[name]
            labels += [label] * len(found[name])
            part_of += [part] * len(found[name])
    part_array = np.array(part_of, np.int64)
    missing = {VALID, TEST} - set(parts)
    if TRAIN in parts and missing:  # what is missing is taken from the training images
        part_array[part_array == TRAIN] = UNSPLIT
    return dataset(home, Items(pictures, np.array(labels, np.int64), tuple(classes), part_array), image, wanted)


def _parts(root: Path, path: str) -> dict[int, Path]:
    """Which folder holds which part; one that has none of their names is split by us."""
    if not root.exists():
        beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise DataError(f"data.path: {path} does not exist (looked in {Path.cwd()}){nearest(root.name, beside)}")
    if not root.is_dir():
        raise DataError(f"data.path: {path} is a file; expected a folder with one folder of images per class")
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"data.path: {path} cannot be read (permission denied)")
    found = {PARTS[p.name.lower()]: p for p in sorted(root.iterdir()) if p.name.lower() in PARTS and p.is_dir()}
    return found if TRAIN in found else {UNSPLIT: root}


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its images, in a fixed order. Raises DataError on empty classes and endless links."""
    found: dict[str, list[Path]] = {}
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        try:
            if child.is_dir():
                found[child.name] = _images(child)
            elif child.is_symlink() and not child.exists():
                child.stat()
        except OSError as error:
            raise DataError(f"data.path: {child}: {error.strerror}; remove the link or mend it") from None
    if not found:
        loose = sum(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
        beside = f"; {loose} images lie directly in it" if loose else ""
        raise DataError(f"data.path: {folder} has no class folders{beside}; put each class's images into a folder of its own")
    empty = [name for name, images in found.items() if not images]
    if empty:
        raise DataError(f"data.path: {folder}: classes with 0 images: {', '.join(map(repr, empty))}; add images or remove the folders")
    return found


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def _same_classes(parts: dict[int, Path], listed: dict[int, dict[str, list[Path]]]) -> None:
    first, *others = listed
    for other in others:
        if set(listed[first]) != set(listed[other]):
            here, there = (sorted(set(listed[a]) - set(listed[b])) for a, b in ((first, other), (other, first)))
            raise DataError(
                f"data.path: {parts[first].name} and {parts[other].name} have different classes: "
                f"only in {parts[first].name}: {here or 'none'}; only in {parts[other].name}: {there or 'none'}"
            )
