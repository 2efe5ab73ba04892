"""Objects in boxes: the model's own losses, and mean average precision by torchmetrics, as COCO counts it."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from tuner.config.run import Recipe
from tuner.core.detectors import Objects, join_targets, unpad_objects
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree, tree_to_dict
from tuner.core.targets import NO_OBJECT
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.tasks import _annotated_images

METRICS = ("map", "map_50", "map_75", "mar_100")
EXAMPLES_SHOWN = 8  # validation examples on the contact sheet
MAX_OBJECTS_NAMED = 5  # objects that a line names
NOISE_SCORE = 0.05  # scores up to this are noise: formats may differ in such objects


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
    """`confidence`: objects of lower scores are neither told nor drawn. Metrics take all."""
    return Detection(classes, confidence)


class Detection(Task):
    """y is what `targets.Boxes` gives; predictions are the objects of each image, padded, as `detectors` has them, on the CPU.

    Scores are COCO's (Lin et al., Microsoft COCO, ECCV 2014): the mean over classes of average precision, for boxes that overlap by an
    intersection over union of 0.5 to 0.95 (`map`), 0.5 or 0.75; and average recall with 100 objects an image. 0 where nothing is found.
    """

    metrics = METRICS
    output_description = "boxes as left, top, right, bottom in pixels of the input; scores, falling; labels in the order of the classes, -1: no more objects"

    def __init__(self, classes: tuple[str, ...], confidence: float) -> None:
        self.classes, self.confidence = classes, confidence

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The sum of the model's own losses."""
        return torch.stack(list(net(join_targets(batch.x, batch.y)).values())).sum()

    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        return {
            name: leaf.float().cpu() if leaf.is_floating_point() else leaf.cpu()
            for name, leaf in tree_to_dict(net(x)).items()
        }

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        found = compute_map(pairs, per_class=False)
        return {
            name: max(0.0, float(found[name])) for name in METRICS
        }  # -1: there was nothing to be found

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        return {
            "objects.png": self.contact_sheet(pairs, data),
            "per_class.csv": self.per_class_csv(pairs),
        }

    def contact_sheet(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> bytes:
        """The first validation examples: truth beside predictions."""
        both = [pair for pairs_ in pairs for pair in _pairs_by_image(pairs_)][:EXAMPLES_SHOWN]
        pixels = data.valid.take(torch.arange(len(both)), 0).x
        assert isinstance(pixels, Tensor)
        rows = []
        for image, (found, truth) in zip(pixels.numpy(), both, strict=True):
            tile = _annotated_images.image_of_pixels(image)
            true = [self.classes[label] for label in truth["labels"].tolist()]
            drawn = _annotated_images.draw_boxes(
                tile, truth["boxes"].tolist(), true, truth["labels"].tolist()
            )
            rows.append([drawn, self.draw_objects(tile, above_confidence(found, self.confidence))])
        return _annotated_images.make_contact_sheet(
            rows, ("truth", f"predicted, scores from {self.confidence:g}")
        )

    def draw_objects(self, image: Any, found: Objects) -> Any:
        words = [
            f"{self.classes[k]} {s:.2f}"
            for k, s in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
        ]
        return _annotated_images.draw_boxes(
            image, found["boxes"].tolist(), words, found["labels"].tolist()
        )

    def per_class_csv(self, pairs: Sequence[tuple[Any, Any]]) -> bytes:
        """Average precision and recall, and the number of true objects, of each class as CSV."""
        found = compute_map(pairs, per_class=True)
        true = torch.cat([truth["labels"].flatten().cpu() for _, truth in pairs])
        columns = [
            found[name].reshape(-1).tolist()
            for name in ("classes", "map_per_class", "mar_100_per_class")
        ]
        of_class = {int(label): (ap, ar) for label, ap, ar in zip(*columns, strict=True)}
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["class", "average precision", "average recall", "objects"])
        for label, name in enumerate(self.classes):
            values = [f"{max(0.0, value):.4f}" for value in of_class.get(label, (0.0, 0.0))]
            writer.writerow([name, *values, int((true == label).sum())])
        return text.getvalue().encode()

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """The largest difference of matched boxes, relative to the canvas, and of scores; an object that only one has counts by its score."""
        pairs = zip(_unpad(tree_to_dict(expected)), _unpad(tree_to_dict(got)), strict=True)
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
            self.describe_image(found, image, input_spec)
            for found, image in zip(_unpad(tree_to_dict(function(x))), originals, strict=True)
        ]

    def describe_image(self, found: Objects, image: Any, input_spec: ImageInputSpec) -> Prediction:
        found = above_confidence(found, self.confidence)
        found = {
            **found,
            "boxes": boxes_on_original(found["boxes"], image.width, image.height, input_spec),
        }
        named = [
            {"label": self.classes[label], "score": score, "box": [round(side, 2) for side in box]}
            for label, score, box in zip(
                found["labels"].tolist(),
                found["scores"].tolist(),
                found["boxes"].tolist(),
                strict=True,
            )
        ]
        words = [
            f"{o['label']} {o['score']:.3f} at {', '.join(f'{side:.0f}' for side in o['box'])}"
            for o in named
        ]
        more = (
            f"  and {len(words) - MAX_OBJECTS_NAMED} more" if len(words) > MAX_OBJECTS_NAMED else ""
        )
        line = (
            "  ".join(words[:MAX_OBJECTS_NAMED]) + more
            if words
            else f"nothing with a score from {self.confidence:g}"
        )
        return Prediction(
            line, {"objects": named}, _annotated_images.encode_png(self.draw_objects(image, found))
        )


