"""Damaged files of every kind of data: each is read, or refused by a sentence that names it; never a traceback, a hang or a flood."""

import random
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import damaged_files
from tests.helpers.damaged_files import damage, retype_value
from tuner.config.data_options import ImageOptions, SplitOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.data import coco, text, voc, yolo
from tuner.data._labelled_rows import ColumnKeys, read_files
from tuner.data._row_targets import make_items
from tuner.errors import DataError, TunerError
from tuner.preprocessing import image_decoding, mask_decoding
from tuner.preprocessing.splits import assign_and_limit_splits, check_classes

SIDE = ImageInputSpec(16, 16, "bilinear", (0.0,) * 3, (1.0,) * 3)
QUICK, MANY = 40, 250  # files a kind
SECONDS, BYTES = 10.0, 700_000_000  # that one file may take, and all of a kind together


def boxes(load: Callable[..., Any]) -> Callable[[Path], object]:
    def read(root: Path) -> object:
        return load(root / "home", SIDE, "detection", path=str(root), image=ImageOptions())

    return read


def rowed(root: Path) -> object:
    (path,) = (p for p in root.iterdir() if p.is_file())
    keys = ColumnKeys("text", None, text.USUAL_TEXT_COLUMNS, is_labelled=True)
    files = read_files(str(path), keys)
    rows = [cells for file in files.values() for cells in file.examples]
    items = make_items(files, "class", rows)
    check_classes(items)
    return assign_and_limit_splits(items, SplitOptions())


Made = Callable[[Path], Path]
KINDS: dict[str, tuple[Made, Callable[[Path], object], tuple[damaged_files.Mutate, ...]]] = {
    "voc": (damaged_files.write_voc, boxes(voc.load), (damage,)),
    "coco": (damaged_files.write_coco, boxes(coco.load), (damage, retype_value, retype_value)),
    "yolo": (damaged_files.write_yolo, boxes(yolo.load), (damage,)),
    "yolo yaml": (damaged_files.write_yolo_yaml, boxes(yolo.load), (damage,)),
    **{
        f"text {kind}": (
            lambda root, kind=kind: damaged_files.write_table(root, f"t.{kind}"),
            rowed,
            (damage,),
        )  # type: ignore[misc]
        for kind in ("csv", "tsv", "jsonl")
    },
}


