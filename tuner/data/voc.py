"""Pascal VOC: a folder of images with XML files for their objects, or masks for the class of each pixel; ImageSets says what trains.

Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

from pydantic import Field

from tuner.config.run import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, nearest_hint, suggest_names
from tuner.preprocessing.detection_dataset import (
    AnnotatedImage,
    Box,
    detection_dataset,
    limit_listing,
    unsplit_incomplete,
)
from tuner.preprocessing.image_decoding import SUFFIXES
from tuner.preprocessing.segmentation_dataset import voc_segmentation_dataset
from tuner.preprocessing.splits import TEST, TRAIN, VALID

TASKS = ("detection", "segmentation")
MAX_XML_BYTES = 10_000_000  # bytes of one XML file
IMAGE_FOLDERS, ANNOTATION_FOLDERS = ("JPEGImages", "images"), ("Annotations", "annotations")
NamedObjects = list[tuple[str, Box, str]]  # class, box, place


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the folder that holds JPEGImages/ (or images/) and Annotations/; for segmentation SegmentationClass/"
        ),
    ],
    classes: Annotated[
        list[str] | None,
        Field(description="names of the classes in order; null: those found (for masks: VOC's 21)"),
    ] = None,
    difficult: Annotated[
        bool, Field(description="whether objects that are marked as difficult count too")
    ] = False,
    image: ImageOptions,
) -> Dataset:
    """`classes`: the names in order, where others than found (for masks: than VOC's 21). `difficult`: objects marked so count as well.

    For segmentation the folders are JPEGImages and SegmentationClass.
    """
    root = check_folder(path)
    if task == "segmentation":
        return voc_segmentation_dataset(home, root, input_spec, image, classes)
    pictures = images_by_stem(_find_inner_folder(root, IMAGE_FOLDERS))
    files = {
        file.stem: file
        for file in sorted(_find_inner_folder(root, ANNOTATION_FOLDERS).glob("*.xml"))
        if not file.name.startswith(".")
    }
    if not files:
        raise DataError(
            f"data.path: {_find_inner_folder(root, ANNOTATION_FOLDERS)} holds no .xml files"
        )
    parts = _read_splits(root, files)
    read = {
        stem: _read_annotation(file, difficult=difficult)
        for stem, file in files.items()
        if stem in parts
    }
    names = classes or sorted({name for named, _ in read.values() for name, _, _ in named})
    unknown = [
        f"{place}: class {name!r}{suggest_names(name, names)}"
        for named, _ in read.values()
        for name, _, place in named
        if name not in names
    ]
    if unknown:
        raise DataError(
            *limit_listing(unknown),
            f"data.classes: {len(unknown)} objects are of classes that it does not name; add or mend them",
        )
    found = []
    for stem, (named, size) in read.items():
        picture = pictures.get(stem, _find_inner_folder(root, IMAGE_FOLDERS) / f"{stem}.jpg")
        labels = [names.index(name) for name, _, _ in named]
        found.append(
            AnnotatedImage(
                picture,
                [box for _, box, _ in named],
                labels,
                [place for *_, place in named],
                parts[stem],
                stated_size=size,
            )
        )
    alone = [str(picture) for stem, picture in pictures.items() if stem not in files]
    warnings = (
        [f"data: {len(alone)} images have no annotation and are left out", *limit_listing(alone)]
        if alone
        else []
    )
    found = [
        replace(one, split=part)
        for one, part in zip(found, unsplit_incomplete([one.split for one in found]), strict=True)
    ]
    return detection_dataset(home, found, names, image, input_spec, warnings)


def check_folder(path: str) -> Path:
    """Raises DataError unless `path` is a folder."""
    root = Path(path).expanduser()
    if not root.is_dir():
        beside = (
            [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        )
        said = (
            "is a file; expected a folder"
            if root.exists()
            else f"does not exist (looked in {Path.cwd()}){nearest_hint(root.name, beside)}"
        )
        raise DataError(f"data.path: {path} {said}")
    return root


def images_by_stem(images: Path) -> dict[str, Path]:
    """Every image by its name without suffix."""
    return {
        p.stem: p
        for p in sorted(images.iterdir())
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    }


def _find_inner_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"data.path: {root} has neither {names[0]}/ nor {names[1]}/; expected {IMAGE_FOLDERS[0]}/ and {ANNOTATION_FOLDERS[0]}/, or in lower case"
    )


def _read_splits(root: Path, files: dict[str, Path]) -> dict[str, int]:
    """Which annotated image belongs to which part. Raises DataError on a list that names what is not there."""
    lists = root / "ImageSets" / "Main"
    found: dict[str, int] = {}
    for name, part in (("train", TRAIN), ("val", VALID), ("test", TEST)):
        path = lists / f"{name}.txt"
        if path.is_file():
            stems = [
                line.split()[0]
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.strip()
            ]
            lost = [f"{path}: {stem}: no such annotation" for stem in stems if stem not in files]
            if lost and part != TEST:  # VOC's own test lists come without annotations
                raise DataError(
                    *limit_listing(lost),
                    f"data: {len(lost)} of the {len(stems)} images in {path} are not annotated",
                )
            found |= {stem: part for stem in stems if stem in files}
    return found or dict.fromkeys(files, TRAIN)


def _read_annotation(file: Path, *, difficult: bool) -> tuple[NamedObjects, tuple[int, int] | None]:
    """The objects of a file, and the size that it states. Raises DataError."""
    if file.stat().st_size > MAX_XML_BYTES:
        raise DataError(
            f"{file}: {file.stat().st_size:,} bytes, more than {MAX_XML_BYTES:,}; not an annotation of one image"
        )
    content = file.read_bytes()
    if (
        re.search(rb"<!\s*(DOCTYPE|ENTITY)", content, re.IGNORECASE) or b"\x00" in content
    ):  # entities can grow without bound
        raise DataError(
            f"{file}: refused: it declares a DOCTYPE or entities, or is not UTF-8; an annotation needs none of these"
        )
    try:
        tree = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: not well-formed XML ({error}); mend or remove it") from None
    named: NamedObjects = []
    for number, found in enumerate(tree.iter("object"), 1):
        place = f"{file}: object {number}"
        name = (found.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{place}: it has no <name>")
        if difficult or (found.findtext("difficult") or "0").strip() != "1":
            left, top, right, bottom = (
                _read_number(found, side, place) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            named.append(
                (name, (left - 1, top - 1, right, bottom), place)
            )  # VOC counts pixels from 1, the last included
    sides = [(tree.findtext(f"size/{side}") or "0").strip() for side in ("width", "height")]
    return named, (int(sides[0]), int(sides[1])) if all(
        side.isdecimal() and len(side) < 10 and int(side) for side in sides
    ) else None


def _read_number(found: ElementTree.Element, side: str, place: str) -> float:
    text = found.findtext(f"bndbox/{side}")
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"{place}: <bndbox> needs a number as <{side}>, got {text!r}") from None
