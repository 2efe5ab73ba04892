"""Semantic segmentation: a class per pixel, scored over all pixels by one confusion matrix.

Cross-entropy plus half of the auxiliary head's cross-entropy is the criterion of torchvision's
references/segmentation. The Dice loss (Milletari et al., V-Net, 3DV 2016) is the multiclass one of
segmentation_models_pytorch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from tuner import deferred_figures
from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import (
    ImageInputSpec,
    InputSpec,
    TensorTree,
    relative_difference,
    tree_to_dict,
)
from tuner.core.losses import mean_cross_entropy, weights_of_classes
from tuner.core.targets import IGNORED
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.tasks import _annotated_images
from tuner.tasks._csv_tables import encode_csv

METRICS = ("mean_iou", "dice", "pixel_accuracy", "mean_accuracy")
RECIPE_KEYS = ("class_weights", "auxiliary_lr")
SEARCH_KEYS = ("test_flips",)
AUXILIARY_WEIGHT = 0.5  # weight of the loss of an output `aux`, as in torchvision
EXAMPLES_SHOWN = 8  # validation examples on a contact sheet
MAX_ANNOTATED_SIDE = 1024  # longer side of an annotated image in pixels


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    class_counts: Tensor | None = None,
    *,
    loss: Annotated[
        Literal["cross_entropy", "dice", "both"],
        Field(description="cross_entropy per pixel, dice (overlap per class), or the sum of both"),
    ] = "cross_entropy",
) -> Task:
    """The task for these classes.

    Args:
        classes: the names of the classes.
        recipe: how the model is trained; the cross-entropy follows it.
        class_counts: int64 (classes,), how many training pixels each class has, on the device of
            the training; None: classes are not weighted.
        loss: what is minimised.
    """
    weights = (
        None if class_counts is None else weights_of_classes(class_counts, recipe.class_weights)
    )
    return Segmentation(classes, recipe.label_smoothing, loss, weights)


class Segmentation(Task):
    """Gives each pixel a class.

    y is uint8 (n, h, w), IGNORED where a pixel does not count. A model gives logits
    (n, classes, h, w), or a dict of them with `out` and maybe `aux`. Predictions are uint8
    (n, h, w).
    """

    metrics = METRICS

    output_description = (
        "logits (batch, class, height, width) in the order of the classes; "
        "the class of a pixel is the argmax over them"
    )

    def __init__(
        self,
        classes: tuple[str, ...],
        label_smoothing: float,
        loss_name: str,
        class_weights: Tensor | None = None,
    ) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing
        self.loss_name, self.class_weights = loss_name, class_weights

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch.y, Tensor)
        outputs, truth = tree_to_dict(net(batch.x)), batch.y.long()
        loss = self._head_loss(_main_output(outputs), truth)
        if "aux" in outputs:
            loss = loss + AUXILIARY_WEIGHT * self._head_loss(outputs["aux"], truth)
        return loss

    def _head_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        total = logits.new_zeros(())
        if self.loss_name != "dice":
            total = total + mean_cross_entropy(
                logits, truth, IGNORED, self.label_smoothing, self.class_weights
            )
        return total if self.loss_name == "cross_entropy" else total + dice_loss(logits, truth)

    def predict(self, net: nn.Module, x: TensorTree) -> Tensor:
        return _main_output(tree_to_dict(net(x))).argmax(1).to(torch.uint8)

    def predict_originals(
        self, net: nn.Module, x: TensorTree, sizes: Sequence[tuple[int, int]], input_spec: InputSpec
    ) -> Iterator[Tensor]:
        """The class of each pixel of each original image, uint8 (1, height, width)."""
        assert isinstance(input_spec, ImageInputSpec)
        logits = _main_output(tree_to_dict(net(x)))
        for image_logits, (width, height) in zip(logits, sizes, strict=True):
            mask = mask_on_image(image_logits.cpu(), width, height, input_spec)
            yield torch.from_numpy(mask)[None]

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Mean IoU, Dice (F1) and recall of the classes, and the share of right pixels.

        A class that is neither true nor predicted anywhere is not part of the means.
        """
        return mean_scores(*pixel_counts(self._confusion_matrix(pairs)))

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """Pixels of each class in each image that are `hits`, `true` and `predicted`: int64
        (n, classes) each.
        """
        counts = [
            torch.stack(pixel_counts(self._confusion_matrix([(image[None], truth[None])])))
            for batch in pairs
            for image, truth in zip(batch[0].cpu(), batch[1].cpu(), strict=True)
        ]
        return dict(zip(("hits", "true", "predicted"), torch.stack(counts, 1), strict=True))

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        hits, true, predicted = (
            (results[name] * counts[:, None]).sum(0) for name in ("hits", "true", "predicted")
        )
        return mean_scores(hits, true, predicted)

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """`iou`, `dice`, `recall`, `precision` and true `pixels` of each class; a score of 0 of 0
        pixels is left out.
        """
        return self._scores_of_classes(self._confusion_matrix(pairs))

    def _scores_of_classes(self, matrix: Tensor) -> dict[str, dict[str, float]]:
        columns = per_class_scores(*pixel_counts(matrix))
        found: dict[str, dict[str, float]] = {}
        for label, name in enumerate(self.classes):
            values = {key: float(column[label]) for key, column in columns.items()}
            found[name] = {key: value for key, value in values.items() if not math.isnan(value)}
            found[name]["pixels"] = int(matrix[label].sum())
        return found

    def mirror_output(self, output: TensorTree) -> TensorTree:
        """The logits of each pixel, with left and right exchanged back."""
        if isinstance(output, Tensor):
            return output.flip(-1)
        return {name: logits.flip(-1) for name, logits in output.items()}

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        matrix = self._confusion_matrix(pairs)
        return {
            "predictions.png": _contact_sheet(pairs, data),
            "confusion.png": deferred_figures.defer_figure(
                "confusion", matrix=matrix.tolist(), classes=self.classes
            ),
            "per_class.csv": _per_class_csv(self._scores_of_classes(matrix)),
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
            self._describe_image(image_logits, original, input_spec)
            for image_logits, original in zip(logits, originals, strict=True)
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
        small.thumbnail((MAX_ANNOTATED_SIDE, MAX_ANNOTATED_SIDE))
        rows = _nearest_indices(small.height, mask.shape[0])
        columns = _nearest_indices(small.width, mask.shape[1])
        annotated = _annotated_images.draw_mask(small, mask[rows][:, columns])
        return Prediction(line, {"shares": shares}, _annotated_images.encode_png(annotated))

    def _confusion_matrix(self, pairs: Iterable[tuple[Any, Any]]) -> Tensor:
        """int64 (classes, classes), over all pixels that are not ignored.

        Rows are true classes, columns are predicted classes.
        """
        n = len(self.classes)
        total = torch.zeros((), dtype=torch.int64)
        for predicted, truth in pairs:
            total = total.to(predicted.device) + count_pixels(predicted, truth, n)
        return total.expand(n, n).cpu()


def count_pixels(predicted: Tensor, truth: Tensor, class_count: int) -> Tensor:
    """How many pixels of each true class have each predicted class: int64 (classes, classes).

    Rows are true classes. It is computed on the device of `predicted`.

    Args:
        predicted: uint8 (n, h, w), on any device, IGNORED where a pixel is not seen.
        truth: uint8 (n, h, w), IGNORED where a pixel does not count.
        class_count: The number of classes, below IGNORED.
    """
    cells = class_count**2
    rows = truth.to(predicted.device)
    rows = rows.masked_fill(predicted == IGNORED, IGNORED)  # what a crop does not show
    # int32 is half as much memory to read; a pixel that does not count goes into a cell behind all
    index = rows.int() * class_count + predicted
    index = index.masked_fill_(rows == IGNORED, cells)
    counts = torch.bincount(index.flatten(), minlength=cells + 1)
    return counts[:cells].view(class_count, class_count)


def _main_output(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["out"] if "out" in outputs else next(iter(outputs.values()))


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - Dice of the softmax over the whole batch, mean over the classes.

    A class that no pixel of the batch has adds nothing.

    Args:
        logits: float (n, classes, h, w).
        truth: int64 (n, h, w), IGNORED where a pixel does not count.
    """
    counted = (truth != IGNORED).unsqueeze(1)
    predicted = logits.softmax(1) * counted
    labels = truth.where(counted[:, 0], 0)
    true = F.one_hot(labels, logits.shape[1]).permute(0, 3, 1, 2) * counted
    overlap, predicted_sum, true_sum = (
        v.sum((0, 2, 3)) for v in (predicted * true, predicted, true)
    )
    dice = 2 * overlap / (predicted_sum + true_sum).clamp_min(1e-7)
    return ((1 - dice) * (true_sum > 0)).mean()


def pixel_counts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels of each class that are hits, true and predicted, int64 (classes,) each."""
    return matrix.diag(), matrix.sum(1), matrix.sum(0)


def mean_scores(hits: Tensor, true: Tensor, predicted: Tensor) -> dict[str, float]:
    """The task's metrics, of the pixels of each class; see `Segmentation.score`."""
    means = {
        name: values[~values.isnan()].mean()
        for name, values in per_class_scores(hits, true, predicted).items()
    }
    scores = {
        "mean_iou": means["iou"],
        "dice": means["dice"],
        "pixel_accuracy": hits.sum() / true.sum(),
        "mean_accuracy": means["recall"],
    }
    return {name: float(value) for name, value in scores.items()}


def per_class_scores(hits: Tensor, true: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """IoU, Dice, recall and precision of each class, float64 (classes,); NaN for 0 of 0 pixels."""
    hits, true, predicted = (v.double() for v in (hits, true, predicted))
    return {
        "iou": hits / (true + predicted - hits),
        "dice": 2 * hits / (true + predicted),
        "recall": hits / true,
        "precision": hits / predicted,
    }


def mask_on_image(
    logits: Tensor, width: int, height: int, image_spec: ImageInputSpec
) -> NDArray[np.uint8]:
    """The class of each pixel of the original image, uint8 (height, width).

    Logits are resized, not classes, so that edges are smooth. Pixels that the canvas crops away are
    IGNORED.

    Args:
        logits: float (classes, size, size), of the canvas.
        width: the width of the original image in pixels.
        height: the height of the original image in pixels.
        image_spec: how the original image lies on the canvas.
    """
    placement, size = place_on_canvas(width, height, image_spec), logits.shape[-1]
    left, right = max(0, placement.left), min(size, placement.left + placement.width)
    top, bottom = max(0, placement.top), min(size, placement.top + placement.height)
    x_scale, y_scale = width / placement.width, height / placement.height
    x0, x1 = (round((x - placement.left) * x_scale) for x in (left, right))
    y0, y1 = (round((y - placement.top) * y_scale) for y in (top, bottom))
    best = torch.full((y1 - y0, x1 - x0), -torch.inf)
    labels = torch.zeros(best.shape, dtype=torch.uint8)
    # one class at a time: all of them at the size of a photograph would fill the memory
    for label, class_logits in enumerate(logits[:, top:bottom, left:right].float()):
        resized = F.interpolate(
            class_logits[None, None], size=best.shape, mode="bilinear", align_corners=False
        )[0, 0]
        is_better = resized > best
        best, labels = resized.where(is_better, best), labels.masked_fill(is_better, label)
    mask = np.full((height, width), IGNORED, np.uint8)
    mask[y0:y1, x0:x1] = labels.numpy()
    return mask


def _nearest_indices(small: int, large: int) -> NDArray[np.int64]:
    """For each of `small` pixels in a line, the index of the pixel of `large` at its middle."""
    return ((np.arange(small) + 0.5) * large / small).astype(np.int64)


def _contact_sheet(pairs: Sequence[tuple[Any, Any]], data: Dataset) -> bytes:
    """Image, truth and prediction of the first validation examples.

    They are the same examples in every trial, so that trials can be compared.
    """
    predicted, truth = (
        torch.cat([pair[i].cpu() for pair in pairs])[:EXAMPLES_SHOWN].numpy() for i in (0, 1)
    )
    x = data.valid.take(torch.arange(len(predicted)), 0).x
    assert isinstance(x, Tensor)
    rows = []
    for pixels, true_mask, predicted_mask in zip(x.numpy(), truth, predicted, strict=True):
        image = _annotated_images.image_of_pixels(pixels)
        views = [
            image,
            _annotated_images.draw_mask(image, true_mask),
            _annotated_images.draw_mask(
                image, np.where(true_mask == IGNORED, IGNORED, predicted_mask)
            ),
        ]
        tile_size = (_annotated_images.TILE_SIDE, _annotated_images.TILE_SIDE)
        rows.append([view.resize(tile_size, Image.Resampling.NEAREST) for view in views])
    return _annotated_images.make_contact_sheet(rows, ["image", "truth", "prediction"])


def _per_class_csv(class_scores: Mapping[str, Mapping[str, float]]) -> bytes:
    """IoU, Dice, recall, precision and true pixels of each class, as CSV; empty for 0 of 0."""
    columns = ("iou", "dice", "recall", "precision")
    rows = [
        [name, *(f"{s[key]:.4f}" if key in s else "" for key in columns), s["pixels"]]
        for name, s in class_scores.items()
    ]
    return encode_csv(["class", *columns, "pixels"], rows)
