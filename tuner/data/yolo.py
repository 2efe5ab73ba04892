"""YOLO's text files: one per image, one line per object.

A line holds class, centre x, centre y, width, height, in shares of the image's sides; or class and
the x and y of each corner of a polygon, which is the mask, and whose box is taken. Keypoints behind
a box, of which data.yaml says the number (kpt_shape), are left out. The layout is that of
Ultralytics and Darknet: data.yaml names classes and splits, or classes.txt names the classes;
labels/ lies beside images/.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field

from tuner.config.data_options import ImageFileOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, limit_listing
from tuner.preprocessing.data_paths import resolve_path
from tuner.preprocessing.detection_dataset import (
    AnnotatedImage,
    Box,
    check_relative_name,
    detection_dataset,
)
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.image_files import warn_about_unread_files
from tuner.preprocessing.instance_masks import Shape
from tuner.preprocessing.splits import SPLIT_BY_NAME, TRAIN, UNSPLIT

TASKS = ("detection", "instance_segmentation")
DESCRIPTIONS = ("data.yaml", "data.yml")
CLASS_LISTS = ("classes.txt", "obj.names", "labels/classes.txt")
BOX_WORDS = 5  # of a line: a class and four numbers
MIN_POLYGON_WORDS = 7  # of a line: a class and three corners
MAX_TEXT_BYTES = 10_000_000  # of one text file
MAX_YAML_BYTES = 200_000  # of data.yaml
SplitImages = list[tuple[Path, int]]  # images with their splits


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str, Field(description="data.yaml, or the folder that holds it or images/ and labels/")
    ],
    image: ImageFileOptions,
) -> Dataset:
    """Load images with boxes from YOLO's text files.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `detection` or `instance_segmentation`.
        path: a data.yaml, or a folder that holds one, or classes.txt beside images/ and labels/.
        image: the image keys of the `data:` section.

    Raises:
        DataError: files are missing, unreadable or wrong.
    """
    root = resolve_path(path, home)
    description = root if root.is_file() else _first_file(root, DESCRIPTIONS)
    keypoint_words = 0
    if description is not None:
        yaml_content = _read_data_yaml(description)
        classes, images = yaml_content.classes, _list_split_images(yaml_content)
        keypoint_words = yaml_content.keypoint_words
    else:
        classes, images = _list_unsplit_images(root, path)
    problems: list[str] = []
    annotated = []
    for image_path, split in images:
        annotated_image, line_problems = _annotate_image(image_path, split, classes, keypoint_words)
        annotated.append(annotated_image)
        problems += line_problems
    if problems:
        raise DataError(
            *limit_listing(problems), f"data: {len(problems)} lines are wrong; mend or remove them"
        )
    warnings = warn_about_unread_files({image_path.parent for image_path, _ in images})
    if keypoint_words:
        warnings = [*warnings, f"data: {description}: kpt_shape: keypoints are left out"]
    with_masks = task == "instance_segmentation"
    if with_masks:
        _check_polygons(annotated)
    return detection_dataset(
        home, annotated, classes, image, input_spec, warnings, with_masks=with_masks
    )


def _check_polygons(annotated: list[AnnotatedImage]) -> None:
    """Raise DataError where objects are boxes, which have no mask."""
    boxes = [
        f"{location}: a box, no polygon"
        for image in annotated
        for location, shape in zip(image.locations, image.shapes, strict=True)
        if not shape
    ]
    if boxes:
        raise DataError(
            *limit_listing(boxes),
            f"data: {len(boxes)} objects have no mask; write class and corners of a polygon, or "
            "use task: detection, which needs none",
        )


def _first_file(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _list_unsplit_images(root: Path, path: str) -> tuple[list[str], SplitImages]:
    """Classes and images of a folder without data.yaml."""
    file = _first_file(root, CLASS_LISTS)
    if file is None:
        raise DataError(
            f"data.path: {path} has neither {DESCRIPTIONS[0]} nor {CLASS_LISTS[0]}, "
            "which name the classes"
        )
    classes = [line.strip() for line in _read_text(file).splitlines() if line.strip()]
    images = _images_below(root / "images" if (root / "images").is_dir() else root)
    return classes, [(image, UNSPLIT) for image in images]


class _NoAliasLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which can make a small file large."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are refused")
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class DataYaml:
    """What a data.yaml says.

    Args:
        file: the data.yaml.
        base: the folder that the names in `splits` start from.
        classes: the names of the classes, in order.
        splits: folders of images, and text files that list images, by key, such as `train`.
        keypoint_words: the numbers of the keypoints behind each box; 0: there are none.
    """

    file: Path
    base: Path
    classes: list[str]
    splits: dict[str, list[str]]
    keypoint_words: int


def _read_data_yaml(file: Path) -> DataYaml:
    """Read and check a data.yaml. Raises DataError."""
    if file.stat().st_size > MAX_YAML_BYTES:
        raise DataError(
            f"{file}: {file.stat().st_size:,} bytes, more than {MAX_YAML_BYTES:,}; "
            "it names classes and folders"
        )
    # PyYAML raises ValueError for impossible numbers and dates, and nests without a limit
    try:
        content = yaml.load(_read_text(file), Loader=_NoAliasLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not YAML that names classes and folders "
            f"({' '.join(str(error).split())[:300]})"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a mapping with names, the list of classes")
    classes = _parse_class_names(content.get("names"), file)
    base = file.parent / (content["path"] if isinstance(content.get("path"), str) else ".")
    # a dataset is often copied to another folder, and `path` still names the old one
    base = base if os.path.isdir(base) else file.parent
    splits = {
        key: _parse_split(content[key], f"{file}: {key}")
        for key in SPLIT_BY_NAME
        if content.get(key)
    }
    return DataYaml(file, base, classes, splits, _count_keypoint_words(content, file))


def _count_keypoint_words(content: dict[Any, Any], file: Path) -> int:
    """The numbers of the keypoints of a line, by the key of Ultralytics; 0 without it."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(number) is int and number > 0 for number in shape)
    ):
        raise DataError(
            f"{file}: kpt_shape: expected how many keypoints an object has and the numbers of "
            f"each, such as [17, 3], got {str(shape)[:100]}"
        )
    return int(shape[0] * shape[1])


