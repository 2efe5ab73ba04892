"""Reads the columns of Hugging Face datasets: images with classes, masks or boxes, and texts."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuner.config.data_options import ImageOptions
from tuner.config.requirements import pip_install
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, SpaceError, limit_listing, nearest_hint
from tuner.preprocessing.detection_dataset import AnnotatedImage, Box, detection_dataset
from tuner.preprocessing.example_groups import with_groups
from tuner.preprocessing.image_dataset import classification_dataset
from tuner.preprocessing.segmentation_dataset import MaskLegend, segmentation_dataset
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID, Items
from tuner.preprocessing.unpacked_data import unpack_once

USUAL_IMAGE_COLUMNS = ("image", "img", "picture", "photo", "pixel_values")
USUAL_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label", "y")
USUAL_MASK_COLUMNS = ("mask", "annotation", "label", "segmentation", "segmentation_mask")
USUAL_OBJECT_COLUMNS = ("objects", "annotations", "faces")
USUAL_CLASS_KEYS = ("category", "categories", "label", "labels", "category_id", "class")
UNLABELLED = -1  # the class of examples whose labels are kept secret
TEXT_FILES = {TRAIN: "train.jsonl", VALID: "valid.jsonl", TEST: "test.jsonl", UNSPLIT: "all.jsonl"}
SUFFIX_BY_START = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"RIFF": ".webp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}

Rows = Any
"""A `datasets.Dataset`: the rows of one split."""


def import_library() -> Any:
    """The library. Raises SpaceError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise SpaceError(
            f"data.name: huggingface needs the package datasets ({error}): "
            f"{pip_install('datasets')}"
        ) from None
    datasets.disable_progress_bars()
    return datasets


