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
from tuner.core.detectors import Objects, objects, with_targets
from tuner.core.geometry import placed
from tuner.core.input_spec import Preprocess, Tree, Wanted, leaves
from tuner.core.targets import NO_OBJECT
from tuner.core.types import Batch, Data, Task, Told
from tuner.tasks import _annotated_images

METRICS = ("map", "map_50", "map_75", "mar_100")
SHOWN = 8  # validation examples on the contact sheet
SAID = 5  # objects that a line names
FAINT = 0.05  # scores up to this are noise: formats may differ in such objects


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
    output = "boxes as left, top, right, bottom in pixels of the input; scores, falling; labels in the order of the classes, -1: no more objects"

    def __init__(self, classes: tuple[str, ...], confidence: float) -> None:
        self.classes, self.confidence = classes, confidence

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The sum of the model's own losses."""
        return torch.stack(list(net(with_targets(batch.x, batch.y)).values())).sum()

    def predict(self, net: nn.Module, x: Tree) -> Tree:
        return {
            name: leaf.float().cpu() if leaf.is_floating_point() else leaf.cpu()
            for name, leaf in leaves(net(x)).items()
        }

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        found = counted(pairs, per_class=False)
        return {
            name: max(0.0, float(found[name])) for name in METRICS
        }  # -1: there was nothing to be found

    def show(self, pairs: Sequence[tuple[Any, Any]], data: Data) -> dict[str, bytes]:
        return {"objects.png": self.sheet(pairs, data), "per_class.csv": self.table(pairs)}

    def sheet(self, pairs: Sequence[tuple[Any, Any]], data: Data) -> bytes:
        """The first validation examples: truth beside predictions."""
        both = [pair for pairs_ in pairs for pair in _images(pairs_)][:SHOWN]
        pixels = data.valid.take(torch.arange(len(both)), 0).x
        assert isinstance(pixels, Tensor)
        rows = []
        for image, (found, truth) in zip(pixels.numpy(), both, strict=True):
            tile = _annotated_images.of_pixels(image)
            true = [self.classes[label] for label in truth["labels"].tolist()]
            drawn = _annotated_images.with_boxes(
                tile, truth["boxes"].tolist(), true, truth["labels"].tolist()
            )
            rows.append([drawn, self.drawn(tile, sure(found, self.confidence))])
        return _annotated_images.sheet(
            rows, ("truth", f"predicted, scores from {self.confidence:g}")
        )

    def drawn(self, image: Any, found: Objects) -> Any:
        words = [
            f"{self.classes[k]} {s:.2f}"
            for k, s in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
        ]
        return _annotated_images.with_boxes(
            image, found["boxes"].tolist(), words, found["labels"].tolist()
        )

    def table(self, pairs: Sequence[tuple[Any, Any]]) -> bytes:
        """Average precision and recall, and the number of true objects, of each class as CSV."""
        found = counted(pairs, per_class=True)
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

    def difference(self, expected: Tree, got: Tree) -> float:
        """The largest difference of matched boxes, relative to the canvas, and of scores; an object that only one has counts by its score."""
        pairs = zip(_unpadded(leaves(expected)), _unpadded(leaves(got)), strict=True)
        return max((apart(a, b) for a, b in pairs), default=0.0)

    def tell(
        self, function: Callable[[Tree], Tree], x: Tree, originals: Sequence[Any], wanted: Wanted
    ) -> list[Told]:
        assert isinstance(wanted, Preprocess)
        return [
            self.told(found, image, wanted)
            for found, image in zip(_unpadded(leaves(function(x))), originals, strict=True)
        ]

    def told(self, found: Objects, image: Any, wanted: Preprocess) -> Told:
        found = sure(found, self.confidence)
        found = {**found, "boxes": original(found["boxes"], image.width, image.height, wanted)}
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
        more = f"  and {len(words) - SAID} more" if len(words) > SAID else ""
        line = (
            "  ".join(words[:SAID]) + more
            if words
            else f"nothing with a score from {self.confidence:g}"
        )
        return Told(line, {"objects": named}, _annotated_images.png(self.drawn(image, found)))


def counted(pairs: Iterable[tuple[Any, Any]], *, per_class: bool) -> dict[str, Tensor]:
    metric = MeanAveragePrecision(class_metrics=per_class, backend="pycocotools")
    for pair in pairs:
        found, truth = zip(*_images(pair), strict=True)
        metric.update(list(found), list(truth))
    result: dict[str, Tensor] = metric.compute()
    return result


def original(boxes: Tensor, width: int, height: int, preprocess: Preprocess) -> Tensor:
    """Boxes on the canvas in pixels of the image of width x height that lies there."""
    at = placed(width, height, preprocess)
    scale = torch.tensor([width / at.width, height / at.height] * 2)
    limit = torch.tensor([width, height] * 2, dtype=torch.float32)
    return ((boxes - torch.tensor([at.left, at.top] * 2)) * scale).clamp(min=0).minimum(limit)


def sure(found: Objects, confidence: float) -> Objects:
    return {
        name: found[name][found["scores"] >= confidence] for name in ("boxes", "scores", "labels")
    }


def apart(expected: Objects, got: Objects) -> float:
    """How far one image's objects lie apart, whichever their order. Where the places are full, those near the last are left out."""
    floor = max(
        [FAINT]
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


def _unpadded(found: dict[str, Tensor]) -> list[Objects]:
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


def _images(pair: tuple[Any, Any]) -> Iterator[tuple[Objects, Objects]]:
    """(prediction, truth) of each image of a batch."""
    found, truth = pair
    true = objects(truth["boxes"].cpu(), truth["labels"].cpu())
    for one, other in zip(_unpadded(found), true, strict=True):
        yield {name: one[name] for name in ("boxes", "scores", "labels")}, other
