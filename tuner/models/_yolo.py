"""What YOLOX and YOLOv9 share.

This is the access to libreyolo's networks and weights, and a non-maximum suppression whose result
has a fixed shape.

The networks and their losses are libreyolo's own (MIT), https://github.com/LibreYOLO/libreyolo.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from tuner.config.requirements import pip_install
from tuner.core.detectors import MAX_OBJECTS, Objects
from tuner.core.targets import NO_OBJECT
from tuner.core.weights import fetch_weights, is_path, load_matching_state, read_state_dict
from tuner.errors import SpaceError
from tuner.models._hub import hub_url

# the feature maps that a neck gives the head: 1/8, 1/16 and 1/32 of the canvas
LEVELS = ("fine", "middle", "coarse")
# so many of the best boxes go into the suppression, as in torchvision's one-stage detectors
CANDIDATES = 1000
MIN_SCORE = 0.001  # a lower score counts as no object, as in libreyolo's validation


def import_network(family: str) -> Any:
    """libreyolo's module with the networks of a family.

    Raises:
        SpaceError: It cannot be imported.
    """
    try:
        importlib.import_module("libreyolo")
    except ImportError:
        raise SpaceError(
            f"model.name: YOLO needs the package libreyolo: {pip_install('yolo')}"
        ) from None
    try:
        return importlib.import_module(f"libreyolo.models.{family}.nn")
    except ImportError as error:
        # it loads OpenCV, whose build with windows needs libraries that servers often lack
        raise SpaceError(
            f"model.name: the package libreyolo cannot be loaded ({error}); where a library of "
            "OpenCV's is missing: "
            "pip uninstall opencv-python && pip install --force-reinstall opencv-python-headless"
        ) from None


def load_yolo_weights(
    home: Path,
    model: nn.Module,
    weights: str,
    *,
    published: str,
    head: str,
    unused: Sequence[str] = (),
) -> tuple[str, ...]:
    """Load weights and return notes for the user.

    Args:
        home: The folder of caches and downloads.
        model: The network.
        weights: default: libreyolo's; none; or a path.
        published: The name under which libreyolo's weights are published.
        head: The name of the layers that depend on the classes.
        unused: Beginnings of the names of weights that only libreyolo's own training uses.

    Raises:
        SpaceError: `weights` is none of these.
        DataError: The weights are missing, damaged or do not fit.
    """
    if weights == "none":
        return ()
    if is_path(weights):
        state, source = read_state_dict(Path(weights)), weights
    elif weights == "default":
        path = fetch_weights(home, hub_url(f"LibreYOLO/{published}", f"{published}.pt"))
        state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(f"{head}.")}
        source = path.name
    else:
        raise SpaceError(
            f"model.weights: {weights!r} is not known for YOLO; default, none, or a path to a "
            ".safetensors, .pt or .pth file"
        )
    state = {name: value for name, value in state.items() if not name.startswith(tuple(unused))}
    return load_matching_state(model, state, head=head, source_name=f"weights: {source}")


def best_objects(boxes: Tensor, scores: Tensor, overlap: float) -> Objects:
    """The objects that non-maximum suppression within each class leaves, scores falling.

    The number of rows is the same for any image. The suppression sets scores to 0 and does not
    select rows, so that no shape depends on the image and the whole can be exported.

    Args:
        boxes: (n, 4): left, top, right, bottom, none below 0.
        scores: (n, classes).
        overlap: The intersection over union above which the box with the lower score is removed.

    Returns:
        `boxes` (m, 4), `scores` (m,) and `labels` (m,). A row without an object has the label
        NO_OBJECT and the score 0.
    """
    classes = scores.shape[1]
    top_scores, pairs = scores.flatten().topk(min(CANDIDATES, scores.shape[0] * classes))
    boxes, labels = boxes[pairs // classes], pairs % classes
    # moved so far that boxes of different classes never overlap
    distances = labels[:, None] * (boxes.detach().max() + 1)
    kept_indices = _suppress(boxes + distances, top_scores, overlap)
    top_scores = top_scores * torch.zeros_like(top_scores).scatter(0, kept_indices, 1.0)
    top_scores, order = top_scores.topk(min(MAX_OBJECTS, top_scores.shape[0]))
    is_object = top_scores > MIN_SCORE
    return {
        "boxes": boxes[order] * is_object[:, None],
        "scores": top_scores * is_object,
        "labels": labels[order].where(is_object, NO_OBJECT),
    }


def _suppress(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Indices of the boxes that stay; on the meta device, where models are only measured, all."""
    return torch.arange(len(boxes), device="meta") if boxes.is_meta else nms(boxes, scores, overlap)


def best_objects_per_image(
    boxes: Tensor, scores: Tensor, side: int, overlap: float
) -> list[Objects]:
    """`best_objects` of each image.

    Args:
        boxes: (images, n, 4): left, top, right, bottom, in pixels of the canvas.
        scores: (images, n, classes).
        side: Of the canvas, in pixels. Boxes are cut at its edges.
        overlap: See `best_objects`.
    """
    boxes, scores = boxes.float().clamp(0, side), scores.float()
    inside = (boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)
    return [best_objects(b, s, overlap) for b, s in zip(boxes, scores * inside, strict=True)]


def targets_to_rows(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    empty: float,
    convert: Callable[[Tensor], Tensor],
) -> Tensor:
    """True objects in the form that libreyolo's losses take.

    Args:
        boxes: Of each image, (k, 4): left, top, right, bottom, in pixels of the canvas.
        labels: Of each image, (k,).
        empty: The class in rows without an object.
        convert: Brings boxes into the form that the loss takes.

    Returns:
        (images, largest k, 5): the class, then the converted box.
    """
    max_objects = max(len(image_labels) for image_labels in labels)
    rows = boxes[0].new_zeros(len(boxes), max_objects, 5)
    rows[..., 0] = empty
    for i, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        classes = image_labels[:, None].to(image_boxes.dtype)
        rows[i, : len(image_labels)] = torch.cat([classes, convert(image_boxes)], dim=1)
    return rows
