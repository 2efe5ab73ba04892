"""Looks at a folder or file of data and says as what it can be read. Only names are read, the first
lines of tables, and the sizes of a few images.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from tuner.commands import table_scan
from tuner.config import plugins, related_tasks
from tuner.data._labelled_rows import USUAL_LABEL_COLUMNS
from tuner.data._rows import KIND_BY_SUFFIX, TableRows, read_rows
from tuner.data._tagged_files import TAGGED_SUFFIXES, has_tags, read_tagged_file
from tuner.errors import DataError
from tuner.preprocessing.data_paths import resolve_path
from tuner.preprocessing.image_decoding import FORMATS, SUFFIXES
from tuner.preprocessing.splits import SPLIT_BY_NAME, TEST, TRAIN, VALID, group_by_split

SIZED_IMAGES = 20  # images whose sizes are read
MAX_JSON_BYTES = 500_000_000
MASK_FOLDERS = {"masks", "mask", "ground_truth", "groundtruth", "labels", "annotations", "gt"}
IMAGE_FOLDERS = {"images", "image", "imgs", "training_images", "jpegimages", "photos", "input"}
DATA_YAMLS, CLASS_LISTS = ("data.yaml", "data.yml"), ("classes.txt", "obj.names")
IMAGE_TASKS = {"class": "classification", "labels": "multilabel", "numbers": "regression"}
TEXT_TASKS = {target: f"text_{task}" for target, task in IMAGE_TASKS.items()}


@dataclass(frozen=True)
class DataReading:
    """One way to read some data.

    `source` is the data plug-in and `options` are its keys beside `path`. `examples` counts those
    of all splits, `class_sizes` by class where an example has one, `splits` are the splits that
    the data has already. `side` is the median shorter side of the images, pixels; None for texts.
    `label`: what tells this reading from others, such as `voc/detection`. `empty_classes`: those
    whose folders hold no image.
    """

    task: str
    source: str
    path: str
    examples: int
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    class_sizes: dict[str, int] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    side: int | None = None
    empty_classes: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """What was seen, in words."""
        kind = "texts" if self.side is None else "images"
        word = related_tasks.output_word(self.task)
        classes = f" of {len(self.class_sizes)} {word}" if self.class_sizes else ""
        inside = f", split into {' and '.join(self.splits)}" if self.splits else ""
        return f"{self.examples:,} {kind}{classes}{inside}: {self.task.replace('_', ' ')}"


def scan_data(given: str) -> list[DataReading]:
    """The ways in which a folder or file can be read, none where it is no data.

    Raises DataError where nothing is there, or a table is damaged.
    """
    path, given = resolve_path(given), str(Path(given))
    if path.is_file():
        return list(_scan_file(path, given))
    annotated = [
        *_scan_voc(path, given),
        *_scan_coco(path, given),
        *_scan_yolo(path, given),
        *_scan_masks(path, given),
    ]
    return annotated or [*_scan_classes(path, given), *_scan_split_tables(path, given)]


# -- folders of images


def _scan_classes(root: Path, given: str) -> Iterator[DataReading]:
    """Images in a folder for each class, with or without folders for the splits."""
    splits = _split_folders(root)
    images: dict[str, list[Path]] = {}
    for folder in splits.values() if TRAIN in splits else [root]:
        for child in _folders(folder):
            images.setdefault(child.name, []).extend(_images_below(child))
    class_sizes = {name: len(paths) for name, paths in sorted(images.items()) if paths}
    if len(class_sizes) < 2:
        return
    every = [path for paths in images.values() for path in paths]
    yield DataReading(
        "classification",
        "folder",
        given,
        len(every),
        "folder/classification",
        class_sizes=class_sizes,
        splits=_split_words(splits),
        side=median_side(every),
        empty_classes=tuple(sorted(images.keys() - class_sizes.keys())),
    )


def _scan_masks(root: Path, given: str) -> Iterator[DataReading]:
    """Two folders whose files have equal names but for the ending, one of them with masks."""
    splits = _split_folders(root)
    base = splits.get(TRAIN, root)
    masks = [f for f in _folders(base) if f.name.lower() in MASK_FOLDERS]
    images = [f for f in _folders(base) if f.name.lower() in IMAGE_FOLDERS]
    if len(masks) != 1 or len(images) != 1:
        return
    stems = [{p.stem for p in _images_below(folder)} for folder in (images[0], masks[0])]
    if not stems[0] & stems[1]:
        return
    folders = {"images": images[0].name, "masks": masks[0].name}
    inner = _split_folders(images[0]) if TRAIN not in splits else splits
    bases = splits.values() if TRAIN in splits else [root]
    every = [p for b in bases for p in _images_below(b / images[0].name)]
    yield DataReading(
        "segmentation",
        "masks",
        given,
        len(every),
        "masks/segmentation",
        options={key: name for key, name in folders.items() if name != key},
        splits=_split_words(inner),
        side=median_side(every),
    )


# -- annotations of boxes


def _scan_voc(root: Path, given: str) -> Iterator[DataReading]:
    by_name = {f.name: f for f in _folders(root)}
    images = by_name.get("JPEGImages") or by_name.get("images")
    notes = by_name.get("Annotations") or by_name.get("annotations")
    if images is None:
        return
    every = list(_images_below(images))
    lists = root / "ImageSets" / "Main"
    names = {"train": "train", "val": "valid", "test": "test"}
    splits = tuple(word for n, word in names.items() if (lists / f"{n}.txt").is_file())
    count = sum(1 for _ in notes.glob("*.xml")) if notes else 0
    if count:
        yield DataReading(
            "detection",
            "voc",
            given,
            count,
            "voc/detection",
            splits=splits,
            side=median_side(every),
        )
    masks = by_name.get("SegmentationClass")
    count = len(list(_images_below(masks))) if masks else 0
    if count:
        yield DataReading(
            "segmentation", "voc", given, count, "voc/segmentation", side=median_side(every)
        )


def _scan_coco(root: Path, given: str) -> Iterator[DataReading]:
    files = [*root.glob("*.json"), *root.glob("annotations/*.json")]
    files += root.glob("*/_annotations.coco.json")
    counts = {file: count for file in files if (count := coco_images(file))}
    if counts:
        splits = {_split_of(file) for file in counts} - {None}
        words = tuple(name for name in ("train", "valid", "test") if name in splits)
        side = median_side(list(_images_below(root)))
        total = sum(counts.values())
        yield DataReading(
            "detection", "coco", given, total, "coco/detection", splits=words, side=side
        )


def coco_images(file: Path) -> int:
    """How many images a JSON file of COCO's boxes has; 0 for any other file."""
    if file.stat().st_size > MAX_JSON_BYTES:
        return 0
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return 0
    is_coco = isinstance(content, dict) and "annotations" in content
    images = content.get("images") if is_coco else None
    return len(images) if isinstance(images, list) else 0