def compute_map(pairs: Iterable[tuple[Any, Any]], *, per_class: bool) -> dict[str, Tensor]:
    metric = MeanAveragePrecision(class_metrics=per_class, backend="pycocotools")
    for pair in pairs:
        found, truth = zip(*_pairs_by_image(pair), strict=True)
        metric.update(list(found), list(truth))
    result: dict[str, Tensor] = metric.compute()
    return result


def boxes_on_original(boxes: Tensor, width: int, height: int, image_spec: ImageInputSpec) -> Tensor:
    """Boxes on the canvas in pixels of the image of width x height that lies there."""
    at = place_on_canvas(width, height, image_spec)
    scale = torch.tensor([width / at.width, height / at.height] * 2)
    limit = torch.tensor([width, height] * 2, dtype=torch.float32)
    return ((boxes - torch.tensor([at.left, at.top] * 2)) * scale).clamp(min=0).minimum(limit)


def above_confidence(found: Objects, confidence: float) -> Objects:
    return {
        name: found[name][found["scores"] >= confidence] for name in ("boxes", "scores", "labels")
    }


def objects_difference(expected: Objects, got: Objects) -> float:
    """How far one image's objects lie apart, whichever their order. Where the places are full, those near the last are left out."""
    floor = max(
        [NOISE_SCORE]
        + [
            float(o["scores"].min()) + 1e-3
            for o in (expected, got)
            if len(o["scores"]) and o["full"]
        ]
    )
    side = max(1.0, float(expected["boxes"].abs().max())) if len(expected["boxes"]) else 1.0
    free, worst = set(range(len(got["scores"]))), 0.0
    for box, score, label in zip(
        expected["boxes"], expected["scores"], expected["labels"], strict=True
    ):
        if score <= floor:
            continue
        far = [
            (
                max(
                    float((box - got["boxes"][j]).abs().max()) / side,
                    float((score - got["scores"][j]).abs()),
                ),
                j,
            )
            for j in free
            if got["labels"][j] == label
        ]
        nearest, which = min(far, default=(float("inf"), -1))
        if nearest < float(score):
            free.discard(which)
        worst = max(worst, min(nearest, float(score)))
    return max([worst, *(float(got["scores"][j]) for j in free if got["scores"][j] > floor + 1e-3)])


def _unpad(found: dict[str, Tensor]) -> list[Objects]:
    """Each image's objects; `full`: there may have been more."""
    return [
        {
            "boxes": b[k != NO_OBJECT],
            "scores": s[k != NO_OBJECT],
            "labels": k[k != NO_OBJECT],
            "full": (k != NO_OBJECT).all(),
        }
        for b, s, k in zip(found["boxes"], found["scores"], found["labels"], strict=True)
    ]


def _pairs_by_image(pair: tuple[Any, Any]) -> Iterator[tuple[Objects, Objects]]:
    """(prediction, truth) of each image of a batch."""
    found, truth = pair
    true = unpad_objects(truth["boxes"].cpu(), truth["labels"].cpu())
    for one, other in zip(_unpad(found), true, strict=True):
        yield {name: one[name] for name in ("boxes", "scores", "labels")}, other
