"""Instance segmentation: objects with a box, a class and a mask each; COCO's average precision of
masks and of boxes.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_masks
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tuner.config.run import Recipe
from tuner.core.detectors import Objects, join_targets, unpad_with_ignored
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree, tree_to_dict
from tuner.core.targets import NO_OBJECT, masks_of_objects
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.errors import limit_listing
from tuner.tasks import _annotated_images, _average_precision
from tuner.tasks._detected_objects import (
    EXAMPLES_SHOWN,
    MAX_OBJECTS_NAMED,
    boxes_on_original,
    objects_difference,
    unpad_predictions,
)

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
MASK_THRESHOLD = 0.5  # probability from which a pixel belongs to the object
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


class InstanceSegmentation(Task):
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
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in tree_to_dict(net(x)).items()
        }

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        results = self.example_results(pairs)
        return self.score_results(results, torch.ones(len(results["objects"]), dtype=torch.int64))

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """The detections of all images with what their masks and boxes match, and the true
        objects.
        """
        matches = _average_precision.match_images(
            (pair for batch in pairs for pair in _pairs_by_image(batch)),
            len(self.classes),
            {"": match_masks, BOX_PREFIX: _average_precision.match_objects},
        )
        return _average_precision.sort_detections(matches)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        masks = _average_precision.score_images(results, counts)
        boxes = _average_precision.score_images(results, counts, BOX_PREFIX)
        return {f"{MASK_PREFIX}{name}": value for name, value in masks.items()} | boxes

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        return {
            "objects.png": self._contact_sheet(pairs, data),
            "per_class.csv": self._per_class_csv(pairs),
        }

    def _contact_sheet(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> bytes:
        """The first validation examples: truth beside predictions."""
        images = (pair for batch in pairs for pair in _pairs_by_image(batch))
        examples = [pair for pair, _ in zip(images, range(EXAMPLES_SHOWN), strict=False)]
        pixels = data.valid.take(torch.arange(len(examples)), 0).x
        assert isinstance(pixels, Tensor)
        rows = []
        for image_pixels, (predicted, truth) in zip(pixels.numpy(), examples, strict=True):
            image = _annotated_images.image_of_pixels(image_pixels)
            counted = ~truth["iscrowd"]
            true = {name: truth[name][counted] for name in ("boxes", "labels", "masks")}
            confident = predicted["scores"] >= self.confidence
            seen = {name: value[confident] for name, value in predicted.items()}
            rows.append([self._draw(image, true), self._draw(image, seen)])
        return _annotated_images.make_contact_sheet(
            rows, ("truth", f"predicted, scores from {self.confidence:g}")
        )

    def _draw(self, image: Any, objects: Objects) -> Any:
        """The image with masks, boxes, classes and, where there are any, scores."""
        labels = objects["labels"].tolist()
        numbers = np.zeros((image.height, image.width), np.uint8)
        for label, mask in zip(labels, objects["masks"].numpy(), strict=True):
            numbers[mask] = label % 250 + 1
        captions = [self.classes[label] for label in labels]
        if "scores" in objects:
            scores = objects["scores"].tolist()
            captions = [f"{c} {score:.2f}" for c, score in zip(captions, scores, strict=True)]
        drawn = _annotated_images.draw_mask(image, numbers)
        return _annotated_images.draw_boxes(drawn, objects["boxes"].tolist(), captions, labels)

    def _per_class_csv(self, pairs: Sequence[tuple[Any, Any]]) -> bytes:
        """Average precision and recall of the masks, and the number of true objects, of each class
        as CSV.
        """
        results = self.example_results(pairs)
        counts = torch.ones(len(results["objects"]), dtype=torch.int64)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["class", "average precision", "average recall", "objects"])
        for label, name in enumerate(self.classes):
            of_class = results["label"] == label
            own = {k: v if k == "objects" else v[of_class] for k, v in results.items()}
            own["objects"] = results["objects"] * (torch.arange(len(self.classes)) == label)
            scores = _average_precision.score_images(own, counts)
            values = [f"{scores['map']:.4f}", f"{scores['mar_100']:.4f}"]
            writer.writerow([name, *values, int(own["objects"].sum())])
        return text.getvalue().encode()

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """The largest difference between matched objects, of boxes, scores or masks; see
        `Detection.output_difference`.
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
            self._describe_image(objects, image, input_spec)
            for objects, image in zip(
                unpad_predictions(tree_to_dict(function(x))), originals, strict=True
            )
        ]

    def _describe_image(
        self, objects: Objects, image: Any, input_spec: ImageInputSpec
    ) -> Prediction:
        """The confident objects of one image, in pixels of the original image; masks as COCO's run
        lengths.
        """
        confident = objects["scores"] >= self.confidence
        boxes = objects["boxes"][confident]
        kept: Objects = {
            "boxes": boxes_on_original(boxes, image.width, image.height, input_spec),
            "labels": objects["labels"][confident],
            "scores": objects["scores"][confident],
        }
        kept["masks"] = paste_masks(
            objects["masks"][confident], kept["boxes"], image.width, image.height
        )
        columns = [kept[name].tolist() for name in ("labels", "scores", "boxes")]
        values = [
            {
                "label": self.classes[label],
                "score": score,
                "box": [round(side, 2) for side in box],
                "mask": {"size": code["size"], "counts": code["counts"].decode()},
            }
            for label, score, box, code in zip(*columns, encode_masks(kept["masks"]), strict=True)
        ]
        lines = [
            f"{label} {score:.3f} at {', '.join(f'{side:.0f}' for side in box)}"
            for label, score, box in zip(
                [self.classes[label] for label in columns[0]], columns[1], columns[2], strict=True
            )
        ]
        line = "  ".join(limit_listing(lines, MAX_OBJECTS_NAMED))
        return Prediction(
            line or f"nothing with a score from {self.confidence:g}",
            {"objects": values},
            _annotated_images.encode_png(self._draw(image, kept)),
        )


def paste_masks(masks: Tensor, boxes: Tensor, width: int, height: int | None = None) -> Tensor:
    """The masks of boxes as pixels of an image: bool (k, height, width).

    Args:
        masks: float32 (k, 28, 28), the probability of each cell of a box.
        boxes: float32 (k, 4), left, top, right, bottom in pixels.
        width: the width of the image.
        height: the height of the image; None: as its width.
    """
    size = (width if height is None else height, width)
    pasted = [
        paste_masks_in_image(mask[None, None], box[None], size)[0, 0] >= MASK_THRESHOLD
        for mask, box in zip(masks, boxes, strict=True)
    ]
    return torch.stack(pasted) if pasted else torch.zeros(0, *size, dtype=torch.bool)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Masks, bool (k, h, w), as COCO's run lengths."""
    if not len(masks):
        return []
    columns: NDArray[np.uint8] = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
    encoded: list[dict[str, Any]] = coco_masks.encode(columns)
    return encoded


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


def _pairs_by_image(batch: tuple[Any, Any]) -> Iterator[tuple[Objects, Objects]]:
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
            {**{name: predicted[name] for name in ("boxes", "scores", "labels")}, "masks": masks},
            {**true, "masks": masks_of_objects(image_layers, rows)},
        )
