"""Object detection: the model's own losses, and COCO's mean average precision by torchmetrics."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.detectors import Objects, unpad_with_ignored
from tuner.core.example_results import ExampleResults
from tuner.core.types import Task
from tuner.tasks import _average_precision
from tuner.tasks._detected_objects import unpad_predictions
from tuner.tasks._object_finder import ObjectFinder

METRICS = ("map", "map_50", "map_75", "mar_100")
REFUSED_RECIPE_KEYS = ("label_smoothing",)


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
        recipe: how the model is trained; the loss is the model's own and uses none of its keys.
        confidence: objects with a lower score are neither listed nor drawn. Metrics use all.
    """
    return Detection(classes, confidence)


class Detection(ObjectFinder):
    """Finds objects: boxes with a class and a score.

    y is what `core.targets.Boxes` gives. Predictions are the padded objects of each image, as
    `core.detectors` defines them.

    Scores are COCO's (Lin et al., Microsoft COCO, ECCV 2014): the mean over classes of average
    precision, for boxes that overlap by an intersection over union of 0.5 to 0.95 (`map`), 0.5 or
    0.75; and average recall with 100 objects per image. They are 0 if no object is found. A
    detection of which so large a part lies in an ignored area of its class counts neither as right
    nor as wrong.
    """

    metrics = METRICS
    output_description = (
        "boxes as left, top, right, bottom in pixels of the input; scores, falling; "
        "labels in the order of the classes, -1: no more objects"
    )

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        metrics = self._compute_map(pairs, per_class=False)
        # torchmetrics gives -1 if there are no true objects
        return {name: max(0.0, float(metrics[name])) for name in METRICS}

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """The detections of all images with what they match, and the true objects."""
        images = (pair for batch in pairs for pair in self.pairs_by_image(batch))
        matches = _average_precision.match_images(images, len(self.classes))
        return _average_precision.sort_detections(matches)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        return _average_precision.score_images(results, counts)

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """Average precision and recall with 100 objects per image, and the number of true objects,
        of each class; 0 for a class that no image has.
        """
        metrics = self._compute_map(pairs, per_class=True)
        true_labels = torch.cat([truth["labels"].flatten().cpu() for _, truth in pairs])
        columns = [
            metrics[name].reshape(-1).tolist()
            for name in ("classes", "map_per_class", "mar_100_per_class")
        ]
        by_label = {
            int(label): {
                "average_precision": max(0.0, precision),
                "average_recall": max(0.0, recall),
            }
            for label, precision, recall in zip(*columns, strict=True)
        }
        absent = {"average_precision": 0.0, "average_recall": 0.0}
        return {
            name: by_label.get(label, absent) | {"objects": int((true_labels == label).sum())}
            for label, name in enumerate(self.classes)
        }

    def pairs_by_image(self, batch: tuple[Any, Any]) -> Iterator[tuple[Objects, Objects]]:
        """(prediction, truth) of each image of a batch."""
        padded, truth = ({name: value.cpu() for name, value in half.items()} for half in batch)
        true_objects = unpad_with_ignored(truth["boxes"], truth["labels"])
        for predicted, true in zip(unpad_predictions(padded), true_objects, strict=True):
            yield {name: predicted[name] for name in ("boxes", "scores", "labels")}, true

    def _compute_map(
        self, pairs: Iterable[tuple[Any, Any]], *, per_class: bool
    ) -> dict[str, Tensor]:
        """COCO's metrics over all batches, by torchmetrics' names.

        faster-coco-eval gives what pycocotools gives, in a fraction of the time.
        """
        # as late as this: torchmetrics loads transformers where it is installed: that takes seconds
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(class_metrics=per_class, backend="faster_coco_eval")
        for batch in pairs:
            predicted, truth = zip(*self.pairs_by_image(batch), strict=True)
            metric.update(list(predicted), list(truth))
        result: dict[str, Tensor] = metric.compute()
        return result