class HuggingFaceReader:
    """Makes a dataset of images of the rows of each split.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        options: the image keys of the `data:` section.
        path: the dataset's name, for messages.
        splits: the rows of each split.
        column: the column of the images, or None.
        label: the column of labels, masks or objects, or None.
        group: the column of groups, or None.
    """

    def __init__(
        self,
        home: Path,
        input_spec: InputSpec,
        options: ImageOptions,
        path: str,
        splits: dict[int, Rows],
        column: str | None,
        label: str | None,
        group: str | None,
    ) -> None:
        self.home, self.input_spec, self.options, self.path = home, input_spec, options, path
        self.splits, self.label = splits, label
        self.image_column = self._find_column("column", column, USUAL_IMAGE_COLUMNS)
        self.groups = self._read_groups(group) if group is not None else {}

    def _find_column(self, key: str, name: str | None, usual: Sequence[str]) -> str:
        """The named column, or the one with a usual name. Raises DataError."""
        columns = next(iter(self.splits.values())).column_names
        for rows in self.splits.values():
            columns = [column for column in columns if column in rows.column_names]
        listed = f"(it has {', '.join(map(repr, columns))})"
        if name is None:
            likely = [column for column in usual if column in columns]
            if not likely:
                raise DataError(
                    f"data.{key}: which column of {self.path}? none has a usual name "
                    f"{listed}; write data: {{{key}: …}}"
                )
            return likely[0]
        if name not in columns:
            raise DataError(
                f"data.{key}: {self.path} has no column {name!r}{nearest_hint(name, columns)} "
                f"{listed}"
            )
        return name

    def _read_groups(self, name: str) -> dict[int, list[str]]:
        """The group of each row of each split."""
        column = self._find_column("group", name, ())
        return {
            split: [str(value) for value in rows.with_format(None)[column]]
            for split, rows in self.splits.items()
        }

    def read_classes(self) -> Dataset:
        """Images with a class each."""
        column = self._find_column("label", self.label, USUAL_LABEL_COLUMNS)
        named = {split: _label_names(rows, column) for split, rows in self.splits.items()}
        labelled = {
            split: [i for i, name in enumerate(names) if name is not None]
            for split, names in named.items()
        }
        classes = _class_names(next(iter(self.splits.values())), column)
        names = [named[split][i] for split, numbers in labelled.items() for i in numbers]
        if classes is None:
            unique = {name for name in names if name is not None}
            classes = sorted(unique, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
        occurring = set(names)
        used = [name for name in classes if name in occurring]
        index = {name: i for i, name in enumerate(used)}
        files = self._write_images(self.image_column)
        paths = [files[split][i] for split, numbers in labelled.items() for i in numbers]
        split = [number for number, numbers in labelled.items() for _ in numbers]
        items = Items(
            paths,
            np.array([index[str(name)] for name in names], np.int64),
            tuple(used),
            np.array(split, np.int64),
        )
        if self.groups:
            groups = [self.groups[split][i] for split, rows in labelled.items() for i in rows]
            items = with_groups(items, groups)
        missing = sum(map(len, named.values())) - len(paths)
        warnings = [f"data: {missing} images have no label and are left out"] if missing else []
        return classification_dataset(self.home, items, self.options, self.input_spec, warnings)

    def read_masks(self, legend: MaskLegend) -> Dataset:
        """Images with a mask each."""
        column = self._find_column("label", self.label, USUAL_MASK_COLUMNS)
        images, masks = self._write_images(self.image_column), self._write_images(column)
        pairs = [
            pair for split in self.splits for pair in zip(images[split], masks[split], strict=True)
        ]
        split = np.array([number for number in self.splits for _ in images[number]], np.int64)
        groups = [name for names in self.groups.values() for name in names]
        return segmentation_dataset(
            self.home, pairs, split, self.options, self.input_spec, legend, groups=groups
        )

    def read_boxes(self, box_format: str, classes: list[str] | None) -> Dataset:
        """Images with objects."""
        column = self._find_column("label", self.label, USUAL_OBJECT_COLUMNS)
        images = self._write_images(self.image_column)
        objects = {
            split: list(self._objects(rows, column, box_format))
            for split, rows in self.splits.items()
        }
        names = classes or self._object_classes(column, objects)
        problems = [
            f"{self.path}: row {row}: class {label}, but {len(names)} classes are named"
            for rows in objects.values()
            for row, (_, labels) in enumerate(rows)
            for label in labels
            if not 0 <= label < len(names)
        ]
        if problems:
            raise DataError(*limit_listing(problems), "data.classes: name all of them, in order")
        annotated = [
            AnnotatedImage(
                images[split][row],
                boxes,
                labels,
                [f"{self.path}: row {row}: object {i}" for i in range(len(boxes))],
                split,
                group=self.groups[split][row] if self.groups else None,
            )
            for split, rows in objects.items()
            for row, (boxes, labels) in enumerate(rows)
        ]
        return detection_dataset(self.home, annotated, names, self.options, self.input_spec)

    def _objects(
        self, rows: Rows, column: str, box_format: str
    ) -> Iterator[tuple[list[Box], list[int]]]:
        """Boxes as left, top, right, bottom in pixels, and classes, of each row."""
        for number, value in enumerate(rows.with_format(None)[column]):
            # a list of mappings, or a mapping of lists
            entries = value if isinstance(value, list) else _transpose(value)
            boxes: list[Box] = []
            labels: list[int] = []
            for entry in entries:
                key = next((key for key in USUAL_CLASS_KEYS if key in entry), None)
                box: Any = entry.get("bbox")
                if key is None or type(entry[key]) is not int or not _is_box(box):
                    raise DataError(
                        f"data.label: {self.path}: row {number}: {column} needs bbox, four "
                        f"numbers, and {USUAL_CLASS_KEYS[0]}, a whole number, for each object; got "
                        f"{str(entry)[:200]}"
                    )
                left, top, a, b = map(float, box)
                is_coco = box_format == "coco"
                boxes.append((left, top, left + a, top + b) if is_coco else (left, top, a, b))
                labels.append(entry[key])
            yield boxes, labels

    def _object_classes(
        self, column: str, objects: Mapping[int, Sequence[tuple[list[Box], list[int]]]]
    ) -> list[str]:
        """The names of the classes of objects; numbers where the dataset names none."""
        names = _names_inside(next(iter(self.splits.values())).features[column])
        if names is not None:
            return names
        labels = [label for rows in objects.values() for _, row in rows for label in row]
        return [str(number) for number in range(max(labels, default=-1) + 1)]

    def _write_images(self, column: str) -> dict[int, list[Path]]:
        """The files of the images of each split, as they are encoded."""
        fingerprints = " ".join(rows._fingerprint for rows in self.splits.values())
        folder = unpack_once(
            self.home,
            f"huggingface images {fingerprints} {column}",
            lambda target: self._write_splits(column, target),
        )
        files: dict[int, list[Path]] = {}
        for split, rows in self.splits.items():
            by_number = {int(path.stem): path for path in (folder / str(split)).iterdir()}
            files[split] = [by_number[number] for number in range(len(rows))]
        return files

    def _write_splits(self, column: str, target: Path) -> None:
        library = import_library()
        for split, rows in self.splits.items():
            if not isinstance(rows.features[column], library.Image):
                raise DataError(
                    f"data: {self.path}: the column {column!r} holds {rows.features[column]}, no "
                    "images; cast it to datasets.Image, or name another"
                )
            (target / str(split)).mkdir()
            encoded = rows.select_columns([column]).cast_column(column, library.Image(decode=False))
            for number, row in enumerate(encoded.with_format(None)):
                content = self._encoded_image(row[column], column, number)
                suffix = next((s for b, s in SUFFIX_BY_START.items() if content.startswith(b)), "")
                (target / str(split) / f"{number:08d}{suffix or '.png'}").write_bytes(content)

    def _encoded_image(self, value: Any, column: str, number: int) -> bytes:
        if value and value.get("bytes"):
            return bytes(value["bytes"])
        name: str | None = value.get("path") if value else None
        if not name or not os.path.isfile(name):
            raise DataError(
                f"data: {self.path}: row {number}: {column}: no image, and {name!r} is no file "
                "here; embed the images before they are saved, or copy the files"
            )
        return Path(name).read_bytes()


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 4
        and all(type(side) in (int, float) for side in value)
    )


