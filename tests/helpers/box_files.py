"""Small data sets of rectangles on grey, as files: what detectors are tested on."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

INK = {"red": (220, 20, 20), "blue": (20, 20, 220)}
Object = tuple[str, tuple[int, int, int, int]]


def draw_scene(
    path: Path, objects: Sequence[Object], size: tuple[int, int] = (64, 48), seed: int = 0
) -> None:
    """Filled rectangles (left, top, right, bottom; the last row and column outside) on noise, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (
        np.random.default_rng(seed).integers(90, 130, (size[1], size[0], 1), np.uint8).repeat(3, 2)
    )
    for name, (left, top, right, bottom) in objects:
        pixels[top:bottom, left:right] = INK[name]
    Image.fromarray(pixels).save(path)


def make_scenes(count: int) -> list[list[Object]]:
    """Of each image its objects: one red rectangle, and on every second a blue one."""
    rng = np.random.default_rng(0)
    found: list[list[Object]] = []
    for i in range(count):
        x, y = (int(v) for v in rng.integers(0, 12, 2))
        red: Object = ("red", (x, y, x + 18, y + 20))
        found.append([red, ("blue", (x + 30, y + 8, x + 50, y + 34))] if i % 2 else [red])
    return found


def voc_xml(objects: Sequence[Object], size: tuple[int, int] = (64, 48)) -> str:
    rows = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, (left, top, right, bottom) in objects
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{rows}</annotation>"


def write_voc(root: Path, count: int = 20) -> Path:
    (root / "annotations").mkdir(parents=True)
    for i, objects in enumerate(make_scenes(count)):
        draw_scene(root / "images" / f"{i:02d}.png", objects, seed=i)
        (root / "annotations" / f"{i:02d}.xml").write_text(voc_xml(objects))
    return root


def write_coco(root: Path, count: int = 20) -> Path:
    """The same as `voc`, but for ids that begin at 7."""
    images, annotations = [], []
    for i, objects in enumerate(make_scenes(count)):
        draw_scene(root / "images" / f"{i:02d}.png", objects, seed=i)
        images.append({"id": 100 + i, "file_name": f"{i:02d}.png", "width": 64, "height": 48})
        for name, (left, top, right, bottom) in objects:
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {"image_id": 100 + i, "category_id": {"blue": 7, "red": 9}[name], "bbox": box}
            )
    categories = [{"id": 7, "name": "blue"}, {"id": 9, "name": "red"}]
    (root / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


def write_yolo(root: Path, count: int = 20) -> Path:
    """The same as `voc`."""
    (root / "labels").mkdir(parents=True)
    (root / "data.yaml").write_text("train: images\nnames: [blue, red]\n")
    for i, objects in enumerate(make_scenes(count)):
        draw_scene(root / "images" / f"{i:02d}.png", objects, seed=i)
        lines = [
            f"{['blue', 'red'].index(name)} {(x + r) / 2 / 64:.9f} {(y + b) / 2 / 48:.9f} {(r - x) / 64:.9f} {(b - y) / 48:.9f}\n"
            for name, (x, y, r, b) in objects
        ]
        (root / "labels" / f"{i:02d}.txt").write_text("".join(lines))
    return root
