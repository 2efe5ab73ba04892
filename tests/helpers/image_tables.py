"""A few made-up images and a table of them: a class, labels, numbers, groups and weights, which their colours tell."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": 0, "green": 1, "blue": 2}


def write_table(folder: Path, count: int = 40, name: str = "photos.csv") -> Path:
    """`folder` with images, and the table beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = ["image,labels,kind,age,height,person,weight"]
    for i in range(count):
        bits = i % 8
        labels = [colour for colour, bit in COLOURS.items() if bits >> bit & 1]
        pixels = random.integers(0, 40, (24, 24, 3))
        for colour in labels:
            pixels[..., COLOURS[colour]] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
        age = 20 + 5 * bits + random.random()
        row = [
            f"{i:03}.png",
            "|".join(labels),
            "ab"[bits & 1],
            f"{age:.2f}",
            f"{1e3 * (bits & 4):.0f}",
        ]
        lines.append(",".join([*row, f"p{i // 2}", str(1 + i % 2)]))
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path
