"""Writes images with one to five dots, and a list of them: python make_dots.py FOLDER [IMAGES]."""

import csv
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 32  # pixels
CELLS = [(x, y) for x in range(4) for y in range(4)]
WORDS = ("one", "two", "three", "four", "five")


def main(folder: Path, images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    rows = []
    for number in range(images):
        count = number % len(WORDS) + 1
        background = tuple(chance.randrange(64) for _ in "RGB")  # so that no two images are equal
        image = Image.new("RGB", (SIDE, SIDE), background)
        for x, y in chance.sample(CELLS, count):
            left, top = 8 * x + chance.randint(0, 2), 8 * y + chance.randint(0, 2)
            ImageDraw.Draw(image).ellipse((left, top, left + 4, top + 4), fill="white")
        name = f"{number:04}.png"
        image.save(folder / name)
        rows.append((name, WORDS[count - 1]))
    with (folder / "dots.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400)
