"""A small data set of triangles that overlap, with COCO's masks: what instance segmentation is tested on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_masks

from tuner.preprocessing.instance_masks import decode_run_lengths

WIDTH, HEIGHT = 64, 48
INK = ((220, 20, 20), (20, 20, 220))


def triangles(number: int) -> list[list[float]]:
    """Two triangles that overlap, as x, y, x, y, x, y."""
    left, top = 4 + number % 5, 3 + number % 7
    first = [left, top, left + 30, top, left, top + 34]
    second = [left + 4, top + 4, left + 36, top + 36, left + 6, top + 36]
    return [list(map(float, first)), list(map(float, second))]


def mask_of(polygon: list[float]) -> np.ndarray[Any, Any]:
    (code,) = coco_masks.frPyObjects([polygon], HEIGHT, WIDTH)
    return decode_run_lengths(code).astype(np.uint8)


def write_instances(root: Path, count: int = 20, *, as_lengths: bool = False) -> Path:
    """Images of two triangles each, the second one in front, with COCO's file."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        pixels = np.full((HEIGHT, WIDTH, 3), 110 + number, np.uint8)
        for label, polygon in enumerate(triangles(number)):
            mask = mask_of(polygon)
            pixels[mask == 1] = INK[label]
            xs, ys = polygon[::2], polygon[1::2]
            shape: Any = [polygon]
            if as_lengths:
                code = coco_masks.encode(np.asfortranarray(mask))
                shape = {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}
            annotations.append(
                {
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
                    "segmentation": shape,
                }
            )
        Image.fromarray(pixels).save(root / "images" / f"{number:02d}.png")
        images.append({"id": number, "file_name": f"{number:02d}.png"})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return root