def answered(read: Callable[[], object], name: str) -> None:
    """Reads, or raises a TunerError of printable lines that names the file, or says what is wrong with the data as a whole."""
    begin = time.monotonic()
    found: Sequence[str] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read()
    except TunerError as error:
        found = error.problems
        assert found, "no problem is named"
    assert [problem for problem in found if "\n" in problem] == []
    assert not found or any(name in problem or problem.startswith("data") for problem in found), (
        found
    )
    assert time.monotonic() - begin < SECONDS


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tried(kind: str, root: Path, count: int) -> None:
    make, read, mutators = KINDS[kind]
    path = make(root)
    whole, before = path.read_bytes(), peak()
    read(root)  # undamaged
    for seed in range(count):
        draw = random.Random(seed)
        content = draw.choice(mutators)(whole, draw)
        path.write_bytes(content)
        try:
            answered(lambda: read(root), path.name)
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}: {content[:300]!r}") from error
    assert peak() - before < BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_annotations_and_tables_are_answered(kind: str, tmp_path: Path) -> None:
    tried(kind, tmp_path / "set", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_annotations_and_tables_are_answered(kind: str, tmp_path: Path) -> None:
    tried(
        kind, tmp_path / "set", MANY // 4 if kind == "yolo yaml" else MANY
    )  # PyYAML takes its time


VOC, COCO = "<annotation><object><name>cat</name><bndbox><xmin>2</xmin><ymin>1</ymin><xmax>9</xmax><ymax>20</ymax></bndbox></object>{}</annotation>", (
    '{{"images": [{{"id": 1, "file_name": {file}}}], "categories": [{{"id": 1, "name": {name}}}], '
    '"annotations": [{{"image_id": {image}, "category_id": {category}, "bbox": [1, 2, {width}, 4]}}]}}'
)  # fmt: skip


def a_coco(**changed: str) -> bytes:
    return COCO.format(
        **{
            "file": '"0.png"',
            "name": '"cat"',
            "image": "1",
            "category": "1",
            "width": "3",
            **changed,
        }
    ).encode()


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("voc", VOC.format("<size><width>" + "1" * 5000 + "</width><height>24</height></size>").encode(), None),  # int() refuses it
        ("coco", a_coco(image="{}"), "annotations[0]: image_id {} is no image's id"),  # cannot be looked up
        ("coco", a_coco(category="[1]"), "annotations[0]: category_id [1] is no category's id"),
        ("coco", a_coco(width="1" + "0" * 400), "annotations[0]: needs a bbox of four numbers"),  # float() overflows
        ("coco", a_coco(name='"\\ud800"'), "category 1: name '\\ud800' is no text of one line"),  # cannot be encoded
        ("coco", a_coco(name="{}"), "category 1: name {} is no text of one line"),
        ("coco", a_coco(file='"a\\u0000.png"'), "image 1: file_name: 'a\\x00.png' leaves the folder of the images, or is no file's name"),
        ("coco", a_coco(file=f'"{"a" * 300}"'), "or is no file's name"),
        ("yolo", b"1" * 5000 + b" 0.5 0.5 0.1 0.1\n", "0.txt:1: class '1111"),
        ("yolo yaml", b"train: images\nnames: {a: cat, 1: dog}\n", "names: expected the numbers 0 to 1"),  # cannot be sorted
        ("yolo yaml", b"train: images\nnames: " + b"[" * 3000, "not YAML that names classes and folders"),  # nests too deep for PyYAML
        ("yolo yaml", b"train: images\nnames: [a]\nnc: " + b"1" * 5000, "not YAML that names classes and folders"),
        ("yolo yaml", b"train: " + b"i" * 3000 + b"\nnames: [a]\n", "does not exist"),  # the system refuses to look
        ("yolo yaml", b"a: &a [x, x]\nnames: [*a, *a]\ntrain: images\n", "aliases are refused"),
    ],
)  # fmt: skip
def test_what_once_ended_in_a_traceback(
    kind: str, content: bytes, says: str | None, tmp_path: Path
) -> None:
    make, read, _ = KINDS[kind]
    path = make(tmp_path / "set")
    path.write_bytes(content)
    if says is None:
        read(tmp_path / "set")
        return
    with pytest.raises(DataError) as error:
        read(tmp_path / "set")
    assert path.name in error.value.problems[0] and says in error.value.problems[0]


def looked_at(path: Path) -> None:
    """As an image and as a mask: pixels, or one line that names the file."""
    mask = mask_decoding.make_mask_decoder("m", None, lambda _, values, __: values)
    for attempt in (image_decoding.try_decode, mask.try_decode):
        found = attempt(path, SIDE)
        assert not isinstance(found, str) or (
            found.startswith(f"{path}: ") and "\n" not in found
        ), found
        image_decoding.upright_size(path)


def looked(path: Path, count: int) -> None:
    whole, before = path.read_bytes(), peak()
    with image_decoding.silence_pillow():
        for seed in range(count):
            draw = random.Random(seed)
            content = damage(whole, draw)
            path.write_bytes(content)
            begin = time.monotonic()
            try:
                looked_at(path)
            except BaseException as error:
                raise AssertionError(f"{path.name}, seed {seed}: {content[:300]!r}") from error
            assert time.monotonic() - begin < SECONDS
    assert peak() - before < BYTES


def test_damaged_images_and_masks_are_answered(tmp_path: Path) -> None:
    for path in (
        *damaged_files.write_pictures(tmp_path / "a"),
        *damaged_files.write_masks(tmp_path / "b"),
    ):
        looked(path, 15)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(17))
def test_many_damaged_images_and_masks_are_answered(number: int, tmp_path: Path) -> None:
    looked(
        [*damaged_files.write_pictures(tmp_path / "a"), *damaged_files.write_masks(tmp_path / "b")][
            number
        ],
        MANY,
    )
