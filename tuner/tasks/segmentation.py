"""A class per pixel: cross-entropy or Dice loss, and scores over all pixels by one confusion matrix.

Cross-entropy with half of the auxiliary head's is the criterion of torchvision's references/segmentation; the Dice loss (Milletari et
al., V-Net, 3DV 2016) is segmentation_models_pytorch's, multiclass.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from tuner import deferred_figures
from tuner.config.run import Recipe
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree, tree_to_dict
from tuner.core.targets import IGNORED
from tuner.core.types import Batch, Dataset, Prediction, Task, relative_difference
from tuner.tasks import _annotated_images

METRICS = ("mean_iou", "dice", "pixel_accuracy", "mean_accuracy")
AUXILIARY_WEIGHT = 0.5  # weight of the loss of an output `aux`, as torchvision's
EXAMPLES_SHOWN = 8  # validation examples on a contact sheet
MAX_PICTURE_SIDE = 1024  # longer side of a picture, pixels


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    *,
    loss: Annotated[
        Literal["cross_entropy", "dice", "both"],
        Field(description="cross_entropy per pixel, dice (overlap per class), or the sum of both"),
    ] = "cross_entropy",
) -> Task:
    return Segmentation(classes, recipe.label_smoothing, loss)


class Segmentation(Task):
    """y is uint8 (n, h, w) with IGNORED where nothing is asked; a model gives logits (n, classes, h, w), or a dict of them with `out`
    and maybe `aux`; predictions are uint8 (n, h, w) on the CPU."""

    metrics = METRICS

    output_description = "logits (batch, class, height, width) in the order of the classes; the class of a pixel is the argmax over them"

    def __init__(self, classes: tuple[str, ...], label_smoothing: float, kind: str) -> None:
        self.classes, self.label_smoothing, self.loss_name = classes, label_smoothing, kind

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch.y, Tensor)
        outputs, truth = tree_to_dict(net(batch.x)), batch.y.long()
        whole = self._head_loss(_main_output(outputs), truth)
        return (
            whole + AUXILIARY_WEIGHT * self._head_loss(outputs["aux"], truth)
            if "aux" in outputs
            else whole
        )

    def _head_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        total = logits.new_zeros(())
        if self.loss_name != "dice":
            total = total + F.cross_entropy(
                logits, truth, ignore_index=IGNORED, label_smoothing=self.label_smoothing
            )
        return total if self.loss_name == "cross_entropy" else total + dice_loss(logits, truth)

    def predict(self, net: nn.Module, x: TensorTree) -> Tensor:
        return _main_output(tree_to_dict(net(x))).argmax(1).to(torch.uint8).cpu()

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Means over the classes that are true or predicted somewhere, of IoU, Dice (F1) and recall, and the share of right pixels."""
        matrix = self._confusion_matrix(pairs)
        found = {
            name: values[~values.isnan()].mean()
            for name, values in per_class_scores(matrix).items()
        }
        right = matrix.diag().sum() / matrix.sum()
        scores = {
            "mean_iou": found["iou"],
            "dice": found["dice"],
            "pixel_accuracy": right,
            "mean_accuracy": found["recall"],
        }
        return {name: float(value) for name, value in scores.items()}

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        matrix = self._confusion_matrix(pairs)
        return {
            "predictions.png": _contact_sheet(pairs, data),
            "confusion.png": deferred_figures.defer_figure(
                "confusion", matrix=matrix.tolist(), classes=self.classes
            ),
            "per_class.csv": _per_class_csv(matrix, self.classes),
        }

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        assert isinstance(input_spec, ImageInputSpec)
        logits = _main_output(tree_to_dict(function(x)))
        return [
            self._describe_image(one, original, input_spec)
            for one, original in zip(logits, originals, strict=True)
        ]

    def _describe_image(
        self, logits: Tensor, original: Any, image_spec: ImageInputSpec
    ) -> Prediction:
        mask = mask_on_image(logits, original.width, original.height, image_spec)
        counts = np.bincount(mask.ravel(), minlength=256)[: len(self.classes)]
        shares = {
            name: float(count) / max(1, int(counts.sum()))
            for name, count in zip(self.classes, counts, strict=True)
        }
        line = "  ".join(
            f"{name} {share:.1%}"
            for name, share in sorted(shares.items(), key=lambda pair: -pair[1])
            if share > 0
        )
        small = original.copy()
        small.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
        marked = mask[_nearest_indices(small.height, mask.shape[0])][
            :, _nearest_indices(small.width, mask.shape[1])
        ]
        return Prediction(
            line,
            {"shares": shares},
            _annotated_images.encode_png(_annotated_images.draw_mask(small, marked)),
        )

    def _confusion_matrix(self, pairs: Iterable[tuple[Any, Any]]) -> Tensor:
        """int64 (classes, classes): true class down, predicted class across, over all pixels that are not ignored."""
        n = len(self.classes)
        matrix = torch.zeros(n, n, dtype=torch.int64)
        for predicted, truth in pairs:
            matrix += multiclass_confusion_matrix(
                predicted.long(), truth.cpu().long(), n, ignore_index=IGNORED, validate_args=False
            )
        return matrix