def _scan_yolo(root: Path, given: str) -> Iterator[DataReading]:
    is_described = any((root / name).is_file() for name in DATA_YAMLS)
    has_classes = any((root / name).is_file() for name in CLASS_LISTS)
    if not (is_described or (has_classes and any(root.rglob("*.txt")))):
        return
    every = list(_images_below(root))
    if every:
        yield DataReading(
            "detection", "yolo", given, len(every), "yolo/detection", side=median_side(every)
        )


# -- texts


def _scan_file(path: Path, given: str) -> Iterator[DataReading]:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        yield from _scan_yolo(path.parent, given)
    elif suffix == ".json" and (count := coco_images(path)):
        side = median_side(list(_images_below(path.parent)))
        yield DataReading("detection", "coco", given, count, "coco/detection", side=side)
    elif suffix in TAGGED_SUFFIXES:
        yield _read_tagged({TRAIN: path}, given)
    elif suffix in KIND_BY_SUFFIX or suffix == "":
        yield from _scan_tables({TRAIN: path}, given)


def _read_tagged(files: dict[int, Path], given: str) -> DataReading:
    count = sum(len(read_tagged_file(path).texts) for path in files.values())
    return DataReading(
        "token_classification",
        "tagged_text",
        given,
        count,
        "tagged_text/token_classification",
        splits=_split_words(files) if len(files) > 1 else (),
    )


def _scan_split_tables(root: Path, given: str) -> Iterator[DataReading]:
    suffixes = {*KIND_BY_SUFFIX, *TAGGED_SUFFIXES}
    files = [p for p in root.iterdir() if p.is_file() and p.suffix.lower() in suffixes]
    by_split = {split: paths[0] for split, paths in group_by_split(files).items()}
    if TRAIN not in by_split:
        return
    if by_split[TRAIN].suffix.lower() in TAGGED_SUFFIXES:
        yield _read_tagged(by_split, given)
    else:
        yield from _scan_tables(by_split, given)


