"""YOLO's text files: one an image, a line an object: class, centre x, centre y, width, height, in shares of the image's sides.

The layout is that of Ultralytics and Darknet: data.yaml names classes and parts, or classes.txt the classes; labels/ lies beside images/.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from tuner.config.run import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, nearest_hint
from tuner.preprocessing.detection_dataset import (
    AnnotatedImage,
    Box,
    check_relative_name,
    detection_dataset,
    limit_listing,
    unsplit_incomplete,
)
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID

TASKS = ("detection",)
SPLIT_FOLDERS = {"train": TRAIN, "val": VALID, "valid": VALID, "test": TEST}
CLASS_LISTS = ("classes.txt", "obj.names", "labels/classes.txt")
MAX_TEXT_BYTES, MAX_YAML_BYTES = 10_000_000, 200_000  # bytes of one text file, and of data.yaml


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str, Field(description="data.yaml, or the folder that holds it or images/ and labels/")
    ],
    image: ImageOptions,
) -> Dataset:
    """`path`: a data.yaml, or a folder that holds one, or classes.txt beside images/ and labels/."""
    root = Path(path).expanduser()
    if not root.exists():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"data.path: {path} does not exist (looked in {Path.cwd()}){nearest_hint(root.name, beside)}"
        )
    described = (
        root
        if root.is_file()
        else next(
            (root / name for name in ("data.yaml", "data.yml") if (root / name).is_file()), None
        )
    )
    if described is not None:
        classes, pictures = _read_data_yaml(described)
    else:
        file = next((root / name for name in CLASS_LISTS if (root / name).is_file()), None)
        if file is None:
            raise DataError(
                f"data.path: {path} has neither data.yaml nor {CLASS_LISTS[0]}, which name the classes"
            )
        classes = [line.strip() for line in _read_text(file).splitlines() if line.strip()]
        pictures = [
            (picture, UNSPLIT)
            for picture in _images_below(root / "images" if (root / "images").is_dir() else root)
        ]
    wrong: list[str] = []
    found = [_annotated_image(picture, part, classes, wrong) for picture, part in pictures]
    if wrong:
        raise DataError(
            *limit_listing(wrong), f"data: {len(wrong)} lines are wrong; mend or remove them"
        )
    return detection_dataset(home, found, classes, image, input_spec)


class _NoAliasLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which can make a small file large."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are refused")
        return super().compose_node(parent, index)


def _read_data_yaml(file: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Classes, and images with their parts, as a data.yaml has them. Raises DataError."""
    if file.stat().st_size > MAX_YAML_BYTES:
        raise DataError(
            f"{file}: {file.stat().st_size:,} bytes, more than {MAX_YAML_BYTES:,}; it names classes and folders"
        )
    try:
        tree = yaml.load(_read_text(file), Loader=_NoAliasLoader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # PyYAML builds numbers and nests as deep as it is told
        raise DataError(
            f"{file}: not YAML that names classes and folders ({' '.join(str(error).split())[:300]})"
        ) from None
    names = tree.get("names") if isinstance(tree, dict) else None
    if isinstance(names, dict):
        if set(names) != set(range(len(names))) or not all(type(number) is int for number in names):
            raise DataError(
                f"{file}: names: expected the numbers 0 to {len(names) - 1}, got {', '.join(map(str, list(names)[:20]))}"
            )
        names = [names[i] for i in range(len(names))]
    if (
        not isinstance(tree, dict)
        or not isinstance(names, list)
        or not names
        or not all(isinstance(n, (str, int, float)) for n in names)
    ):
        raise DataError(f"{file}: expected a mapping with names, the list of classes")
    base = file.parent / (tree["path"] if isinstance(tree.get("path"), str) else ".")
    base = base if os.path.isdir(base) else file.parent  # files travel, and their path stays behind
    found: list[tuple[Path, int]] = []
    for key, part in SPLIT_FOLDERS.items():
        places = tree.get(key)
        for place in places if isinstance(places, list) else [places] if places else []:
            if not isinstance(place, str):
                raise DataError(
                    f"{file}: {key}: expected folders or lists of images, got {type(place).__name__}"
                )
            found += [
                (picture, part) for picture in _list_images(base, str(place), f"{file}: {key}")
            ]
    if not any(part == TRAIN for _, part in found):
        raise DataError(f"{file}: train: needs a folder or a list of images")
    return list(map(str, names)), list(
        zip(
            [picture for picture, _ in found],
            unsplit_incomplete([part for _, part in found]),
            strict=True,
        )
    )


def _list_images(base: Path, place: str, where: str) -> list[Path]:
    """The images that a folder holds or a text file lists."""
    path = next(
        (p for p in (base / place, base / place.removeprefix("../")) if os.path.exists(p)), None
    )
    if path is None:
        raise DataError(f"{where}: {base / place} does not exist")
    if path.is_dir():
        return list(_images_below(path))
    return [
        _check_name(base, line.strip(), f"{path}:{number}")
        for number, line in enumerate(_read_text(path).splitlines(), 1)
        if line.strip()
    ]


def _check_name(base: Path, name: str, where: str) -> Path:
    """An image that a list names; an absolute name must lead into the folder too, as Darknet writes them."""
    return base / check_relative_name(name.removeprefix(f"{base.absolute()}/"), where)


def _images_below(folder: Path) -> Iterator[Path]:
    return (
        p
        for p in sorted(folder.rglob("*"))
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def _annotated_image(
    picture: Path, part: int, classes: list[str], wrong: list[str]
) -> AnnotatedImage:
    """An image with what its text file says; without one it has no objects. What cannot be read goes to `wrong`."""
    parts = list(picture.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    beside = [Path(*parts).with_suffix(".txt"), picture.with_suffix(".txt")]
    file = next((path for path in beside if path.is_file()), None)
    rows: list[tuple[Box, int, str]] = []
    for number, line in enumerate(_read_text(file).splitlines() if file else (), 1):
        if line.strip():
            found = _parse_row(line, classes)
            if isinstance(found, str):
                wrong.append(f"{file}:{number}: {found}")
            else:
                rows.append((*found, f"{file}:{number}"))
    boxes, labels, places = zip(*rows, strict=True) if rows else ((), (), ())
    return AnnotatedImage(picture, boxes, labels, places, part, is_relative=True)


def _parse_row(line: str, classes: list[str]) -> tuple[Box, int] | str:
    """An object's box and label, or what is wrong with its line."""
    words = line.split()
    if len(words) != 5:
        return f"expected class, centre x, centre y, width, height; got {len(words)} values"
    try:
        x, y, width, height = map(float, words[1:])
    except ValueError:
        return f"expected four numbers after the class, got {' '.join(words[1:])[:100]!r}"
    if not words[0].isdecimal() or len(words[0]) > 9 or int(words[0]) >= len(classes):
        return f"class {words[0][:100]!r}, but there are {len(classes)} classes, 0 to {len(classes) - 1}"
    if max(x, y, width, height) > 1.5:
        return f"box {' '.join(words[1:])}: these are pixels; expected shares of the image's sides, 0 to 1"
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2), int(words[0])


def _read_text(file: Path) -> str:
    """Raises DataError on what is no text."""
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(f"{file}: {file.stat().st_size:,} bytes, more than {MAX_TEXT_BYTES:,}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text file in UTF-8") from None