def _parse_class_names(names: Any, file: Path) -> list[str]:
    """The classes: a list of names, or a mapping from 0, 1, … to names."""
    if isinstance(names, dict):
        if set(names) != set(range(len(names))) or not all(type(number) is int for number in names):
            raise DataError(
                f"{file}: names: expected the numbers 0 to {len(names) - 1}, "
                f"got {', '.join(map(str, list(names)[:20]))}"
            )
        names = [names[i] for i in range(len(names))]
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, (str, int, float)) for name in names)
    ):
        raise DataError(f"{file}: expected a mapping with names, the list of classes")
    return list(map(str, names))


def _parse_split(value: Any, location: str) -> list[str]:
    """The names that a split's key gives: one or a list of them."""
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise DataError(
                f"{location}: expected folders or lists of images, got {type(name).__name__}"
            )
    return names


def _list_split_images(description: DataYaml) -> SplitImages:
    """The images of each split. Raises DataError if none is for training."""
    images = [
        (image, SPLIT_BY_NAME[key])
        for key, names in description.splits.items()
        for name in names
        for image in _list_images(description.base, name, f"{description.file}: {key}")
    ]
    if not any(split == TRAIN for _, split in images):
        raise DataError(f"{description.file}: train: needs a folder or a list of images")
    return images


def _list_images(base: Path, name: str, location: str) -> list[Path]:
    """The images that a folder holds or a text file lists."""
    candidates = (base / name, base / name.removeprefix("../"))
    path = next((path for path in candidates if os.path.exists(path)), None)
    if path is None:
        raise DataError(f"{location}: {base / name} does not exist")
    if path.is_dir():
        return list(_images_below(path))
    return [
        _resolve_listed_image(base, line.strip(), f"{path}:{number}")
        for number, line in enumerate(_read_text(path).splitlines(), 1)
        if line.strip()
    ]


