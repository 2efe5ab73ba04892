"""Test scores of boxes, masks and texts from what an arm predicts, for all arms alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import task_sets
from numpy.typing import NDArray
from PIL import Image

NOT_A_CLASS = 255  # a pixel that an arm does not see


def scores(kind: str, folder: Path, predictions: Path) -> dict[str, float]:
    """The scores of the test part of a set.

    Args:
        kind: boxes, masks or texts.
        folder: the set, as task_sets.py writes it.
        predictions: boxes: JSON, {image: [{"label", "score", "box"}]} with boxes as left, top,
            right, bottom in pixels of the image; masks: a folder of PNG files with the class of
            each pixel; texts: JSON, {"classes": […], "rows": [[true class, probabilities]]}.
    """
    return {"boxes": box_scores, "masks": mask_scores, "texts": text_scores}[kind](
        folder, predictions
    )


def box_scores(folder: Path, predictions: Path) -> dict[str, float]:
    """COCO's mean average precision by faster-coco-eval, for overlaps of 0.5 to 0.95 and of 0.5."""
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    found: dict[str, list[dict[str, Any]]] = json.loads(predictions.read_text())
    classes = task_sets.list_classes(folder)
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    for file, objects in task_sets.list_boxes(folder, "test"):
        said = found[file.stem]
        predicted = {
            "boxes": torch.tensor([one["box"] for one in said]).view(-1, 4),
            "scores": torch.tensor([one["score"] for one in said]),
            "labels": torch.tensor([classes.index(one["label"]) for one in said]),
        }
        truth = {
            "boxes": torch.tensor([box for _, box in objects]).view(-1, 4),
            "labels": torch.tensor([classes.index(name) for name, _ in objects]),
        }
        metric.update([predicted], [truth])
    values = metric.compute()
    return {name: max(0.0, float(values[name])) for name in ("map", "map_50")}


def mask_scores(folder: Path, predictions: Path) -> dict[str, float]:
    """Mean IoU of background and foreground, over all pixels of the true masks at their own size."""
    counts = np.zeros((2, 2))
    for image, file in task_sets.list_masks(folder, "test"):
        mask = Image.open(file).convert("L")
        truth = np.array(mask) > 127
        prediction = Image.open(predictions / f"{image.stem}.png")
        # some photographs of `humans` are larger than their masks
        predicted = np.array(prediction.resize(mask.size, Image.Resampling.NEAREST))
        seen = predicted != NOT_A_CLASS
        counts += np.bincount(2 * truth[seen] + predicted[seen], minlength=4).reshape(2, 2)
    hits = counts.diagonal()
    return {"mean_iou": float((hits / (counts.sum(0) + counts.sum(1) - hits)).mean())}


def text_scores(folder: Path, predictions: Path) -> dict[str, float]:
    """Macro-F1, balanced accuracy and accuracy of the likeliest class."""
    rows = json.loads(predictions.read_text())["rows"]
    truth = np.array([row[0] for row in rows])
    predicted = np.array([row[1] for row in rows]).argmax(1)
    return class_scores(truth, predicted)


def class_scores(truth: NDArray[Any], predicted: NDArray[Any]) -> dict[str, float]:
    classes = np.unique(truth)
    recalls, f1s = [], []
    for label in classes:
        hits = ((truth == label) & (predicted == label)).sum()
        recalls.append(hits / (truth == label).sum())
        f1s.append(2 * hits / ((truth == label).sum() + (predicted == label).sum()))
    return {
        "macro_f1": float(np.mean(f1s)),
        "balanced_accuracy": float(np.mean(recalls)),
        "accuracy": float((truth == predicted).mean()),
    }
