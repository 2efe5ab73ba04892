"""Your own images: a folder with one folder per class, or with train/ (and valid/, test/) that hold one folder per class."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tuner.config.run import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, nearest_hint
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID, Items

TASKS = ("classification",)

SPLIT_FOLDERS = {"train": TRAIN, "valid": VALID, "val": VALID, "validation": VALID, "test": TEST}
FolderIdentity = tuple[int, int]  # of a folder, however it is reached: device and inode
ImagesByClass = dict[str, list[Path]]


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the folder that holds one folder per class, or train/, valid/ and test/ with one folder per class each"
        ),
    ],
    image: ImageOptions,
) -> Dataset:
    root = Path(path).expanduser()
    loops: list[str] = []
    try:
        parts = _find_split_folders(root, path)
        listed = {part: _images_by_class(folder, loops) for part, folder in parts.items()}
    except OSError as error:
        raise DataError(
            f"data.path: {error.filename}: {error.strerror}; mend or remove it"
        ) from None
    classes = sorted(next(iter(listed.values())))
    _check_same_classes(parts, listed)
    pictures, labels, part_of = [], [], []
    for part, found in listed.items():
        for label, name in enumerate(classes):
            pictures += found[name]
            labels += [label] * len(found[name])
            part_of += [part] * len(found[name])
    part_array = np.array(part_of, np.int64)
    if TRAIN in parts and {VALID, TEST} - set(
        parts
    ):  # what is missing is taken from the training images
        part_array[part_array == TRAIN] = UNSPLIT
    warnings = [
        f"data.path: {loop} links to itself, or to a folder that is read anyway; left out"
        for loop in loops
    ]
    return classification_dataset(
        home,
        Items(pictures, np.array(labels, np.int64), tuple(classes), part_array),
        image,
        input_spec,
        warnings,
    )


def _find_split_folders(root: Path, path: str) -> dict[int, Path]:
    """Which folder holds which part; one that has none of their names is split by us."""
    if not root.exists():
        beside = (
            [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        )
        raise DataError(
            f"data.path: {path} does not exist (looked in {Path.cwd()}){nearest_hint(root.name, beside)}"
        )
    if not root.is_dir():
        raise DataError(
            f"data.path: {path} is a file; expected a folder with one folder of images per class"
        )
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"data.path: {path} cannot be read (permission denied)")
    named: dict[int, list[Path]] = {}
    folders = _visible_folders(root, [])
    for folder in folders:
        if folder.name.lower() in SPLIT_FOLDERS:
            named.setdefault(SPLIT_FOLDERS[folder.name.lower()], []).append(folder)
    only_parts = bool(folders) and sum(map(len, named.values())) == len(folders)
    if TRAIN not in named and only_parts:
        raise DataError(f"data.path: {path} has {', '.join(p.name for p in folders)}, but no train")
    # 'train' may also be a class, beside 'bus' and 'car': then images lie directly in it
    if TRAIN not in named or not (only_parts or _visible_folders(named[TRAIN][0], [])):
        return {UNSPLIT: root}
    for twins in named.values():
        if len(twins) > 1:
            raise DataError(
                f"data.path: {path} has {' and '.join(p.name for p in twins)}, which mean the same part; keep one"
            )
    return {part: named[part][0] for part in sorted(named)}


def _visible_folders(folder: Path, loops: list[str]) -> list[Path]:
    """The visible folders in it, by name. Raises OSError on a link that leads nowhere."""
    found = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_symlink() and _is_endless_link(child):
            loops.append(str(child))
        elif child.is_dir():
            found.append(child)
        elif child.is_symlink() and not child.suffix:  # meant to be a class
            child.stat()
    return found


def _is_endless_link(link: Path) -> bool:
    """A link that leads to itself, by however many others, or to a folder that it lies in."""
    try:
        return link.parent.resolve().is_relative_to(link.resolve(strict=True))
    except RuntimeError:  # how pathlib says ELOOP
        return True
    except OSError as error:
        return error.errno == errno.ELOOP


def _images_by_class(folder: Path, loops: list[str]) -> ImagesByClass:
    """Class name -> its images, in a fixed order. Raises DataError on empty classes; endless links go to `loops`."""
    found: ImagesByClass = {}
    for child in _visible_folders(folder, loops):
        try:
            child.name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"data.path: {os.fsencode(child)!r}: a class's name must be valid UTF-8; rename the folder"
            ) from None
        found[child.name] = list(
            _images_below(child, {_folder_identity(folder), _folder_identity(child)}, loops)
        )
    if not found:
        loose = sum(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
        beside = f"; {loose} images lie directly in it" if loose else ""
        raise DataError(
            f"data.path: {folder} has no class folders{beside}; put each class's images into a folder of its own"
        )
    empty = [name for name, images in found.items() if not images]
    if empty:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(
            f"data.path: {folder}: classes with 0 images: {', '.join(map(repr, empty))}; add images ({kinds}) or remove the folders"
        )
    return found


def _folder_identity(folder: Path) -> FolderIdentity:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _images_below(folder: Path, seen: set[FolderIdentity], loops: list[str]) -> Iterator[Path]:
    """The images in a folder and in the folders in it, in a fixed order; links are followed, but no folder twice."""
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_symlink() and _is_endless_link(child):
            loops.append(str(child))
        elif child.is_dir():
            if _folder_identity(child) in seen:
                loops.append(str(child))
            else:
                seen.add(_folder_identity(child))
                yield from _images_below(child, seen, loops)
        elif child.suffix.lower() in SUFFIXES:
            yield child


def _check_same_classes(parts: dict[int, Path], listed: dict[int, ImagesByClass]) -> None:
    """Raises DataError with both sets of names when two parts differ."""
    first, *others = listed
    for other in others:
        a, b = (sorted(listed[part]) for part in (first, other))
        if a != b:
            one, two = parts[first].name, parts[other].name
            raise DataError(
                f"data.path: {one} and {two} have different classes: {one} has {_format_names(a)}; {two} has {_format_names(b)} "
                f"(only in {one}: {_format_names(sorted(set(a) - set(b)))}; only in {two}: {_format_names(sorted(set(b) - set(a)))})"
            )


def _format_names(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(repr, names[:20])) + more if names else "none"