def _scan_tables(files: dict[int, Path], given: str) -> Iterator[DataReading]:
    """Images or texts: with a column of labels, with several that could be it, or without one."""
    usual_texts = plugins.read_constant("data", "text", "USUAL_TEXT_COLUMNS")
    usual_labels = USUAL_LABEL_COLUMNS
    usual = (*usual_texts, *usual_labels)
    rows = read_rows(files[TRAIN], None, usual)
    if has_tags(rows.columns):
        yield _read_tagged(files, given)
        return
    keys: dict[str, Any] = {}
    if table_scan.has_unusual_header(rows):
        rows, keys = read_rows(files[TRAIN], True, usual), {"header": True}
    others = [read_rows(f, keys.get("header"), usual) for s, f in files.items() if s != TRAIN]
    count = len(rows.values) + sum(len(table.values) for table in others)
    splits = _split_words(files) if len(files) > 1 else ()
    base = files[TRAIN].parent
    usual_images = plugins.read_constant("data", "table", "USUAL_IMAGE_COLUMNS")
    images = table_scan.column_of_images(rows, usual_images, base)
    if images is not None:
        yield from _scan_image_rows(rows, others, images, given, splits, keys)
        return
    text, labels = table_scan.guess_columns(rows, usual_texts, usual_labels)
    if text is None:
        return
    for label in labels:
        options = keys | ({} if text.lower() in usual_texts else {"text": text})
        if label.lower() not in usual_labels:
            options["label"] = label
        column = table_scan.read_column(rows, label)
        target = "class" if column is None or column.target == "numbers" else column.target
        if column is not None and column.target == "numbers" and label.lower() in usual_labels:
            target = "numbers"
        task = TEXT_TASKS[target]
        sizes = table_scan.count(table_scan.column(rows, label)) if column is None else column.sizes
        name = f"text/{task}" + ("" if len(labels) == 1 else f"/{label}")
        yield DataReading(task, "text", given, count, name, options, sizes, splits)
    if not labels:
        options = keys | ({} if text.lower() in usual_texts else {"text": text})
        yield DataReading(
            "text_generation", "text", given, count, "text/text_generation", options, {}, splits
        )


def _scan_image_rows(
    rows: TableRows,
    others: list[TableRows],
    images: tuple[str, str | None],
    given: str,
    splits: tuple[str, ...],
    keys: dict[str, Any],
) -> Iterator[DataReading]:
    """Images that a table lists, by each of its columns that may hold labels."""
    image, folder = images
    options = keys | {"image": image} | ({} if folder is None else {"folder": folder})
    extra = table_scan.extra_columns(rows, image)
    if splits:
        extra.pop("split", None)
    given_splits = splits
    if "split" in extra:
        names = {cell.lower() for cell in table_scan.column(rows, extra["split"])}
        given_splits = _split_words({SPLIT_BY_NAME[name]: Path() for name in names})
    usual = USUAL_LABEL_COLUMNS
    readings = table_scan.label_columns(rows, {image, *extra.values()}, usual)
    base = Path(folder) if folder is not None else rows.path.parent
    paths = [path for cell in table_scan.column(rows, image) if (path := base / cell).is_file()]
    side = median_side(paths or list(_images_below(base)))
    count = len(rows.values) + sum(len(table.values) for table in others)
    for reading in readings:
        task = IMAGE_TASKS[reading.target]
        one = isinstance(reading.label, str)
        tail = f"/{reading.label if one else 'columns'}" if len(readings) > 1 else ""
        label = {"label": reading.label if one else list(reading.label)}
        yield DataReading(
            task, "table", given, count, f"table/{task}{tail}", options | label | extra,
            reading.sizes, given_splits, side,
        )  # fmt: skip


# -- files


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _split_folders(root: Path) -> dict[int, Path]:
    """The folder of each split; empty where the folders are something else."""
    folders = _folders(root)
    groups = group_by_split(folders)
    if TRAIN not in groups or not _folders(groups[TRAIN][0]):
        return {}
    return {split: paths[0] for split, paths in groups.items()}


def _split_words(splits: dict[int, Path]) -> tuple[str, ...]:
    words = {TRAIN: "train", VALID: "valid", TEST: "test"}
    return tuple(words[split] for split in sorted(splits) if split in words)


def _split_of(file: Path) -> str | None:
    """The split that a COCO file's name or folder states."""
    words = {TRAIN: "train", VALID: "valid", TEST: "test"}
    stems = (file.stem.removeprefix("instances_"), file.parent.name)
    for name, split in SPLIT_BY_NAME.items():
        if any(stem.lower().startswith(name) for stem in stems):
            return words[split]
    return None


def _images_below(folder: Path) -> Iterator[Path]:
    """The images below a folder, in a fixed order; hidden ones are left out."""
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                yield path


def median_side(paths: list[Path]) -> int:
    """The median shorter side of some of these images, pixels. Raises DataError."""
    step = max(1, len(paths) // SIZED_IMAGES)
    sides, problem = [], ""
    for path in paths[::step][:SIZED_IMAGES]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            problem = f"{path}: {error}"
    if not sides:
        raise DataError(problem or "no image is there")
    return round(median(sides))
