"""What YOLOX and YOLOv9 share: libreyolo's networks and weights, and non-maximum suppression of fixed shape.

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

LEVELS = (
    "fine",
    "middle",
    "coarse",
)  # what a neck gives the head, 1/8, 1/16 and 1/32 of the canvas
CANDIDATES = 1000  # the best before suppression, as torchvision's one-stage detectors keep them
MIN_SCORE = 0.001  # scores below count as none, as in libreyolo's validation


def import_network(family: str) -> Any:
    """libreyolo's module with the networks of a family. Raises SpaceError where it cannot be imported."""
    try:
        importlib.import_module("libreyolo")
    except ImportError:
        raise SpaceError(
            f"model.name: YOLO needs the package libreyolo: {pip_install('yolo')}"
        ) from None
    try:
        return importlib.import_module(f"libreyolo.models.{family}.nn")
    except (
        ImportError
    ) as error:  # it loads OpenCV, whose build with windows wants libraries that servers often lack
        raise SpaceError(
            f"model.name: the package libreyolo cannot be loaded ({error}); where a library of OpenCV's is missing: "
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
    """Loads `weights` (default: libreyolo's, by the name they are `published` under; none; a path) and gives what was noted.

    `head` depends on the classes; what begins with one of `unused` only trains. Raises SpaceError, DataError.
    """
    if weights == "none":
        return ()
    if is_path(weights):
        state, where = read_state_dict(Path(weights)), weights
    elif weights == "default":
        path = fetch_weights(home, hub_url(f"LibreYOLO/{published}", f"{published}.pt"))
        state, where = (
            {k: v for k, v in read_state_dict(path).items() if not k.startswith(f"{head}.")},
            path.name,
        )
    else:
        raise SpaceError(
            f"model.weights: {weights!r} is not known for YOLO; default, none, or a path to a .safetensors, .pt or .pth file"
        )
    state = {name: value for name, value in state.items() if not name.startswith(tuple(unused))}
    return load_matching_state(model, state, head=head, source_name=f"weights: {where}")


def best_objects(boxes: Tensor, scores: Tensor, overlap: float) -> Objects:
    """The objects left by non-maximum suppression within each class, scores falling: as many rows for any image.

    `boxes` (n, 4) as left, top, right, bottom, none below 0; `scores` (n, classes). Rows without an object have label NO_OBJECT and
    score 0. Suppression marks instead of selecting, so that no shape depends on the image and the whole can be exported.
    """
    classes = scores.shape[1]
    top, at = scores.flatten().topk(min(CANDIDATES, scores.shape[0] * classes))
    boxes, labels = boxes[at // classes], at % classes
    apart = labels[:, None] * (boxes.detach().max() + 1)  # boxes of different classes never overlap
    kept = _suppress(boxes + apart, top, overlap)
    top = top * torch.zeros_like(top).scatter(0, kept, 1.0)
    top, order = top.topk(min(MAX_OBJECTS, top.shape[0]))
    real = top > MIN_SCORE
    return {
        "boxes": boxes[order] * real[:, None],
        "scores": top * real,
        "labels": labels[order].where(real, NO_OBJECT),
    }


def _suppress(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Indices of the boxes that stay. On the meta device, where models are only counted, all do."""
    return torch.arange(len(boxes), device="meta") if boxes.is_meta else nms(boxes, scores, overlap)


def best_objects_per_image(
    boxes: Tensor, scores: Tensor, side: int, overlap: float
) -> list[Objects]:
    """`best` of each image, from boxes (images, n, 4) and scores (images, n, classes). Boxes are cut at a canvas of `side` pixels."""
    boxes, scores = boxes.float().clamp(0, side), scores.float()
    inside = (boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)
    return [best_objects(b, s, overlap) for b, s in zip(boxes, scores * inside, strict=True)]


def targets_to_rows(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    empty: float,
    convert: Callable[[Tensor], Tensor],
) -> Tensor:
    """Truth as libreyolo's losses take it: (n, most, 5), the class before `convert`ed boxes; missing rows have class `empty`."""
    most = max(len(k) for k in labels)
    found = boxes[0].new_zeros(len(boxes), most, 5)
    found[..., 0] = empty
    for i, (b, k) in enumerate(zip(boxes, labels, strict=True)):
        found[i, : len(k)] = torch.cat([k[:, None].to(b.dtype), convert(b)], dim=1)
    return found