def _resolve_listed_image(base: Path, name: str, location: str) -> Path:
    """The path of an image in a list.

    An absolute name, as Darknet writes them, must lead into the folder too.
    """
    return base / check_relative_name(name.removeprefix(f"{base.absolute()}/"), location)


def _images_below(folder: Path) -> Iterator[Path]:
    return (
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _annotate_image(
    image: Path, split: int, classes: list[str], keypoint_words: int
) -> tuple[AnnotatedImage, list[str]]:
    """An image with the objects of its text file, and what is wrong with the lines of that file.

    An image without a text file has no objects.
    """
    file = _label_file(image)
    boxes: list[Box] = []
    labels: list[int] = []
    locations: list[str] = []
    shapes: list[Shape] = []
    problems: list[str] = []
    for number, line in enumerate(_read_text(file).splitlines() if file else (), 1):
        if not line.strip():
            continue
        parsed = _parse_line(line, classes, keypoint_words)
        if isinstance(parsed, str):
            problems.append(f"{file}:{number}: {parsed}")
        else:
            boxes.append(parsed.box)
            labels.append(parsed.label)
            shapes.append(parsed.shape)
            locations.append(f"{file}:{number}")
    annotated = AnnotatedImage(
        image, boxes, labels, locations, split, is_relative=True, shapes=shapes
    )
    return annotated, problems


def _label_file(image: Path) -> Path | None:
    """The text file of an image: in labels/ instead of the last images/, or beside the image."""
    names = list(image.parts)
    if "images" in names:
        names[len(names) - 1 - names[::-1].index("images")] = "labels"
    candidates = (Path(*names).with_suffix(".txt"), image.with_suffix(".txt"))
    return next((path for path in candidates if path.is_file()), None)


class YoloObject(NamedTuple):
    """What a line says; `shape` is empty where it has no polygon."""

    box: Box
    label: int
    shape: Shape


def _parse_line(line: str, classes: list[str], keypoint_words: int) -> YoloObject | str:
    """An object, or what is wrong with its line."""
    words = line.split()
    if keypoint_words:
        if len(words) not in (BOX_WORDS, BOX_WORDS + keypoint_words):
            return (
                f"expected {BOX_WORDS} values of a box and {keypoint_words} of its keypoints, as "
                f"kpt_shape says; got {len(words)} values"
            )
        words = words[:BOX_WORDS]
    return _parse_words(words, classes)


def _parse_words(words: list[str], classes: list[str]) -> YoloObject | str:
    """An object of a box or a polygon, or what is wrong with its words."""
    is_polygon = len(words) >= MIN_POLYGON_WORDS and len(words) % 2 == 1
    if len(words) != BOX_WORDS and not is_polygon:
        return (
            "expected class, centre x, centre y, width, height, or class and the corners of a "
            f"polygon; got {len(words)} values"
        )
    try:
        numbers = list(map(float, words[1:]))
    except ValueError:
        return f"expected numbers after the class, got {' '.join(words[1:])[:100]!r}"
    if not words[0].isdecimal() or len(words[0]) > 9 or int(words[0]) >= len(classes):
        return (
            f"class {words[0][:100]!r}, but there are {len(classes)} classes, "
            f"0 to {len(classes) - 1}"
        )
    if max(numbers) > 1.5:
        return (
            f"{'polygon' if is_polygon else 'box'} {' '.join(words[1:])[:100]}: these are pixels; "
            "expected shares of the image's sides, 0 to 1"
        )
    if is_polygon:
        xs, ys = numbers[::2], numbers[1::2]
        return YoloObject((min(xs), min(ys), max(xs), max(ys)), int(words[0]), [numbers])
    x, y, width, height = numbers
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return YoloObject(box, int(words[0]), [])


def _read_text(file: Path) -> str:
    """The content of a text file. Raises DataError if it is too large or no text."""
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(f"{file}: {file.stat().st_size:,} bytes, more than {MAX_TEXT_BYTES:,}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text file in UTF-8") from None
