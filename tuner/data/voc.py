"""Pascal VOC: images with XML files of objects, or with masks; ImageSets lists the splits.

Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple
from xml.etree import ElementTree

from pydantic import Field

from tuner.config.data_options import ImageFileOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, count_words, limit_listing, suggest_names
from tuner.preprocessing.data_paths import resolve_folder
from tuner.preprocessing.detection_dataset import (
    AnnotatedImage,
    Box,
    detection_dataset,
)
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.image_files import warn_about_unread_files
from tuner.preprocessing.segmentation_dataset import voc_segmentation_dataset
from tuner.preprocessing.splits import TEST, TRAIN, read_split_lists

TASKS = ("detection", "segmentation")
MAX_XML_BYTES = 10_000_000  # bytes of one XML file
IMAGE_FOLDERS = ("JPEGImages", "images")
ANNOTATION_FOLDERS = ("Annotations", "annotations")
NamedObjects = list[tuple[str, Box, str]]  # class, box, location
ImageSize = tuple[int, int]  # width, height in pixels


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the folder that holds JPEGImages/ (or images/) and Annotations/; "
            "for segmentation SegmentationClass/"
        ),
    ],
    classes: Annotated[
        list[str] | None,
        Field(description="names of the classes in order; null: those found (for masks: VOC's 21)"),
    ] = None,
    difficult: Annotated[
        bool,
        Field(
            description="whether objects that are marked as difficult are learnt and count; "
            "otherwise their detection counts neither as right nor as wrong, as in VOC"
        ),
    ] = False,
    image: ImageFileOptions,
) -> Dataset:
    """Load images with boxes or masks from Pascal VOC's folders.

    For segmentation these are JPEGImages and SegmentationClass.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `detection` or `segmentation`.
        path: the folder that holds VOC's folders.
        classes: the names of the classes in order, if they are not those that occur (for masks:
            if they are not VOC's).
        difficult: whether objects that are marked as difficult are learnt and count.
        image: the image keys of the `data:` section.

    Raises:
        DataError: files are missing, unreadable or wrong.
    """
    root = resolve_folder(path, home=home)
    if task == "segmentation":
        return voc_segmentation_dataset(home, root, input_spec, image, classes)
    default_folder = _find_inner_folder(root, IMAGE_FOLDERS)
    images = images_by_stem(default_folder)
    files = _list_annotation_files(root)
    splits = _read_splits(root, files)
    annotations = {
        stem: _read_annotation(file, difficult=difficult)
        for stem, file in files.items()
        if stem in splits
    }
    objects_by_stem = {stem: annotation.objects for stem, annotation in annotations.items()}
    names = classes or _list_class_names(objects_by_stem)
    _check_class_names(objects_by_stem, names)
    annotated = [
        AnnotatedImage(
            images.get(stem, default_folder / f"{stem}.jpg"),
            boxes=[box for _, box, _ in annotation.objects],
            labels=[names.index(name) for name, _, _ in annotation.objects],
            locations=[location for _, _, location in annotation.objects],
            split=splits[stem],
            stated_size=annotation.size,
            ignored_boxes=[box for name, box, _ in annotation.ignored if name in names],
            ignored_labels=[
                names.index(name) for name, _, _ in annotation.ignored if name in names
            ],
        )
        for stem, annotation in annotations.items()
    ]
    warnings = _warn_not_annotated([path for stem, path in images.items() if stem not in files])
    warnings += warn_about_unread_files([default_folder])
    return detection_dataset(home, annotated, names, image, input_spec, warnings)


def _list_annotation_files(root: Path) -> dict[str, Path]:
    """The XML files by stem. Raises DataError if there are none."""
    folder = _find_inner_folder(root, ANNOTATION_FOLDERS)
    files = [file for file in sorted(folder.glob("*.xml")) if not file.name.startswith(".")]
    if not files:
        raise DataError(f"data.path: {folder} holds no .xml files")
    return {file.stem: file for file in files}


def _list_class_names(objects_by_stem: dict[str, NamedObjects]) -> list[str]:
    return sorted({name for objects in objects_by_stem.values() for name, _, _ in objects})


def _check_class_names(objects_by_stem: dict[str, NamedObjects], names: list[str]) -> None:
    """Raise DataError if objects are of a class that `names` lacks."""
    unknown = [
        f"{location}: class {name!r}{suggest_names(name, names)}"
        for objects in objects_by_stem.values()
        for name, _, location in objects
        if name not in names
    ]
    if unknown:
        raise DataError(
            *limit_listing(unknown),
            f"data.classes: {len(unknown)} objects are of classes that it does not name; "
            "add or mend them",
        )


def _warn_not_annotated(images: Sequence[Path]) -> list[str]:
    if not images:
        return []
    count = count_words(len(images), "image has", "images have")
    summary = f"data: {count} no annotation and {'is' if len(images) == 1 else 'are'} left out"
    return [summary, *limit_listing([str(path) for path in images])]


def images_by_stem(images: Path) -> dict[str, Path]:
    """Every image by its name without suffix."""
    return {
        path.stem: path
        for path in sorted(images.iterdir())
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    }


def _find_inner_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"data.path: {root} has neither {names[0]}/ nor {names[1]}/; "
        f"expected {IMAGE_FOLDERS[0]}/ and {ANNOTATION_FOLDERS[0]}/, or in lower case"
    )


def _read_splits(root: Path, files: dict[str, Path]) -> dict[str, int]:
    """The split of each annotated image, by stem; TRAIN for all of them if there are no lists.

    Raises:
        DataError: a list names images that are not annotated.
    """
    splits: dict[str, int] = {}
    for split, (file, stems) in read_split_lists(root / "ImageSets" / "Main").items():
        missing = [f"{file}: {stem}: no such annotation" for stem in stems if stem not in files]
        if missing and split != TEST:  # VOC's own test lists come without annotations
            raise DataError(
                *limit_listing(missing),
                f"data: {len(missing)} of the {len(stems)} images in {file} are not annotated",
            )
        splits |= {stem: split for stem in stems if stem in files}
    return splits or dict.fromkeys(files, TRAIN)


class Annotation(NamedTuple):
    """What an XML file says: its objects, the difficult ones that are ignored, and the image's
    size, if it states one.
    """

    objects: NamedObjects
    ignored: NamedObjects
    size: ImageSize | None


def _read_annotation(file: Path, *, difficult: bool) -> Annotation:
    """Read a file; `difficult`: no object is ignored. Raises DataError."""
    content = _parse_xml(file)
    objects: NamedObjects = []
    ignored: NamedObjects = []
    for number, element in enumerate(content.iter("object"), 1):
        location = f"{file}: object {number}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{location}: it has no <name>")
        left, top, right, bottom = (
            _read_number(element, side, location) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        is_ignored = not difficult and (element.findtext("difficult") or "0").strip() == "1"
        # VOC counts pixels from 1 and includes the last one
        box = (left - 1, top - 1, right, bottom)
        (ignored if is_ignored else objects).append((name, box, location))
    return Annotation(objects, ignored, _read_size(content))


def _parse_xml(file: Path) -> ElementTree.Element:
    """The root element. Raises DataError on files that are too large, unsafe or no XML."""
    if file.stat().st_size > MAX_XML_BYTES:
        raise DataError(
            f"{file}: {file.stat().st_size:,} bytes, more than {MAX_XML_BYTES:,}; "
            "not an annotation of one image"
        )
    content = file.read_bytes()
    # entities can grow without bound
    if re.search(rb"<!\s*(DOCTYPE|ENTITY)", content, re.IGNORECASE) or b"\x00" in content:
        raise DataError(
            f"{file}: refused: it declares a DOCTYPE or entities, or is not UTF-8; "
            "an annotation needs none of these"
        )
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: not well-formed XML ({error}); mend or remove it") from None


def _read_size(content: ElementTree.Element) -> ImageSize | None:
    """The image's size as the file states it; None if it states none or 0."""
    width, height = (
        (content.findtext(f"size/{side}") or "0").strip() for side in ("width", "height")
    )
    if not all(side.isdecimal() and len(side) < 10 and int(side) for side in (width, height)):
        return None
    return int(width), int(height)


def _read_number(element: ElementTree.Element, side: str, location: str) -> float:
    text = element.findtext(f"bndbox/{side}")
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"{location}: <bndbox> needs a number as <{side}>, got {text!r}") from None
