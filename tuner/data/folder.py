"""Your own images: a folder with one folder per class, or with train/, valid/ and test/.

Each of train/, valid/ and test/ holds one folder per class. valid/ and test/ may be absent.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tuner.config.data_options import ImageFileOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, limit_listing
from tuner.preprocessing.data_paths import resolve_folder
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.image_files import warn_about_unread_files
from tuner.preprocessing.splits import (
    TRAIN,
    UNSPLIT,
    Items,
    group_by_split,
    require_one_per_split,
)

TASKS = ("classification",)
MAX_CLASSES_LISTED = 20  # class names in a message
FolderIdentity = tuple[int, int]
"""Device and inode of a folder: the same by whatever path the folder is reached."""
ImagesByClass = dict[str, list[Path]]


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the folder that holds one folder per class, "
            "or train/, valid/ and test/ with one folder per class each"
        ),
    ],
    image: ImageFileOptions,
) -> Dataset:
    """Load images from one folder per class.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `classification`.
        path: the folder that holds one folder per class, or one folder per split with these.
        image: the image keys of the `data:` section.

    Raises:
        DataError: folders are missing, unreadable or empty, or splits have different classes.
    """
    root = resolve_folder(path, "a folder with one folder of images per class", home)
    loops: list[str] = []
    try:
        folders = _find_split_folders(root, path)
        images = {split: _images_by_class(folder, loops) for split, folder in folders.items()}
    except OSError as error:
        raise DataError(
            f"data.path: {error.filename}: {error.strerror}; mend or remove it"
        ) from None
    _check_same_classes(folders, images)
    warnings = [
        f"data.path: {loop} links to itself, or to a folder that is read anyway; left out"
        for loop in loops
    ]
    class_folders = {folder / name for split, folder in folders.items() for name in images[split]}
    warnings += warn_about_unread_files(class_folders)
    return classification_dataset(home, _make_items(images), image, input_spec, warnings)


def _make_items(images: dict[int, ImagesByClass]) -> Items:
    """The images of all splits as items; the classes are in the order of their names."""
    classes = tuple(sorted(next(iter(images.values()))))
    paths: list[Path] = []
    labels: list[int] = []
    splits: list[int] = []
    for split, images_by_class in images.items():
        for label, name in enumerate(classes):
            paths += images_by_class[name]
            labels += [label] * len(images_by_class[name])
            splits += [split] * len(images_by_class[name])
    return Items(paths, np.array(labels, np.int64), classes, np.array(splits, np.int64))


def _find_split_folders(root: Path, path: str) -> dict[int, Path]:
    """The folder of each split; UNSPLIT alone where the folders in `root` are classes."""
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"data.path: {path} cannot be read (permission denied)")
    folders = _visible_folders(root, [])
    groups = group_by_split(folders)
    only_splits = bool(folders) and sum(map(len, groups.values())) == len(folders)
    if TRAIN not in groups and only_splits:
        raise DataError(f"data.path: {path} has {', '.join(p.name for p in folders)}, but no train")
    # 'train' may also be a class, beside 'bus' and 'car': then images lie directly in it
    if TRAIN not in groups or not (only_splits or _visible_folders(groups[TRAIN][0], [])):
        return {UNSPLIT: root}
    return require_one_per_split(groups, path)


def _visible_folders(folder: Path, loops: list[str]) -> list[Path]:
    """The visible folders in a folder, by name; endless links are added to `loops`.

    Raises:
        OSError: a link leads nowhere.
    """
    folders = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_symlink() and _is_endless_link(child):
            loops.append(str(child))
        elif child.is_dir():
            folders.append(child)
        elif child.is_symlink() and not child.suffix:  # meant to be a class
            child.stat()
    return folders


def _is_endless_link(link: Path) -> bool:
    """Whether a link leads to itself, also through other links, or to a folder that it lies in."""
    try:
        return link.parent.resolve().is_relative_to(link.resolve(strict=True))
    except RuntimeError:  # what pathlib raises for ELOOP
        return True
    except OSError as error:
        return error.errno == errno.ELOOP


def _images_by_class(folder: Path, loops: list[str]) -> ImagesByClass:
    """The images of each class, in a fixed order; endless links are added to `loops`.

    Raises:
        DataError: there are no classes, or classes without images.
    """
    images: ImagesByClass = {}
    for child in _visible_folders(folder, loops):
        try:
            child.name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"data.path: {os.fsencode(child)!r}: a class's name must be valid UTF-8; "
                "rename the folder"
            ) from None
        visited = {_folder_identity(folder), _folder_identity(child)}
        images[child.name] = list(_images_below(child, visited, loops))
    if not images:
        loose = sum(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
        hint = f"; {loose} images lie directly in it" if loose else ""
        raise DataError(
            f"data.path: {folder} has no class folders{hint}; "
            "put each class's images into a folder of its own"
        )
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(
            *warn_about_unread_files(folder / name for name in empty),
            f"data.path: {folder}: classes with 0 images: {', '.join(map(repr, empty))}; "
            f"add images ({kinds}) or remove the folders",
        )
    return images


def _folder_identity(folder: Path) -> FolderIdentity:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _images_below(folder: Path, visited: set[FolderIdentity], loops: list[str]) -> Iterator[Path]:
    """The images below a folder, in a fixed order.

    Links are followed, but no folder is read twice: `visited` grows, and endless links are added
    to `loops`.
    """
    with os.scandir(folder) as entries:  # which knows the kind of each without a system call
        children = sorted(entries, key=lambda entry: entry.name)
    for child in children:
        if child.name.startswith("."):
            continue
        if child.is_symlink() and _is_endless_link(Path(child.path)):
            loops.append(child.path)
        elif child.is_dir():
            inner = Path(child.path)
            if _folder_identity(inner) in visited:
                loops.append(child.path)
            else:
                visited.add(_folder_identity(inner))
                yield from _images_below(inner, visited, loops)
        elif os.path.splitext(child.name)[1].lower() in SUFFIXES:
            yield Path(child.path)


def _check_same_classes(folders: dict[int, Path], images: dict[int, ImagesByClass]) -> None:
    """Raise DataError with the classes of both splits if two splits have different classes."""
    first, *others = images
    expected = set(images[first])
    first_name = folders[first].name
    for split in others:
        classes = set(images[split])
        name = folders[split].name
        if classes != expected:
            raise DataError(
                f"data.path: {first_name} and {name} have different classes: "
                f"{first_name} has {_format_names(expected)}; {name} has {_format_names(classes)} "
                f"(only in {first_name}: {_format_names(expected - classes)}; "
                f"only in {name}: {_format_names(classes - expected)})"
            )


def _format_names(names: set[str]) -> str:
    listed = limit_listing([repr(name) for name in sorted(names)], MAX_CLASSES_LISTED)
    return ", ".join(listed) or "none"
