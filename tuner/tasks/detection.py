"""Object detection: the model's own losses, and COCO's mean average precision by torchmetrics."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from tuner.config.run import Recipe
from tuner.core.detectors import Objects, join_targets, unpad_with_ignored
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree, tree_to_dict
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.errors import limit_listing
from tuner.tasks import _annotated_images, _average_precision
from tuner.tasks._detected_objects import (
    EXAMPLES_SHOWN,
    MAX_OBJECTS_NAMED,
    above_confidence,
    boxes_on_original,
    objects_difference,
    unpad_predictions,
)

METRICS = ("map", "map_50", "map_75", "mar_100")


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
        recipe: how the model is trained; detection uses none of its keys.
        confidence: objects with a lower score are neither listed nor drawn. Metrics use all.
    """
    return Detection(classes, confidence)


class Detection(Task):
    """Finds objects: boxes with a class and a score.

    y is what `core.targets.Boxes` gives. Predictions are the padded objects of each image, as
    `core.detectors` defines them, on the CPU.

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

    def __init__(self, classes: tuple[str, ...], confidence: float) -> None:
        self.classes, self.confidence = classes, confidence

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The sum of the model's own losses."""
        return torch.stack(list(self.loss_parts(net, batch).values())).sum()

    def loss_parts(self, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The model's own losses, by its names for them."""
        losses: dict[str, Tensor] = net(join_targets(batch.x, batch.y))
        return losses

    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        return {
            name: tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in tree_to_dict(net(x)).items()
        }

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        metrics = compute_map(pairs, per_class=False)
        # torchmetrics gives -1 if there are no true objects
        return {name: max(0.0, float(metrics[name])) for name in METRICS}

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """The detections of all images with what they match, and the true objects."""
        images = (pair for batch in pairs for pair in _pairs_by_image(batch))
        matches = _average_precision.match_images(images, len(self.classes))
        return _average_precision.sort_detections(matches)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        return _average_precision.score_images(results, counts)

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        return {
            "objects.png": self.contact_sheet(pairs, data),
            "per_class.csv": self.per_class_csv(pairs),
        }

    def contact_sheet(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> bytes:
        """The first validation examples: truth beside predictions."""
        examples = [pair for batch in pairs for pair in _pairs_by_image(batch)][:EXAMPLES_SHOWN]
        pixels = data.valid.take(torch.arange(len(examples)), 0).x
        assert isinstance(pixels, Tensor)
        rows = []
        for image_pixels, (predicted, truth) in zip(pixels.numpy(), examples, strict=True):
            image = _annotated_images.image_of_pixels(image_pixels)
            counted = ~truth["iscrowd"]
            labels = truth["labels"][counted].tolist()
            names = [self.classes[label] for label in labels]
            boxes = truth["boxes"][counted].tolist()
            true_boxes = _annotated_images.draw_boxes(image, boxes, names, labels)
            confident = above_confidence(predicted, self.confidence)
            rows.append([true_boxes, self.draw_objects(image, confident)])
        return _annotated_images.make_contact_sheet(
            rows, ("truth", f"predicted, scores from {self.confidence:g}")
        )

    def draw_objects(self, image: Any, objects: Objects) -> Any:
        """The image with the boxes of the objects, their classes and scores."""
        labels = objects["labels"].tolist()
        captions = [
            f"{self.classes[label]} {score:.2f}"
            for label, score in zip(labels, objects["scores"].tolist(), strict=True)
        ]
        return _annotated_images.draw_boxes(image, objects["boxes"].tolist(), captions, labels)

    def per_class_csv(self, pairs: Sequence[tuple[Any, Any]]) -> bytes:
        """Average precision and recall, and the number of true objects, of each class as CSV."""
        metrics = compute_map(pairs, per_class=True)
        true_labels = torch.cat([truth["labels"].flatten().cpu() for _, truth in pairs])
        columns = [
            metrics[name].reshape(-1).tolist()
            for name in ("classes", "map_per_class", "mar_100_per_class")
        ]
        scores_by_label = {
            int(label): (precision, recall)
            for label, precision, recall in zip(*columns, strict=True)
        }
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["class", "average precision", "average recall", "objects"])
        for label, name in enumerate(self.classes):
            scores = scores_by_label.get(label, (0.0, 0.0))
            formatted = [f"{max(0.0, score):.4f}" for score in scores]
            writer.writerow([name, *formatted, int((true_labels == label).sum())])
        return text.getvalue().encode()

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """The largest difference between matched objects, of boxes or of scores.

        The difference of boxes is relative to the side of the canvas. An object that only one
        output has counts by its score.
        """
        pairs = zip(
            unpad_predictions(tree_to_dict(expected)),
            unpad_predictions(tree_to_dict(got)),
            strict=True,
        )
        return max((objects_difference(a, b) for a, b in pairs), default=0.0)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        assert isinstance(input_spec, ImageInputSpec)
        return [
            self.describe_image(objects, image, input_spec)
            for objects, image in zip(
                unpad_predictions(tree_to_dict(function(x))), originals, strict=True
            )
        ]

    def describe_image(
        self, objects: Objects, image: Any, input_spec: ImageInputSpec
    ) -> Prediction:
        """The confident objects of one image, in pixels of the original image."""
        objects = above_confidence(objects, self.confidence)
        boxes = boxes_on_original(objects["boxes"], image.width, image.height, input_spec)
        objects = {**objects, "boxes": boxes}
        columns = [objects[name].tolist() for name in ("labels", "scores", "boxes")]
        values = [
            {"label": self.classes[label], "score": score, "box": [round(side, 2) for side in box]}
            for label, score, box in zip(*columns, strict=True)
        ]
        lines = [
            f"{value['label']} {value['score']:.3f} at "
            + ", ".join(f"{side:.0f}" for side in value["box"])
            for value in values
        ]
        line = "  ".join(limit_listing(lines, MAX_OBJECTS_NAMED))
        return Prediction(
            line or f"nothing with a score from {self.confidence:g}",
            {"objects": values},
            _annotated_images.encode_png(self.draw_objects(image, objects)),
        )


def compute_map(pairs: Iterable[tuple[Any, Any]], *, per_class: bool) -> dict[str, Tensor]:
    """COCO's metrics over all batches, by torchmetrics' names.

    faster-coco-eval gives what pycocotools gives, in a fraction of the time.
    """
    metric = MeanAveragePrecision(class_metrics=per_class, backend="faster_coco_eval")
    for batch in pairs:
        predicted, truth = zip(*_pairs_by_image(batch), strict=True)
        metric.update(list(predicted), list(truth))
    result: dict[str, Tensor] = metric.compute()
    return result


def _pairs_by_image(batch: tuple[Any, Any]) -> Iterator[tuple[Objects, Objects]]:
    """(prediction, truth) of each image of a batch."""
    padded, truth = batch
    true_objects = unpad_with_ignored(truth["boxes"].cpu(), truth["labels"].cpu())
    for predicted, true in zip(unpad_predictions(padded), true_objects, strict=True):
        yield {name: predicted[name] for name in ("boxes", "scores", "labels")}, true
