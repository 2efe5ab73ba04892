"""COCO: JSON files that list images, categories, and boxes as left, top, width, height in pixels.

Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014.
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID

TASKS = ("detection",)
SPLIT_FOLDERS = {"train": TRAIN, "valid": VALID, "val": VALID, "test": TEST}
ANNOTATION_PATTERNS = (
    "annotations/instances_{}*.json",
    "annotations/{}*.json",
    "{}*/_annotations.coco.json",
    "{}*.json",
)
MAX_SIDE_PIXELS = 1e9  # pixels that a side of a box may state
CategoryNames = dict[int, str]


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the JSON file of annotations, or the folder that holds annotations/ with one file per split"
        ),
    ],
    images: Annotated[
        str | None,
        Field(description="the folder of the images; null: looked for beside the annotations"),
    ] = None,
    image: ImageOptions,
) -> Dataset:
    """`path`: a JSON file, or a folder with one for each part; `images`: the folder of the images, where it is not beside them."""
    files = _find_annotation_files(Path(path).expanduser(), path)
    trees = {part: _read_json(file) for part, file in files.items()}
    categories: CategoryNames = {}
    for part, tree in trees.items():
        for number, one in _index_by_id(tree, "categories", files[part]).items():
            name = one.get("name", str(number))
            if not isinstance(name, str) or not name.isprintable():
                raise DataError(
                    f"{files[part]}: category {number}: name {_short_repr(name)} is no text of one line"
                )
            if categories.setdefault(number, name) != name:
                raise DataError(
                    f"{files[part]}: category {number} is {name!r}, but {categories[number]!r} in another part"
                )
    found: list[AnnotatedImage] = []
    for part, tree in trees.items():
        found += _annotated_images(
            tree, files[part], Path(images).expanduser() if images else None, categories, part
        )
    used = sorted({label for one in found for label in one.labels})
    classes = [categories[number] for number in used]
    rank = {number: label for label, number in enumerate(used)}
    parts = (
        unsplit_incomplete([one.split for one in found])
        if TRAIN in files
        else [one.split for one in found]
    )
    found = [
        replace(one, labels=[rank[k] for k in one.labels], split=p)
        for one, p in zip(found, parts, strict=True)
    ]
    return detection_dataset(home, found, classes, image, input_spec)


def _find_annotation_files(root: Path, path: str) -> dict[int, Path]:
    """The annotations of each part. Raises DataError."""
    if root.is_file():
        return {UNSPLIT: root}
    if not root.is_dir():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"data.path: {path} does not exist (looked in {Path.cwd()}){nearest_hint(root.name, beside)}"
        )
    found: dict[int, Path] = {}
    for name, part in SPLIT_FOLDERS.items():
        options = [
            file
            for place in ANNOTATION_PATTERNS
            for file in sorted(root.glob(place.format(name)))
            if file.is_file()
        ]
        if options and part not in found:
            found[part] = options[0]
    if TRAIN in found:
        return found
    alone = sorted(root.glob("*.json")) or sorted(root.glob("annotations/*.json"))
    if len(alone) != 1:
        said = f"{len(alone)} JSON files and none is called train" if alone else "no JSON file"
        raise DataError(
            f"data.path: {path} has {said}; name the file, or have annotations/instances_train*.json"
        )
    return {UNSPLIT: alone[0]}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}); is it truncated?") from None
    if not isinstance(tree, dict) or any(
        not isinstance(tree.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(
            f"{file}: expected a mapping with lists called images, annotations and categories"
        )
    return tree


def _index_by_id(tree: dict[str, Any], key: str, file: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for number, one in enumerate(tree[key]):
        if not isinstance(one, dict) or type(one.get("id")) is not int:
            raise DataError(f"{file}: {key}[{number}] needs an id, a whole number")
        if one["id"] in found:
            raise DataError(f"{file}: {key}[{number}]: id {one['id']} is there twice")
        found[one["id"]] = one
    return found


def _annotated_images(
    tree: dict[str, Any], file: Path, images: Path | None, categories: CategoryNames, part: int
) -> list[AnnotatedImage]:
    """Raises DataError naming objects of unknown images or categories, and such as have no box."""
    pictures = _index_by_id(tree, "images", file)
    objects: dict[int, list[tuple[Box, int, str]]] = defaultdict(list)
    wrong: list[str] = []
    for number, one in enumerate(tree["annotations"]):
        place = f"{file}: annotations[{number}]"
        box = one.get("bbox") if isinstance(one, dict) else None
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(type(side) in (int, float) and abs(side) < MAX_SIDE_PIXELS for side in box)
        ):
            wrong.append(f"{place}: needs a bbox of four numbers: left, top, width, height")
        elif type(one.get("image_id")) is not int or one["image_id"] not in pictures:
            wrong.append(f"{place}: image_id {_short_repr(one.get('image_id'))} is no image's id")
        elif type(one.get("category_id")) is not int or one["category_id"] not in categories:
            wrong.append(
                f"{place}: category_id {_short_repr(one.get('category_id'))} is no category's id"
            )
        elif not one.get("iscrowd"):  # a crowd is no object
            left, top, width, height = map(float, box)
            objects[one["image_id"]].append(
                (
                    (left, top, left + width, top + height),
                    one["category_id"],
                    f"{place} ({_image_name(pictures, one)})",
                )
            )
    if wrong:
        raise DataError(
            *limit_listing(wrong), f"data: {len(wrong)} annotations are wrong; mend or remove them"
        )
    found = []
    for key, one in pictures.items():
        if not isinstance(one.get("file_name"), str):
            raise DataError(f"{file}: image {key} has no file_name")
        name = check_relative_name(one["file_name"], f"{file}: image {key}: file_name")
        size = (
            (one["width"], one["height"])
            if type(one.get("width")) is int and type(one.get("height")) is int
            else None
        )
        boxes, labels, places = zip(*objects[key], strict=True) if objects[key] else ((), (), ())
        found.append(
            AnnotatedImage(
                _image_path(file, images, name), boxes, labels, places, part, stated_size=size
            )
        )
    return found


def _short_repr(value: Any) -> str:
    return repr(value)[:100]


def _image_name(pictures: dict[int, dict[str, Any]], one: dict[str, Any]) -> str:
    return str(pictures[one["image_id"]].get("file_name"))


def _image_path(file: Path, images: Path | None, name: str) -> Path:
    """Where an image lies: in `images`, beside the annotations, or in a folder that is called like them or `images`."""
    beside = file.parent.parent if file.parent.name == "annotations" else file.parent
    stem = file.stem.removeprefix("instances_")
    folders = (
        [images]
        if images
        else [file.parent, beside / stem, beside / "images" / stem, beside / "images", beside]
    )
    return next(
        (folder / name for folder in folders if (folder / name).is_file()),
        folders[0 if images else 3] / name,
    )