def _main_output(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["out"] if "out" in outputs else next(iter(outputs.values()))


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - Dice of the softmax over the whole batch, mean over the classes; a class that is nowhere true adds nothing."""
    asked = (truth != IGNORED).unsqueeze(1)
    said = logits.softmax(1) * asked
    true = F.one_hot(truth.where(asked[:, 0], 0), logits.shape[1]).permute(0, 3, 1, 2) * asked
    both, all_said, all_true = (v.sum((0, 2, 3)) for v in (said * true, said, true))
    return ((1 - 2 * both / (all_said + all_true).clamp_min(1e-7)) * (all_true > 0)).mean()


def per_class_scores(matrix: Tensor) -> dict[str, Tensor]:
    """IoU, Dice, recall and precision of each class, float64 (classes,); NaN where there is nothing to count."""
    hits, true, said = (v.double() for v in (matrix.diag(), matrix.sum(1), matrix.sum(0)))
    return {
        "iou": hits / (true + said - hits),
        "dice": 2 * hits / (true + said),
        "recall": hits / true,
        "precision": hits / said,
    }


def mask_on_image(
    logits: Tensor, width: int, height: int, image_spec: ImageInputSpec
) -> NDArray[np.uint8]:
    """The class of each pixel of an image of width x height, from logits (classes, size, size) of its canvas.

    Logits are resized, not classes, so that edges are smooth. Pixels that the canvas crops away are IGNORED.
    """
    at, size = place_on_canvas(width, height, image_spec), logits.shape[-1]
    left, top, right, bottom = (
        max(0, at.left),
        max(0, at.top),
        min(size, at.left + at.width),
        min(size, at.top + at.height),
    )
    across, down = width / at.width, height / at.height
    x0, x1 = round((left - at.left) * across), round((right - at.left) * across)
    y0, y1 = round((top - at.top) * down), round((bottom - at.top) * down)
    seen = logits[:, top:bottom, left:right].float()
    best = torch.full((y1 - y0, x1 - x0), -torch.inf)
    found = torch.zeros(best.shape, dtype=torch.uint8)
    for label, plane in enumerate(
        seen
    ):  # one class at a time: all of them at a photograph's size would fill the memory
        values = F.interpolate(
            plane[None, None], size=best.shape, mode="bilinear", align_corners=False
        )[0, 0]
        better = values > best
        best, found = values.where(better, best), found.masked_fill(better, label)
    whole = np.full((height, width), IGNORED, np.uint8)
    whole[y0:y1, x0:x1] = found.numpy()
    return whole


def _nearest_indices(small: int, large: int) -> NDArray[np.int64]:
    """For each of `small` pixels the one of `large` that lies at its middle."""
    return ((np.arange(small) + 0.5) * large / small).astype(np.int64)


def _contact_sheet(pairs: Sequence[tuple[Any, Any]], data: Dataset) -> bytes:
    """Image, truth and prediction of the first validation examples: the same in every trial, so that trials compare."""
    predicted, truth = (
        torch.cat([pair[i].cpu() for pair in pairs])[:EXAMPLES_SHOWN].numpy() for i in (0, 1)
    )
    x = data.valid.take(torch.arange(len(predicted)), 0).x
    assert isinstance(x, Tensor)
    rows = []
    for pixels, true, said in zip(x.numpy(), truth, predicted, strict=True):
        image = _annotated_images.image_of_pixels(pixels)
        views = [
            image,
            _annotated_images.draw_mask(image, true),
            _annotated_images.draw_mask(image, np.where(true == IGNORED, IGNORED, said)),
        ]
        rows.append(
            [
                view.resize(
                    (_annotated_images.TILE_SIDE, _annotated_images.TILE_SIDE),
                    Image.Resampling.NEAREST,
                )
                for view in views
            ]
        )
    return _annotated_images.make_contact_sheet(rows, ["image", "truth", "prediction"])


def _per_class_csv(matrix: Tensor, classes: tuple[str, ...]) -> bytes:
    """IoU, Dice, recall, precision and true pixels of each class, as CSV; empty where there is nothing to count."""
    found = per_class_scores(matrix)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", *found, "pixels"])
    for i, name in enumerate(classes):
        values = [float(column[i]) for column in found.values()]
        writer.writerow(
            [
                name,
                *("" if math.isnan(value) else f"{value:.4f}" for value in values),
                int(matrix[i].sum()),
            ]
        )
    return text.getvalue().encode()
