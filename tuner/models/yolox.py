"""YOLOX by libreyolo (extra `yolo`).

Cut at the stem, each part of the backbone, and the neck.

Ge et al., YOLOX: Exceeding YOLO Series in 2021, arXiv:2107.08430.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import box_convert

from tuner.core.detectors import DetectorHead, DetectorStage, Objects, pad_objects
from tuner.core.input_spec import ImageInputSpec, TensorTree
from tuner.core.types import StagedModel
from tuner.models._detector_backbone import CanvasCheck, backbone_stages
from tuner.models._yolo import (
    LEVELS,
    best_objects_per_image,
    import_network,
    load_yolo_weights,
    targets_to_rows,
)

TASKS = ("detection",)
NAMES = ("yolox_nano", "yolox_tiny", "yolox_s", "yolox_m", "yolox_l", "yolox_x")
EXPORTS = ("safetensors", "torch_export", "onnx")
# the paper's section 2.1: SGD with lr 0.01 x batch / 64, Nesterov's momentum 0.9, weight decay
# 0.0005, cosine schedule after 5 epochs of warm-up, at the end 5 % of lr; average of the weights
# with the decay 0.9998; the same in
# https://github.com/Megvii-BaseDetection/YOLOX/blob/main/yolox/exp/yolox_base.py
RECIPES = {
    "detection": {
        "optimizer": "sgd",
        "lr": 0.0025,
        "batch_size": 16,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.0005,
        "schedule": "cosine",
        "min_lr": 0.05,
        "ema": 0.9998,
        "warmup": 0.05,
        "epochs": 30,
    }
}
# the intersection over union above which the lower score is removed: the authors' value for COCO
MAX_OVERLAP = 0.65
TAPPED_PARTS = ("dark3", "dark4", "dark5")


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """Pixels of 0..255: 416 a side for nano and tiny, 640 for the others."""
    size = 416 if name in ("yolox_nano", "yolox_tiny") else 640
    return ImageInputSpec(size, size, "bilinear", (0.0,) * 3, (1 / 255,) * 3, fit="letterbox")


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(
            description="default: the published weights; none: fresh parameters; or a path to a "
            ".safetensors or .pth file"
        ),
    ] = "default",
) -> StagedModel:
    """Model `name` for `outputs` classes.

    Depth 1 freezes the stem, each of the depths 2 to 5 one part of the backbone more, and depth 6
    the neck too.

    Raises:
        SpaceError: libreyolo is not installed, or the name of the weights is unknown.
        DataError: The weights are missing, damaged or do not fit.
    """
    letter = name.removeprefix("yolox_")[0]
    model: Any = import_network("yolox").LibreYOLOXModel(letter, nb_classes=outputs)
    model.init_weights()
    model.head.export = True  # eval mode gives one decoded tensor
    notes = load_yolo_weights(
        home, model, weights, published=f"LibreYOLOX{letter}", head="head.cls_preds"
    )
    pyramid = model.backbone
    parts: dict[str, nn.Module] = {
        "stem": nn.Sequential(CanvasCheck(name, bgr=True), pyramid.backbone.stem)
    }
    parts |= {part: getattr(pyramid.backbone, part) for part in ("dark2", *TAPPED_PARTS)}
    stages = {
        **backbone_stages(parts, TAPPED_PARTS),
        "neck": YoloxNeck(pyramid),
        "head": DecoupledHead(model.head),
    }
    return StagedModel(
        model, stages, notes, native_forward=native_forward, can_probe=False, exports_batched=False
    )


class YoloxNeck(DetectorStage):
    """The feature pyramid: the forward pass of libreyolo's pyramid, without its backbone.

    That forward pass calls `self.backbone`. Here this method gives the feature maps that the stages
    before the neck computed.
    """

    def __init__(self, pyramid: Any) -> None:
        super().__init__()
        self.run, self.in_features = type(pyramid).forward, pyramid.in_features
        for name, child in pyramid.named_children():
            if name != "backbone":
                self.add_module(name, child)

    def backbone(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return x

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(LEVELS, self.run(self, x), strict=True))


class DecoupledHead(DetectorHead):
    """YOLOX's head; its losses match objects to anchors by SimOTA."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        target_rows = targets_to_rows(
            [t["boxes"] for t in targets], [t["labels"] for t in targets], 0, convert_to_centres
        )
        with _reserve_kept():
            losses = self.head([x[level] for level in LEVELS], labels=target_rows)
        return {name: losses[name] for name in ("iou_loss", "obj_loss", "cls_loss")}

    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        return decode_objects(self.head([x[level] for level in LEVELS]), 8 * x[LEVELS[0]].shape[-1])


@contextmanager
def _reserve_kept() -> Iterator[None]:
    """A context in which torch keeps what it has reserved of a GPU's memory.

    libreyolo's loss gives it back for each image of each step, and asks the GPU anew for what the
    next image needs; both wait for the GPU.
    """
    give_back = torch.cuda.empty_cache
    torch.cuda.empty_cache = lambda: None
    try:
        yield
    finally:
        torch.cuda.empty_cache = give_back


def convert_to_centres(boxes: Tensor) -> Tensor:
    """Boxes as centre, width and height, from left, top, right, bottom."""
    centred_boxes: Tensor = box_convert(boxes, "xyxy", "cxcywh")
    return centred_boxes


def decode_objects(decoded: Tensor, side: int) -> list[Objects]:
    """The objects of each image.

    Args:
        decoded: (n, anchors, 5 + classes): centre, width and height in pixels, then the probability
            of an object, then that of each class. An anchor has only its best class.
        side: Of the canvas, in pixels.
    """
    scores = decoded[..., 4:5] * decoded[..., 5:]
    scores = scores.where(
        torch.arange(scores.shape[-1], device=scores.device) == scores.argmax(-1, keepdim=True), 0.0
    )
    return best_objects_per_image(
        box_convert(decoded[..., :4], "cxcywh", "xyxy"), scores, side, MAX_OVERLAP
    )


def native_forward(model: nn.Module, x: TensorTree) -> TensorTree:
    """The model as libreyolo calls it, from RGB of 0..255 to objects."""
    assert isinstance(x, Tensor)
    return pad_objects(decode_objects(model(x.flip(1)), x.shape[-1]))
