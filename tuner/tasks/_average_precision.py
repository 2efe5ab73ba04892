"""COCO's mean average precision of any choice of images, from matches that are found once.

Matching detections with true objects takes nearly all the time of the metric, and does not depend
on which other images are scored. So a bootstrap matches once and scores each draw of images by
counting. The rules are those of pycocotools (Lin et al., Microsoft COCO, ECCV 2014) for objects of
all sizes, and at most 100 detections of a class in an image.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torchvision.ops import box_iou

from tuner.core.detectors import Objects
from tuner.core.example_results import ExampleResults

# in float32 first, as torchmetrics makes them: recalls are often equal to one of these
IOU_THRESHOLDS = torch.linspace(0.5, 0.95, 10).double()  # a match overlaps so much
RECALLS = torch.linspace(0, 1, 101).double()  # at which precision is read
MAX_DETECTIONS = 100  # of a class in an image


def match_images(images: Iterable[tuple[Objects, Objects]], class_count: int) -> ExampleResults:
    """Matches the detections of each image with its true objects.

    Args:
        images: (prediction, truth) of each of n images.
        class_count: The number of classes.

    Returns:
        `objects`, int64 (n, classes): the true objects of each class in each image. Of each of d
        detections: `image` and `label`, int64 (d,); `score`, float32 (d,); `hit`, bool
        (d, IoU thresholds): whether it matches an object.
    """
    columns: dict[str, list[Tensor]] = {"image": [], "label": [], "score": [], "hit": []}
    objects = []
    for number, (predicted, truth) in enumerate(images):
        objects.append(torch.bincount(truth["labels"], minlength=class_count))
        for label in torch.unique(predicted["labels"]):
            of_class = predicted["labels"] == label
            order = predicted["scores"][of_class].argsort(descending=True, stable=True)
            order = order[:MAX_DETECTIONS]
            true_boxes = truth["boxes"][truth["labels"] == label]
            hit = match_boxes(predicted["boxes"][of_class][order], true_boxes)
            columns["image"].append(torch.full((len(order),), number))
            columns["label"].append(label.expand(len(order)))
            columns["score"].append(predicted["scores"][of_class][order])
            columns["hit"].append(hit)
    empty = {
        "image": torch.zeros(0, dtype=torch.int64),
        "label": torch.zeros(0, dtype=torch.int64),
        "score": torch.zeros(0),
        "hit": torch.zeros(0, len(IOU_THRESHOLDS), dtype=torch.bool),
    }
    joined = {name: torch.cat([empty[name], *parts]) for name, parts in columns.items()}
    return {"objects": torch.stack(objects), **joined}


def match_boxes(detections: Tensor, true_boxes: Tensor) -> Tensor:
    """Which detections match an object, at each IoU threshold: bool (d, IoU thresholds).

    Each detection in turn takes the free object that it overlaps most.

    Args:
        detections: float (d, 4), the highest score first: left, top, right, bottom.
        true_boxes: float (k, 4), the objects of the same class and image.
    """
    hit = torch.zeros(len(detections), len(IOU_THRESHOLDS), dtype=torch.bool)
    if not len(detections) or not len(true_boxes):
        return hit
    overlaps = box_iou(detections.double(), true_boxes.double())
    free = torch.ones(len(IOU_THRESHOLDS), len(true_boxes), dtype=torch.bool)
    thresholds = torch.arange(len(IOU_THRESHOLDS))
    for row, overlap in enumerate(overlaps):
        available = overlap.where(free, -1.0)
        # pycocotools takes the last of several objects with an equal overlap
        best = len(true_boxes) - 1 - available.flip(1).argmax(1)
        hit[row] = available[thresholds, best] >= IOU_THRESHOLDS
        free[thresholds[hit[row]], best[hit[row]]] = False
    return hit


def sort_detections(results: ExampleResults) -> ExampleResults:
    """The results with the detections of each class in a row, the highest score first.

    So that the draws of a bootstrap need not sort.
    """
    order = results["score"].argsort(descending=True, stable=True)
    order = order[results["label"][order].argsort(stable=True)]
    detections = {name: results[name][order] for name in ("image", "label", "score", "hit")}
    return {"objects": results["objects"], **detections}


def score_images(results: ExampleResults, counts: Tensor) -> dict[str, float]:
    """`map`, `map_50`, `map_75` and `mar_100` of images of which each is there `counts` times.

    They are means over the classes that have objects, and 0 if there is none.

    Args:
        results: What `sort_detections` gave for n images.
        counts: int64 (n,).
    """
    object_counts = (results["objects"] * counts[:, None]).sum(0)
    weights = counts.double()[results["image"]][:, None]
    per_label = torch.bincount(results["label"], minlength=len(object_counts)).tolist()
    precisions, recalls = [], []
    chunks = (torch.split(results["hit"], per_label), torch.split(weights, per_label))
    for count, hit, weight in zip(object_counts.tolist(), *chunks, strict=True):
        if count:
            precision, recall = average_precision(hit, weight, count)
            precisions.append(precision)
            recalls.append(recall)
    if not precisions:
        return dict.fromkeys(("map", "map_50", "map_75", "mar_100"), 0.0)
    precision, recall = torch.stack(precisions).mean(0), torch.stack(recalls).mean(0)
    return {
        "map": float(precision.mean()),
        "map_50": float(precision[0]),
        "map_75": float(precision[5]),
        "mar_100": float(recall.mean()),
    }


def average_precision(hit: Tensor, weight: Tensor, object_count: int) -> tuple[Tensor, Tensor]:
    """Average precision and recall of a class at each IoU threshold: float64 (IoU thresholds,).

    Args:
        hit: bool (d, IoU thresholds), the detections of the class, the highest score first.
        weight: float64 (d, 1), how often each detection is there.
        object_count: How many true objects there are, above 0.
    """
    if not len(hit):
        nothing = torch.zeros(len(IOU_THRESHOLDS), dtype=torch.float64)
        return nothing, nothing
    hits = (hit * weight).cumsum(0).T
    all_detections = weight.cumsum(0).T
    recall = (hits / object_count).contiguous()
    precision = hits / all_detections.clamp(min=1)
    # precision at a recall is the highest at that recall or a higher one
    envelope = precision.flip(1).cummax(1).values.flip(1)
    reached = torch.searchsorted(recall, RECALLS.expand(len(recall), -1).contiguous())
    padded = torch.nn.functional.pad(envelope, (0, 1))  # 0 at recalls that are not reached
    return padded.gather(1, reached).mean(1), recall[:, -1]
