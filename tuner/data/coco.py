"""COCO: JSON files with images, categories, and boxes as left, top, width, height in pixels; for
instance segmentation also masks, as polygons or run lengths.

Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014.
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
from tuner.preprocessing.instance_masks import Shape, find_shape_problem
from tuner.preprocessing.splits import SPLIT_BY_NAME, TRAIN, UNSPLIT

TASKS = ("detection", "instance_segmentation")
ANNOTATION_PATTERNS = (
    "annotations/instances_{}*.json",
    "annotations/{}*.json",
    "{}*/_annotations.coco.json",
    "{}*.json",
)
MAX_SIDE_PIXELS = 1e9  # pixels that a side of a box may state
JsonObject = dict[str, Any]
CategoryNames = dict[int, str]  # by category id


class CocoObject(NamedTuple):
    """An object or a crowd; its mask is checked only where masks are needed."""

    box: Box
    category: int
    location: str
    shape: Shape


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the JSON file of annotations, "
            "or the folder that holds annotations/ with one file per split"
        ),
    ],
    images: Annotated[
        str | None,
        Field(description="the folder of the images; null: looked for beside the annotations"),
    ] = None,
    image: ImageFileOptions,
) -> Dataset:
    """Load images with boxes from COCO's JSON files.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `detection` or `instance_segmentation`.
        path: a JSON file, or a folder with one JSON file per split.
        images: the folder of the images, if they are not beside the annotations.
        image: the image keys of the `data:` section.

    Raises:
        DataError: files are missing, or annotations are unreadable or wrong.
    """
    files = _find_annotation_files(home, path)
    contents = {split: _read_json(file) for split, file in files.items()}
    categories = _merge_categories(files, contents)
    image_folder = Path(images).expanduser() if images else None
    annotated: list[AnnotatedImage] = []
    with_masks = task == "instance_segmentation"
    for split, content in contents.items():
        if with_masks:
            _check_masks(content, files[split])
        annotated += _annotated_images(content, files[split], image_folder, categories, split)
    classes, annotated = _number_classes(annotated, categories)
    return detection_dataset(home, annotated, classes, image, input_spec, with_masks=with_masks)


def _check_masks(content: JsonObject, file: Path) -> None:
    """Raise DataError where objects have no proper mask."""
    problems = [
        f"{file}: annotations[{number}]: {problem}"
        for number, annotation in enumerate(content["annotations"])
        if isinstance(annotation, dict)
        and (problem := find_shape_problem(annotation.get("segmentation")))
    ]
    if problems:
        raise DataError(
            *limit_listing(problems),
            f"data: {len(problems)} of {len(content['annotations'])} objects have no mask that can "
            "be read; mend or remove them, or use task: detection, which needs none",
        )


def _find_annotation_files(home: Path, path: str) -> dict[int, Path]:
    """The file of each split; UNSPLIT alone if there is one file for all. Raises DataError."""
    root = resolve_path(path, home)
    if root.is_file():
        return {UNSPLIT: root}
    files: dict[int, Path] = {}
    for name, split in SPLIT_BY_NAME.items():
        candidates = [
            file
            for pattern in ANNOTATION_PATTERNS
            for file in sorted(root.glob(pattern.format(name)))
            if file.is_file()
        ]
        if candidates and split not in files:
            files[split] = candidates[0]
    if TRAIN in files:
        return files
    unnamed = sorted(root.glob("*.json")) or sorted(root.glob("annotations/*.json"))
    if len(unnamed) == 1:
        return {UNSPLIT: unnamed[0]}
    problem = f"{len(unnamed)} JSON files and none is called train" if unnamed else "no JSON file"
    raise DataError(
        f"data.path: {path} has {problem}; name the file, or have annotations/instances_train*.json"
    )


def _read_json(file: Path) -> JsonObject:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}); is it truncated?") from None
    if not isinstance(content, dict) or any(
        not isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(
            f"{file}: expected a mapping with lists called images, annotations and categories"
        )
    return content


def _merge_categories(files: dict[int, Path], contents: dict[int, JsonObject]) -> CategoryNames:
    """The names of the categories of all files. Raises DataError if two files disagree."""
    categories: CategoryNames = {}
    for split, content in contents.items():
        for number, category in _index_by_id(content, "categories", files[split]).items():
            name = category.get("name", str(number))
            if not isinstance(name, str) or not name.isprintable():
                raise DataError(
                    f"{files[split]}: category {number}: name {_short_repr(name)} "
                    "is no text of one line"
                )
            if categories.setdefault(number, name) != name:
                raise DataError(
                    f"{files[split]}: category {number} is {name!r}, "
                    f"but {categories[number]!r} in another part"
                )
    return categories


def _number_classes(
    annotated: list[AnnotatedImage], categories: CategoryNames
) -> tuple[list[str], list[AnnotatedImage]]:
    """The names of the categories that occur, and the images with labels that index these names.

    COCO's category ids have gaps, so they cannot be labels themselves.
    """
    used = sorted({category for image in annotated for category in image.labels})
    label_of = {category: label for label, category in enumerate(used)}
    return [categories[category] for category in used], [
        _with_labels(image, label_of) for image in annotated
    ]


def _with_labels(image: AnnotatedImage, label_of: dict[int, int]) -> AnnotatedImage:
    """The image with labels instead of category ids; crowds of other categories are left out."""
    kept = [i for i, category in enumerate(image.ignored_labels) if category in label_of]
    return replace(
        image,
        labels=[label_of[category] for category in image.labels],
        ignored_boxes=[image.ignored_boxes[i] for i in kept],
        ignored_labels=[label_of[image.ignored_labels[i]] for i in kept],
        ignored_shapes=[image.ignored_shapes[i] for i in kept],
    )


def _index_by_id(content: JsonObject, key: str, file: Path) -> dict[int, JsonObject]:
    entries: dict[int, JsonObject] = {}
    for number, entry in enumerate(content[key]):
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise DataError(f"{file}: {key}[{number}] needs an id, a whole number")
        if entry["id"] in entries:
            raise DataError(f"{file}: {key}[{number}]: id {entry['id']} is there twice")
        entries[entry["id"]] = entry
    return entries


def _annotated_images(
    content: JsonObject, file: Path, folder: Path | None, categories: CategoryNames, split: int
) -> list[AnnotatedImage]:
    """The images of a file with their objects; their labels are category ids.

    Raises:
        DataError: an image has no proper name, or as `_objects_by_image` does.
    """
    images = _index_by_id(content, "images", file)
    objects = _objects_by_image(content, file, images, categories)
    crowds = _crowds_by_image(content, images, categories)
    annotated = []
    for number, image in images.items():
        if not isinstance(image.get("file_name"), str):
            raise DataError(f"{file}: image {number} has no file_name")
        name = check_relative_name(image["file_name"], f"{file}: image {number}: file_name")
        annotated.append(
            AnnotatedImage(
                _image_path(file, folder, name),
                boxes=[one.box for one in objects[number]],
                labels=[one.category for one in objects[number]],
                locations=[one.location for one in objects[number]],
                split=split,
                stated_size=_stated_size(image),
                ignored_boxes=[one.box for one in crowds[number]],
                ignored_labels=[one.category for one in crowds[number]],
                shapes=[one.shape for one in objects[number]],
                ignored_shapes=[one.shape for one in crowds[number]],
            )
        )
    return annotated


def _objects_by_image(
    content: JsonObject, file: Path, images: dict[int, JsonObject], categories: CategoryNames
) -> dict[int, list[CocoObject]]:
    """The objects by the id of their image, without crowds.

    Raises:
        DataError: objects have no box, or an unknown image or category. The message names them.
    """
    objects: dict[int, list[CocoObject]] = defaultdict(list)
    problems: list[str] = []
    for number, annotation in enumerate(content["annotations"]):
        location = f"{file}: annotations[{number}]"
        problem = _find_annotation_problem(annotation, images, categories)
        if problem:
            problems.append(f"{location}: {problem}")
        elif not annotation.get("iscrowd"):  # a crowd is not one object
            image_id = annotation["image_id"]
            name = f"{location} ({images[image_id].get('file_name')})"
            objects[image_id].append(_read_object(annotation, name))
    if problems:
        raise DataError(
            *limit_listing(problems),
            f"data: {len(problems)} annotations are wrong; mend or remove them",
        )
    return objects


def _crowds_by_image(
    content: JsonObject, images: dict[int, JsonObject], categories: CategoryNames
) -> dict[int, list[CocoObject]]:
    """The areas that are marked as crowds, by the id of their image."""
    crowds: dict[int, list[CocoObject]] = defaultdict(list)
    for annotation in content["annotations"]:
        if not _find_annotation_problem(annotation, images, categories) and annotation.get(
            "iscrowd"
        ):
            crowds[annotation["image_id"]].append(_read_object(annotation, ""))
    return crowds


def _read_object(annotation: JsonObject, location: str) -> CocoObject:
    left, top, width, height = map(float, annotation["bbox"])
    box = (left, top, left + width, top + height)
    return CocoObject(
        box, annotation["category_id"], location, annotation.get("segmentation") or []
    )


def _find_annotation_problem(
    annotation: Any, images: dict[int, JsonObject], categories: CategoryNames
) -> str:
    """What is wrong with an annotation, or '' if nothing is."""
    box = annotation.get("bbox") if isinstance(annotation, dict) else None
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(side) in (int, float) and abs(side) < MAX_SIDE_PIXELS for side in box)
    ):
        return "needs a bbox of four numbers: left, top, width, height"
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if type(image_id) is not int or image_id not in images:
        return f"image_id {_short_repr(image_id)} is no image's id"
    if type(category_id) is not int or category_id not in categories:
        return f"category_id {_short_repr(category_id)} is no category's id"
    return ""


def _stated_size(image: JsonObject) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (width, height) if type(width) is int and type(height) is int else None


def _short_repr(value: Any) -> str:
    return repr(value)[:100]


def _image_path(file: Path, folder: Path | None, name: str) -> Path:
    """The path of an image.

    It lies in `folder` if that is given; otherwise beside the annotations, or in a folder called
    like them or `images`.
    """
    if folder is not None:
        return folder / name
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    stem = file.stem.removeprefix("instances_")
    folders = [file.parent, root / stem, root / "images" / stem, root / "images", root]
    candidates = (folder / name for folder in folders)
    return next((path for path in candidates if path.is_file()), root / "images" / name)
