"""What tasks share that find objects: boxes alone, or boxes with masks."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuner.core.detectors import Objects, join_targets
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree, tree_to_dict
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.errors import limit_listing
from tuner.tasks import _annotated_images
from tuner.tasks._csv_tables import encode_csv
from tuner.tasks._detected_objects import (
    above_confidence,
    boxes_on_original,
    encode_masks,
    objects_difference,
    paste_masks,
    unpad_predictions,
)

EXAMPLES_SHOWN = 8  # validation examples on the contact sheet
MAX_OBJECTS_NAMED = 5  # objects that a line names


class ObjectFinder(Task):
    """Finds objects: a box with a class and a score each, and a mask where the model gives masks.

    Predictions are the padded objects of each image, as `core.detectors` defines them, perhaps with
    `masks`, float32 (n, k, 28, 28): the probability that a cell of the box belongs to the object.

    Args:
        classes: The names of the classes.
        confidence: Objects with a lower score are neither listed nor drawn. Metrics use all.
    """

    scores_on_cpu = True

    def __init__(self, classes: tuple[str, ...], confidence: float) -> None:
        self.classes, self.confidence = classes, confidence

    @abstractmethod
    def pairs_by_image(self, batch: tuple[Any, Any]) -> Iterator[tuple[Objects, Objects]]:
        """(prediction, truth) of each image of a batch, with masks of the size of the canvas."""

    @abstractmethod
    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """`average_precision` and `average_recall` of each class, and its true `objects`."""

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

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        return {
            "objects.png": self._contact_sheet(pairs, data),
            "per_class.csv": self._per_class_csv(pairs),
        }

    def _per_class_csv(self, pairs: Sequence[tuple[Any, Any]]) -> bytes:
        """The scores of each class as CSV."""
        columns = ("average_precision", "average_recall")
        rows = [
            [name, *(f"{scores[key]:.4f}" for key in columns), scores["objects"]]
            for name, scores in self.class_scores(pairs).items()
        ]
        return encode_csv(["class", "average precision", "average recall", "objects"], rows)

    def _contact_sheet(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> bytes:
        """The first validation examples: truth beside predictions."""
        images = (pair for batch in pairs for pair in self.pairs_by_image(batch))
        examples = [pair for pair, _ in zip(images, range(EXAMPLES_SHOWN), strict=False)]
        pixels = data.valid.take(torch.arange(len(examples)), 0).x
        assert isinstance(pixels, Tensor)
        rows = []
        for image_pixels, (predicted, truth) in zip(pixels.numpy(), examples, strict=True):
            image = _annotated_images.image_of_pixels(image_pixels)
            counted = ~truth["iscrowd"]
            names = [name for name in ("boxes", "labels", "masks") if name in truth]
            true: Objects = {name: truth[name][counted] for name in names}
            confident = above_confidence(predicted, self.confidence)
            rows.append([self._draw(image, true), self._draw(image, confident)])
        return _annotated_images.make_contact_sheet(
            rows, ("truth", f"predicted, scores from {self.confidence:g}")
        )

    def _draw(self, image: Any, objects: Objects) -> Any:
        """The image with boxes, classes and, where there are any, masks and scores."""
        labels = objects["labels"].tolist()
        captions = [self.classes[label] for label in labels]
        if "scores" in objects:
            scores = objects["scores"].tolist()
            captions = [f"{c} {score:.2f}" for c, score in zip(captions, scores, strict=True)]
        if "masks" in objects:
            numbers = np.zeros((image.height, image.width), np.uint8)
            for label, mask in zip(labels, objects["masks"].numpy(), strict=True):
                numbers[mask] = label % 250 + 1
            image = _annotated_images.draw_mask(image, numbers)
        return _annotated_images.draw_boxes(image, objects["boxes"].tolist(), captions, labels)

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """The largest difference between matched objects, of boxes, scores or masks.

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
        objects = above_confidence(objects, self.confidence)
        boxes = boxes_on_original(objects["boxes"], image.width, image.height, input_spec)
        objects = {**objects, "boxes": boxes}
        columns = [objects[name].tolist() for name in ("labels", "scores", "boxes")]
        values: list[dict[str, Any]] = [
            {"label": self.classes[label], "score": score, "box": [round(side, 2) for side in box]}
            for label, score, box in zip(*columns, strict=True)
        ]
        if "masks" in objects:
            objects["masks"] = paste_masks(objects["masks"], boxes, image.width, image.height)
            for value, code in zip(values, encode_masks(objects["masks"]), strict=True):
                value["mask"] = {"size": code["size"], "counts": code["counts"].decode()}
        lines = [
            f"{value['label']} {value['score']:.3f} at "
            + ", ".join(f"{side:.0f}" for side in value["box"])
            for value in values
        ]
        line = "  ".join(limit_listing(lines, MAX_OBJECTS_NAMED))
        return Prediction(
            line or f"nothing with a score from {self.confidence:g}",
            {"objects": values},
            _annotated_images.encode_png(self._draw(image, objects)),
        )