def _transpose(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A mapping of equally long lists as a list of mappings."""
    lists = {key: list(column) for key, column in value.items() if isinstance(column, list)}
    count = min(map(len, lists.values()), default=0)
    return [{key: column[i] for key, column in lists.items()} for i in range(count)]


def _names_inside(feature: Any) -> list[str] | None:
    """The names of the first ClassLabel inside a column's type; None where there is none."""
    if hasattr(feature, "names"):
        return list(feature.names)
    inner = getattr(feature, "feature", None)
    children: list[Any] = [inner] if inner is not None else []
    if isinstance(feature, Mapping):
        children += [feature[key] for key in USUAL_CLASS_KEYS if key in feature]
    elif isinstance(feature, list):
        children += feature
    return next((names for child in children if (names := _names_inside(child))), None)


def _class_names(rows: Rows, column: str) -> list[str] | None:
    return _names_inside(rows.features[column])


def _label_names(rows: Rows, column: str) -> list[str | None]:
    """The name of each row's class; None for a row whose label is not published."""
    names = _class_names(rows, column)
    values = list(rows.with_format(None)[column])
    if names is not None:
        return [None if value in (None, UNLABELLED) else names[value] for value in values]
    return [None if value is None or value == UNLABELLED else str(value) for value in values]


def write_texts(home: Path, name: str, splits: Mapping[int, Rows]) -> Path:
    """Texts, numbers and classes of each split as JSON lines: the folder with a file for each, or
    the one file where the dataset is not split.

    Raises:
        DataError: there is no such column.
    """
    fingerprints = " ".join(rows._fingerprint for rows in splits.values())

    def write(target: Path) -> None:
        for split, rows in splits.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _text_rows(rows, name)]
            (target / TEXT_FILES[split]).write_text("".join(lines), encoding="utf-8")

    folder = unpack_once(home, f"huggingface texts {fingerprints}", write)
    return folder / TEXT_FILES[UNSPLIT] if UNSPLIT in splits else folder


def _text_rows(rows: Rows, name: str) -> Iterator[dict[str, Any]]:
    """The rows whose class is published, with their columns of texts, numbers and classes."""
    columns = {
        column: _text_column(rows, column)
        for column in rows.column_names
        if _is_text_like(rows.features[column])
    }
    if not columns:
        raise DataError(f"data.path: {name} has no column of texts")
    classes = [column for column in columns if hasattr(rows.features[column], "names")]
    for i in range(len(rows)):
        if all(columns[column][i] is not None for column in classes):
            yield {column: values[i] for column, values in columns.items()}


def _text_column(rows: Rows, column: str) -> Sequence[Any]:
    if hasattr(rows.features[column], "names"):
        return _label_names(rows, column)
    return ["" if value is None else value for value in rows.with_format(None)[column]]


def _is_text_like(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    known = ("string", "large_string", "bool")
    return hasattr(feature, "names") or dtype in known or dtype.startswith(("int", "uint", "float"))
