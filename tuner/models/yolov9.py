"""YOLOv9 by libreyolo (extra `yolo`), without the auxiliary branch.

Cut at the stem, each part of the backbone, and the neck.

Wang et al., YOLOv9: Learning What You Want to Learn Using Programmable Gradient Information, ECCV
2024; the networks are those of the MIT-licensed release,
https://github.com/MultimediaTechLab/YOLO.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

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
NAMES = ("yolov9_t", "yolov9_s", "yolov9_m", "yolov9_c")
EXPORTS = ("safetensors", "torch_export", "onnx")
# the paper's appendix A: SGD, lr 0.01 for 64 images falling linearly, momentum 0.937, weight decay
# 0.0005, 3 epochs of warm-up; of the authors' code the average of the weights with the decay 0.9999
# and, at the end, 1 % of lr
# https://github.com/WongKinYiu/yolov9/blob/main/data/hyps/hyp.scratch-high.yaml
RECIPES = {
    "detection": {
        "optimizer": "sgd",
        "lr": 0.0025,
        "batch_size": 16,
        "momentum": 0.937,
        "nesterov": True,
        "weight_decay": 0.0005,
        "schedule": "linear",
        "min_lr": 0.01,
        "ema": 0.9999,
        "warmup": 0.1,
        "epochs": 30,
    }
}
MAX_OVERLAP = 0.6  # as libreyolo validates
TAPPED_PARTS = ("elan2", "elan3", "elan4")


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """RGB of 0..1, 640 pixels a side."""
    return ImageInputSpec(640, 640, "bilinear", (0.0,) * 3, (1.0,) * 3, fit="letterbox")


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
    letter = name.removeprefix("yolov9_")
    # it reads values of its strides while it is built, and tensors on the meta device have none
    with torch.device("cpu"):
        model: Any = import_network("yolo9").LibreYOLO9Model(letter, nb_classes=outputs)
    model.to(torch.get_default_device())
    model.head.export = True  # eval mode gives one decoded tensor
    unused = ("aux.", "aux_head.", "head.dfl.")
    notes = load_yolo_weights(
        home, model, weights, published=f"LibreYOLO9{letter}", head="head.cv3", unused=unused
    )
    b = model.backbone
    parts: dict[str, nn.Module] = {
        "stem": nn.Sequential(CanvasCheck(name), b.conv0, b.conv1),
        "elan1": b.elan1,
        "elan2": nn.Sequential(b.down2, b.elan2),
        "elan3": nn.Sequential(b.down3, b.elan3),
        "elan4": nn.Sequential(b.down4, b.elan4, b.spp),
    }
    stages = {
        **backbone_stages(parts, TAPPED_PARTS),
        "neck": Yolov9Neck(model.neck),
        "head": AlignedHead(model.head),
    }
    return StagedModel(
        model, stages, notes, native_forward=native_forward, can_probe=False, exports_batched=False
    )


class Yolov9Neck(DetectorStage):
    """libreyolo's neck, which takes three feature maps of the backbone."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(LEVELS, self.neck(*(x[tap] for tap in TAPPED_PARTS)), strict=True))


class AlignedHead(DetectorHead):
    """YOLOv9's head; its losses match objects to anchors by task alignment."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        side = 8 * x[LEVELS[0]].shape[-1]
        target_rows = targets_to_rows(
            [t["boxes"] for t in targets],
            [t["labels"] for t in targets],
            -1,
            lambda boxes: boxes / side,
        )
        losses = self.head(
            [x[level] for level in LEVELS], targets=target_rows, img_size=(side, side)
        )
        return {name: losses[name] for name in ("box_loss", "dfl_loss", "cls_loss")}

    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        decoded, _ = self.head([x[level] for level in LEVELS])
        return decode_objects(decoded, 8 * x[LEVELS[0]].shape[-1])


def decode_objects(decoded: Tensor, side: int) -> list[Objects]:
    """The objects of each image.

    Args:
        decoded: (n, 4 + classes, anchors): left, top, right, bottom in pixels, then the probability
            of each class. An anchor may have several classes.
        side: Of the canvas, in pixels.
    """
    return best_objects_per_image(
        decoded[:, :4].transpose(1, 2), decoded[:, 4:].transpose(1, 2), side, MAX_OVERLAP
    )


def native_forward(model: nn.Module, x: TensorTree) -> TensorTree:
    """The model as libreyolo calls it, from RGB of 0..1 to objects."""
    assert isinstance(x, Tensor)
    return pad_objects(decode_objects(model(x), x.shape[-1]))
