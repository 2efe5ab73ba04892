"""RT-DETR through transformers (extra `text`).

Cut at the stem, each stage of the backbone, and the hybrid encoder.

Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.models import _detr

TASKS = ("detection",)
NAMES = ("rtdetr_r18", "rtdetr_r34", "rtdetr_r50", "rtdetr_r101")
EXPORTS = ("safetensors", "torch_export", "onnx")
# the paper's table A: AdamW, lr 0.0001, 0.00001 for the backbone, weight decay 0.0001, gradients
# clipped at 0.1, batches of 16, warm-up of 2,000 steps, then constant, average of the weights with
# the decay 0.9999; the same in configs/rtdetr/include/optimizer.yml of
# https://github.com/lyuwenyu/RT-DETR/tree/main/rtdetrv2_pytorch
RECIPES = {
    "detection": {
        "optimizer": "adamw",
        "lr": 0.0001,
        "backbone_lr": 0.1,
        "weight_decay": 0.0001,
        "clip_norm": 0.1,
        "batch_size": 16,
        "schedule": "constant",
        "ema": 0.9999,
        "warmup": 0.05,
        "epochs": 30,
    }
}
BASIC = {"hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
# how each differs from the library's default, which is ResNet-50: settings of the backbone, and
# the other settings
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "r18": (
        BASIC | {"depths": [2, 2, 2, 2]},
        {"encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5, "decoder_layers": 3},
    ),
    "r34": (
        BASIC | {"depths": [3, 4, 6, 3]},
        {"encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5, "decoder_layers": 4},
    ),
    "r50": ({}, {}),
    "r101": (
        {"depths": [3, 4, 23, 3]},
        {
            "encoder_ffn_dim": 2048,
            "encoder_hidden_dim": 384,
            "decoder_in_channels": [384, 384, 384],
        },
    ),
}


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """RGB of 0..1, 640 pixels a side."""
    return _detr.INPUT_SPEC


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
            ".safetensors file or a folder with one"
        ),
    ] = "default",
) -> StagedModel:
    """Model `name` for `outputs` classes; see `_detr.build_detr`."""
    library = _detr.import_transformers()
    size = name.removeprefix("rtdetr_")
    backbone, settings = SIZES[size]
    inner = library.RTDetrResNetConfig(**{"out_indices": [2, 3, 4], **backbone})
    config = library.RTDetrConfig(backbone_config=inner, num_labels=outputs, **settings)
    return _detr.build_detr(
        home, name, library.RTDetrForObjectDetection, config, f"PekingU/rtdetr_{size}vd", weights
    )
