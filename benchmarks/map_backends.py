"""Seconds in which mean average precision is computed from one epoch's predictions, by each way that is at hand.

    python benchmarks/map_backends.py [--repeats 5]

Predictions are as those of a detector in training: 100 objects an image, the true ones moved a little, and noise with low scores. The
sets have the sizes of validation parts: raccoon (1 class), BCCD (3 classes of cells), and 500 images with the 80 classes of COCO. The
ways take turns in one run; the first turn does not count.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from arms import spread
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from tuner.tasks import _average_precision

SETS = {
    "raccoon": (40, 1, 1),
    "bccd": (73, 3, 13),
    "coco": (500, 80, 7),
}  # images, classes, objects an image
PREDICTED, SIDE = 100, 640.0
Image = tuple[dict[str, Tensor], dict[str, Tensor]]


def make_images(count: int, classes: int, objects: int, seed: int = 0) -> list[Image]:
    """(prediction, truth) of each image."""
    draw = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        corner, size = (
            SIDE * 0.8 * torch.rand(objects, 2, generator=draw),
            20 + 100 * torch.rand(objects, 2, generator=draw),
        )
        labels = torch.randint(classes, (objects,), generator=draw)
        truth = {"boxes": torch.cat([corner, corner + size], 1), "labels": labels}
        rows = torch.randint(objects, (PREDICTED,), generator=draw)
        moved = truth["boxes"][rows] + 8 * torch.randn(PREDICTED, 4, generator=draw)
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        wrong = torch.rand(PREDICTED, generator=draw) < 0.3
        noise = torch.randint(classes, (PREDICTED,), generator=draw)
        scores = torch.rand(PREDICTED, generator=draw).sort(descending=True).values
        images.append(
            (
                {
                    "boxes": moved,
                    "scores": scores,
                    "labels": torch.where(wrong, noise, labels[rows]),
                },
                truth,
            )
        )
    return images


def by_torchmetrics(backend: str) -> Callable[[list[Image], int], dict[str, float]]:
    def score(images: list[Image], classes: int) -> dict[str, float]:
        metric = MeanAveragePrecision(backend=backend)  # type: ignore[arg-type]
        metric.update([predicted for predicted, _ in images], [truth for _, truth in images])
        values = metric.compute()
        return {name: float(values[name]) for name in ("map", "map_50", "map_75", "mar_100")}

    return score


def by_counting(images: Iterable[Image], classes: int) -> dict[str, float]:
    """What the bootstrap of `tuner` does: it matches once and counts."""
    results = _average_precision.sort_detections(_average_precision.match_images(images, classes))
    counts = torch.ones(len(results["objects"]), dtype=torch.int64)
    return _average_precision.score_images(results, counts)


WAYS: dict[str, Callable[[Any, int], dict[str, float]]] = {
    "pycocotools": by_torchmetrics("pycocotools"),
    "faster_coco_eval": by_torchmetrics("faster_coco_eval"),
    "tasks/_average_precision": by_counting,
}


def main(repeats: int) -> None:
    print(
        "| set | way | seconds | ÷ pycocotools | largest difference of a score |\n|---|---|---|---|---|"
    )
    for name, (count, classes, objects) in SETS.items():
        images = make_images(count, classes, objects)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        scores = {}
        for turn in range(repeats + 1):
            for way, score in WAYS.items():
                start = time.perf_counter()
                scores[way] = score(images, classes)
                if turn:
                    seconds[way].append(time.perf_counter() - start)
        base = sorted(seconds["pycocotools"])[repeats // 2]
        for way, taken in seconds.items():
            ratio = sorted(taken)[repeats // 2] / base
            apart = max(
                abs(value - scores["pycocotools"][metric]) for metric, value in scores[way].items()
            )
            print(
                f"| {name} | {way} | {spread(taken, 3)} | {ratio:.2f} | {apart:.1e} |", flush=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args().repeats)
