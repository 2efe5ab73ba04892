"""Small real files, and seeded damage to them: what a disk, an editor, a download or somebody of ill will makes of a file."""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUMBER = re.compile(rb"-?\d+(\.\d+)?")
ODD = (
    b"-1", b"0", b"1e999", b"-1e999", b"nan", b"NaN", b"Infinity", b"1e-320", b"99999999999999999999999", b"1" * 5000, b"0x10", b"1_0",
    b"null", b"true", b"[]", b"{}", b"\"\"", b"", b" ", b"\x00", b"\xff", b"\xe2\x82", "é猫\u202e".encode(), "٣".encode(), b"../../../../etc/passwd", b"/etc/passwd",
    b"<!ENTITY x 'y'>", b"<![CDATA[", b"<a>" * 3000, b"[" * 30_000, b"{\"a\":" * 30_000, b"\"", b"'", b",", b"\t", b"\r", b"\n\n", b"&amp;&#0;", b"&#x110000;", b"\xef\xbb\xbf",
)  # fmt: skip
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1.5, 1e400, -1e308, float("nan"), 10**400, "", "x", "\ud800", "../../../../etc/passwd", "\x00", [], {}, [[]], {"a": 1}, [None] * 4, ["1"] * 4)  # fmt: skip


def damage(data: bytes, draw: random.Random) -> bytes:  # noqa: C901 (one branch a kind)
    """One to three kinds of damage to a file's bytes."""
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 64, 512))
        kind = draw.randrange(10)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and data:
            one = bytearray(data)
            one[at % len(data)] ^= 1 << draw.randrange(8)
            data = bytes(one)
        elif kind == 2:
            data = data[:at] + data[at + length :]
        elif kind == 3:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == 4:
            data = data[:at] + bytes(length) + data[at + length :]
        elif kind == 5:
            other = draw.randrange(len(data) + 1)
            data = data[:at] + data[other : other + length] + data[at + length :]
        elif kind == 6:
            data = data[:at] + draw.choice(ODD) + data[at + draw.choice((0, 1, 4)) :]
        elif kind in (7, 8):
            found = list(NUMBER.finditer(data))
            if found:
                which = draw.choice(found)
                data = data[: which.start()] + draw.choice(ODD) + data[which.end() :]
        else:
            data = recode_image(data, draw)
    return data


def recode_image(data: bytes, draw: random.Random) -> bytes:
    """The text in another encoding, or with other line ends."""
    text = data.decode("utf-8", errors="replace")
    to = draw.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig", "crlf", "cr"))
    ends = {"crlf": "\r\n", "cr": "\r"}
    return (
        text.replace("\n", ends[to]).encode() if to in ends else text.encode(to, errors="replace")
    )


def retype_value(data: bytes, draw: random.Random) -> bytes:
    """A JSON tree with one to three of its values removed, doubled, or replaced by another kind's."""
    tree = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(tree))
        inner, key = draw.choice(places)
        kind = draw.randrange(4)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[key]))
        else:
            inner[key] = copy.deepcopy(draw.choice(VALUES))
        if not list(_places(tree)):
            break
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    for key, value in (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    ):
        yield tree, key
        yield from _places(value)


# -- files that are whole


def make_picture(seed: int, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def write_pictures(folder: Path) -> list[Path]:
    """An image of each format and of some odd modes."""
    folder.mkdir(parents=True, exist_ok=True)
    one = make_picture(0)
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("a.jpg", one, {}), ("prog.jpg", one, {"progressive": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}), ("cmyk.jpg", one.convert("CMYK"), {}),
        ("a.png", one, {}), ("alpha.png", one.convert("RGBA"), {}), ("palette.png", one.convert("P"), {"transparency": 0}),
        ("deep.png", Image.fromarray((np.arange(576).reshape(24, 24) * 100).astype(np.uint16)), {}),
        ("a.bmp", one, {}), ("a.gif", one, {"save_all": True, "append_images": [make_picture(1)]}), ("a.webp", one, {}), ("a.tif", one, {"compression": "tiff_lzw"}), ("a.ppm", one, {}),
    ]  # fmt: skip
    for name, image, options in made:
        image.save(folder / name, **options)
    return [folder / name for name, *_ in made]


def write_masks(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    ids = Image.fromarray((np.arange(576).reshape(24, 24) % 3).astype(np.uint8))
    ids.save(folder / "grey.png")
    indexed = ids.convert("P")
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    indexed.save(folder / "palette.png")
    ids.convert("1").save(folder / "bits.png")
    ids.save(folder / "a.gif")
    ids.save(folder / "a.bmp")
    return sorted(folder.iterdir())


def write_image_folder(folder: Path, count: int = 12) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        make_picture(i).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(count)]


def write_voc(root: Path) -> Path:
    """A set of twelve annotated images; the file that is to be damaged."""
    write_image_folder(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for i in range(12):
        (root / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.png</filename><size><width>24</width><height>24</height><depth>3</depth></size>"
            f"<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>{1 + i}</ymin><xmax>9</xmax><ymax>20</ymax></bndbox></object>"
            "<object><name>dog</name><bndbox><xmin>5.5</xmin><ymin>3</ymin><xmax>11</xmax><ymax>12</ymax></bndbox></object></annotation>\n"
        )
    return root / "Annotations" / "0.xml"


def write_coco(root: Path) -> Path:
    write_image_folder(root / "images")
    tree = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 24} for i in range(12)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + 6 * (i % 2), "bbox": [2, 3.5, 10, 8], "area": 80, "iscrowd": 0, "segmentation": [[2, 3, 12, 3, 12, 11]]}
            for i in range(12)
        ],
    }  # fmt: skip
    (root / "all.json").write_text(json.dumps(tree))
    return root / "all.json"


def write_yolo(root: Path) -> Path:
    write_image_folder(root / "images")
    (root / "labels").mkdir()
    for i in range(12):
        (root / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.25 0.75 0.1 0.2\n")
    (root / "data.yaml").write_text("path: .\ntrain: images\nnames: {0: cat, 1: dog}\n")
    return root / "labels" / "0.txt"


def write_yolo_yaml(root: Path) -> Path:
    write_yolo(root)
    return root / "data.yaml"


def write_table(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    rows = [
        (
            f'a text, number {i}, "quoted"\nand more' if i % 5 == 0 else f"text {i} é",
            "ham" if i % 2 else "spam",
        )
        for i in range(40)
    ]
    path = root / name
    if name.endswith("csv"):
        lines = [
            "text,label",
            *('"' + text.replace('"', '""') + f'",{label}' for text, label in rows),
        ]
    elif name.endswith("tsv"):
        lines = ["text\tlabel", *(f"{' '.join(text.split())}\t{label}" for text, label in rows)]
    else:
        lines = [
            json.dumps({"text": text, "label": label, "n": i})
            for i, (text, label) in enumerate(rows)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


Mutate = Callable[[bytes, random.Random], bytes]
