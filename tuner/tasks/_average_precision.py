"""COCO's mean average precision of any choice of images, from matches that are found once.

Matching detections with true objects takes nearly all the time of the metric, and does not depend
on which other images are scored. So a bootstrap matches once and scores each draw of images by
counting. The rules are those of pycocotools (Lin et al., Microsoft COCO, ECCV 2014) for objects of
all sizes, and at most 100 detections of a class in an image.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torchvision.ops import box_iou

from tuner.core.detectors import Objects
from tuner.core.example_results import ExampleResults

# in float32 first, as torchmetrics makes them: recalls are often equal to one of these
IOU_THRESHOLDS = torch.linspace(0.5, 0.95, 10).double()  # a match overlaps so much
RECALLS = torch.linspace(0, 1, 101).double()  # at which precision is read
MAX_DETECTIONS = 100  # of a class in an image
FLAGS = ("hit", "ignored")
Matcher = Callable[[Objects, Objects], tuple[Tensor, Tensor]]
"""`match_objects`, or what matches detections by something else."""


def match_images(
    images: Iterable[tuple[Objects, Objects]],
    class_count: int,
    matchers: Mapping[str, Matcher] | None = None,
) -> ExampleResults:
    """Matches the detections of each image with its true objects.

    Args:
        images: (prediction, truth) of each of n images.
        class_count: The number of classes.
        matchers: What finds the matches, by a prefix of the names `hit` and `ignored`; None: boxes
            are matched, without a prefix.

    Returns:
        `objects`, int64 (n, classes): the true objects of each class in each image. Of each of d
        detections: `image` and `label`, int64 (d,); `score`, float32 (d,); `hit` and `ignored`,
        bool (d, IoU thresholds): whether it matches an object; whether it matches none, but an
        ignored area.
    """
    matchers = matchers or {"": match_objects}
    flags = [f"{prefix}{name}" for prefix in matchers for name in FLAGS]
    columns: dict[str, list[Tensor]] = {name: [] for name in ("image", "label", "score", *flags)}
    objects = []
    for number, (predicted, truth) in enumerate(images):
        counted = truth["labels"][~truth["iscrowd"]]
        objects.append(torch.bincount(counted, minlength=class_count))
        for label in torch.unique(predicted["labels"]):
            of_class = predicted["labels"] == label
            order = predicted["scores"][of_class].argsort(descending=True, stable=True)
            order = order[:MAX_DETECTIONS]
            detections = {name: value[of_class][order] for name, value in predicted.items()}
            true = truth["labels"] == label
            true_objects = {name: value[true] for name, value in truth.items()}
            columns["image"].append(torch.full((len(order),), number))
            columns["label"].append(label.expand(len(order)))
            columns["score"].append(detections["scores"])
            for prefix, match in matchers.items():
                for name, flag in zip(FLAGS, match(detections, true_objects), strict=True):
                    columns[f"{prefix}{name}"].append(flag)
    empty = {
        "image": torch.zeros(0, dtype=torch.int64),
        "label": torch.zeros(0, dtype=torch.int64),
        "score": torch.zeros(0),
        **{name: torch.zeros(0, len(IOU_THRESHOLDS), dtype=torch.bool) for name in flags},
    }
    joined = {name: torch.cat([empty[name], *parts]) for name, parts in columns.items()}
    return {"objects": torch.stack(objects), **joined}


def match_objects(predicted: Objects, truth: Objects) -> tuple[Tensor, Tensor]:
    """Which detections match an object by their boxes, and which an ignored area instead, at each
    IoU threshold: two times bool (d, IoU thresholds).

    Args:
        predicted: the detections of one class in an image, the highest score first.
        truth: the objects and ignored areas of the class in the image.
    """
    detections, true_boxes = predicted["boxes"].double(), truth["boxes"].double()
    low = torch.maximum(detections[:, None, :2], true_boxes[None, :, :2])
    high = torch.minimum(detections[:, None, 2:], true_boxes[None, :, 2:])
    own_area = (detections[:, 2:] - detections[:, :2]).prod(1)
    # of a detection's own area, not of the union, as an ignored area may hold many objects
    inside = (high - low).clamp_min(0).prod(2) / own_area[:, None]
    overlaps = inside.where(truth["iscrowd"], box_iou(detections, true_boxes))
    return match_table(overlaps, truth["iscrowd"])


def match_table(overlaps: Tensor, is_ignored: Tensor) -> tuple[Tensor, Tensor]:
    """As `match_objects`, of the overlaps, float64 (d, k), of detections with objects and areas.

    An object is matched before an area, and an area by any number of detections.
    """
    hit = match_overlaps(overlaps[:, ~is_ignored])
    inside = overlaps[:, is_ignored]
    if not inside.numel():
        return hit, torch.zeros_like(hit)
    return hit, ~hit & (inside.amax(1)[:, None] >= IOU_THRESHOLDS)


def match_overlaps(overlaps: Tensor) -> Tensor:
    """Which detections match an object, at each IoU threshold: bool (d, IoU thresholds).

    Each detection in turn takes the free object that it overlaps most.

    Args:
        overlaps: float64 (d, k), the IoU of each detection, the highest score first, with each
            object of the same class and image.
    """
    hit = torch.zeros(len(overlaps), len(IOU_THRESHOLDS), dtype=torch.bool)
    if not overlaps.numel():
        return hit
    free = torch.ones(len(IOU_THRESHOLDS), overlaps.shape[1], dtype=torch.bool)
    thresholds = torch.arange(len(IOU_THRESHOLDS))
    for row, overlap in enumerate(overlaps):
        available = overlap.where(free, -1.0)
        # pycocotools takes the last of several objects with an equal overlap
        best = overlaps.shape[1] - 1 - available.flip(1).argmax(1)
        hit[row] = available[thresholds, best] >= IOU_THRESHOLDS
        free[thresholds[hit[row]], best[hit[row]]] = False
    return hit


def sort_detections(results: ExampleResults) -> ExampleResults:
    """The results with the detections of each class in a row, the highest score first.

    So that the draws of a bootstrap need not sort.
    """
    order = results["score"].argsort(descending=True, stable=True)
    order = order[results["label"][order].argsort(stable=True)]
    return {name: v if name == "objects" else v[order] for name, v in results.items()}


def score_images(results: ExampleResults, counts: Tensor, prefix: str = "") -> dict[str, float]:
    """`map`, `map_50`, `map_75` and `mar_100` of images of which each is there `counts` times.

    They are means over the classes that have objects, and 0 if there is none.

    Args:
        results: What `sort_detections` gave for n images.
        counts: int64 (n,).
        prefix: Of the names of the matches that count.
    """
    hits = results[f"{prefix}hit"]
    object_counts = (results["objects"] * counts[:, None]).sum(0)
    weights = counts.double()[results["image"]][:, None].expand(hits.shape)
    if f"{prefix}ignored" in results:  # earlier versions kept no such results
        weights = weights * ~results[f"{prefix}ignored"]
    per_label = torch.bincount(results["label"], minlength=len(object_counts)).tolist()
    precisions, recalls = [], []
    chunks = (torch.split(hits, per_label), torch.split(weights, per_label))
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
        weight: float64 (d, IoU thresholds), how often each detection counts.
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
