"""Instance segmentation: objects with a box, a class and a mask each; COCO's average precision of
masks and of boxes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_masks
from pydantic import Field
from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.detectors import Objects, unpad_with_ignored
from tuner.core.example_results import ExampleResults
from tuner.core.targets import NO_OBJECT, masks_of_objects
from tuner.core.types import Task
from tuner.tasks import _average_precision
from tuner.tasks._detected_objects import encode_masks, paste_masks, unpad_predictions
from tuner.tasks._object_finder import ObjectFinder

METRICS = (
    "mask_map",
    "mask_map_50",
    "mask_map_75",
    "mask_mar_100",
    "map",
    "map_50",
    "map_75",
    "mar_100",
)
REFUSED_RECIPE_KEYS = ("label_smoothing",)
BOX_PREFIX, MASK_PREFIX = "box_", "mask_"


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    *,
    confidence: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="objects of a lower score are neither listed nor drawn by predict",
        ),
    ] = 0.5,
) -> Task:
    """The task for the classes of a dataset.

    Args:
        classes: the names of the classes.
        recipe: how the model is trained; none of its keys is used here.
        confidence: objects with a lower score are neither listed nor drawn. Metrics use all.
    """
    return InstanceSegmentation(classes, confidence)


class InstanceSegmentation(ObjectFinder):
    """Finds objects: a box with a class, a score and a mask each.

    y is what `core.targets.InstanceMasks` gives. Predictions are the padded objects of each image,
    as `core.detectors` defines them, with `masks`, float32 (n, k, 28, 28): the probability that a
    cell of the box belongs to the object.

    Scores are COCO's (Lin et al., Microsoft COCO, ECCV 2014), on the canvas: `mask_map` and its
    like for masks, `map` and its like for boxes.
    """

    metrics = METRICS
    output_description = (
        "boxes as left, top, right, bottom in pixels of the input; scores, falling; labels in the "
        "order of the classes, -1: no more objects; masks: of each cell of 28 x 28 in the box, the "
        "probability that it belongs to the object"
    )

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        results = self.example_results(pairs)
        return self.score_results(results, torch.ones(len(results["objects"]), dtype=torch.int64))

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """The detections of all images with what their masks and boxes match, and the true
        objects.
        """
        matches = _average_precision.match_images(
            (pair for batch in pairs for pair in self.pairs_by_image(batch)),
            len(self.classes),
            {"": match_masks, BOX_PREFIX: _average_precision.match_objects},
        )
        return _average_precision.sort_detections(matches)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        masks = _average_precision.score_images(results, counts)
        boxes = _average_precision.score_images(results, counts, BOX_PREFIX)
        return {f"{MASK_PREFIX}{name}": value for name, value in masks.items()} | boxes

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """Average precision and recall of the masks, and the number of true objects, of each
        class.
        """
        results = self.example_results(pairs)
        counts = torch.ones(len(results["objects"]), dtype=torch.int64)
        found = {}
        for label, name in enumerate(self.classes):
            of_class = results["label"] == label
            own = {k: v if k == "objects" else v[of_class] for k, v in results.items()}
            own["objects"] = results["objects"] * (torch.arange(len(self.classes)) == label)
            scores = _average_precision.score_images(own, counts)
            found[name] = {
                "average_precision": scores["map"],
                "average_recall": scores["mar_100"],
                "objects": int(own["objects"].sum()),
            }
        return found

    def pairs_by_image(self, batch: tuple[Any, Any]) -> Iterator[tuple[Objects, Objects]]:
        """(prediction, truth) of each image of a batch, with masks of the size of the canvas."""
        padded, truth = batch
        on_cpu = {name: value.cpu() for name, value in truth.items()}
        objects = unpad_with_ignored(on_cpu["boxes"], on_cpu["labels"])
        layers, labels = on_cpu["layers"], on_cpu["labels"]
        for predicted, true, image_layers, image_labels in zip(
            unpad_predictions({name: value.cpu() for name, value in padded.items()}),
            objects,
            layers,
            labels,
            strict=True,
        ):
            rows = (image_labels != NO_OBJECT).nonzero()[:, 0]
            masks = paste_masks(predicted["masks"], predicted["boxes"], image_layers.shape[-1])
            yield (
                {
                    **{name: predicted[name] for name in ("boxes", "scores", "labels")},
                    "masks": masks,
                },
                {**true, "masks": masks_of_objects(image_layers, rows)},
            )


def match_masks(predicted: Objects, truth: Objects) -> tuple[Tensor, Tensor]:
    """Which detections match an object by their masks, and which an ignored area instead, at each
    IoU threshold: two times bool (d, IoU thresholds).

    Args:
        predicted: the detections of one class in an image, the highest score first.
        truth: the objects and ignored areas of the class in the image.
    """
    codes, true_codes = encode_masks(predicted["masks"]), encode_masks(truth["masks"])
    crowd = truth["iscrowd"]
    shape = (len(codes), len(true_codes))
    overlaps = coco_masks.iou(codes, true_codes, crowd.int().tolist()) if all(shape) else []
    table = torch.as_tensor(np.asarray(overlaps, np.float64).reshape(shape))
    return _average_precision.match_table(table, crowd)
