"""What the tasks whose predictions are objects share: how objects are compared between two formats,
and how they and their masks lie on an image.
"""

from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_masks
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tuner.core.detectors import Objects
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec
from tuner.core.targets import NO_OBJECT

OBJECT_FIELDS = ("boxes", "scores", "labels", "masks")  # detectors give no masks
MASK_THRESHOLD = 0.5  # probability from which a pixel belongs to the object
NOISE_SCORE = 0.05  # scores up to this are noise: formats may differ in such objects
SCORE_TOLERANCE = 1e-3  # scores of one object in two formats may differ by rounding


def boxes_on_original(boxes: Tensor, width: int, height: int, image_spec: ImageInputSpec) -> Tensor:
    """Boxes on the canvas, float32 (n, 4), in pixels of the original image of width x height."""
    placement = place_on_canvas(width, height, image_spec)
    scale = torch.tensor([width / placement.width, height / placement.height] * 2)
    shift = torch.tensor([placement.left, placement.top] * 2)
    limit = torch.tensor([width, height] * 2, dtype=torch.float32)
    return ((boxes - shift) * scale).clamp(min=0).minimum(limit)


def above_confidence(objects: Objects, confidence: float) -> Objects:
    """The objects with a score of at least `confidence`."""
    rows = objects["scores"] >= confidence
    return {name: objects[name][rows] for name in OBJECT_FIELDS if name in objects}


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


def objects_difference(expected: Objects, got: Objects) -> float:
    """How much the objects of one image differ between two outputs, whatever their order.

    Each expected object is matched with the nearest object that is still unmatched, the highest
    score first. A pair counts by its difference, an object without a partner by its score.
    Objects whose score is noise do not count.

    Args:
        expected: `boxes` (n, 4), `scores` (n,) falling, `labels` (n,), and `full`.
        got: the same of the other output.
    """
    floor = _score_floor(expected, got)
    side = max(1.0, float(expected["boxes"].abs().max())) if len(expected["boxes"]) else 1.0
    unmatched = set(range(len(got["scores"])))
    worst = 0.0
    for row, score in enumerate(expected["scores"].tolist()):
        if score <= floor:
            continue
        difference, match = _find_match(expected, row, got, unmatched, side)
        if difference < score:
            unmatched.discard(match)
        worst = max(worst, min(difference, score))
    extra = [got["scores"][row].item() for row in unmatched]
    return max([worst, *(score for score in extra if score > floor + SCORE_TOLERANCE)])


def _score_floor(expected: Objects, got: Objects) -> float:
    """The score up to which objects do not count.

    An output has room for a certain number of objects. If it is full, the last of them may be
    others in the other output, so scores near its lowest do not count.
    """
    lowest = [
        float(objects["scores"].min()) + SCORE_TOLERANCE
        for objects in (expected, got)
        if len(objects["scores"]) and objects["full"]
    ]
    return max([NOISE_SCORE, *lowest])


def _find_match(
    expected: Objects, row: int, got: Objects, unmatched: set[int], side: float
) -> tuple[float, int]:
    """The nearest unmatched object of the same class: its difference and its row.

    The difference is that of the boxes relative to `side`, or that of the scores or masks if it is
    larger; infinity if there is no such object.
    """
    differences = [
        (
            max(
                float((expected["boxes"][row] - got["boxes"][i]).abs().max()) / side,
                float((expected["scores"][row] - got["scores"][i]).abs()),
                _mask_difference(expected, row, got, i),
            ),
            i,
        )
        for i in unmatched
        if got["labels"][i] == expected["labels"][row]
    ]
    return min(differences, default=(float("inf"), -1))


def _mask_difference(expected: Objects, row: int, got: Objects, other: int) -> float:
    """How much the masks of two objects differ; 0 where there are none."""
    if "masks" not in expected:
        return 0.0
    return float((expected["masks"][row] - got["masks"][other]).abs().max())


def unpad_predictions(padded: dict[str, Tensor]) -> list[Objects]:
    """The objects of each image; `full`: there was no padding, so there may have been more."""
    names = [name for name in OBJECT_FIELDS if name in padded]
    images = []
    for row, labels in enumerate(padded["labels"]):
        real = labels != NO_OBJECT
        objects: Objects = {name: padded[name][row][real] for name in names}
        objects["full"] = real.all()
        images.append(objects)
    return images
