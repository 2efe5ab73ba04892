"""D-FINE through transformers (extra `text`).

Cut at the stem, each stage of the backbone, and the hybrid encoder.

Peng et al., D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement,
ICLR 2025.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.models import _detr

TASKS = ("detection",)
NAMES = ("dfine_n", "dfine_s", "dfine_m", "dfine_l", "dfine_x")
EXPORTS = ("safetensors", "torch_export", "onnx")
# the authors' configurations: AdamW, lr 0.00025 and weight decay 0.000125 for 32 images, gradients
# clipped at 0.1, warm-up of 500 steps, then constant, average of the weights with the decay 0.9999;
# the smaller the model, the nearer the rate of its backbone is to lr.
# https://github.com/Peterande/D-FINE/tree/master/configs/dfine
RECIPES = {
    "detection": {
        "optimizer": "adamw",
        "lr": 0.000125,
        "backbone_lr": 0.05,
        "weight_decay": 0.000125,
        "clip_norm": 0.1,
        "batch_size": 16,
        "schedule": "constant",
        "ema": 0.9999,
        "warmup": 0.05,
        "epochs": 30,
    }
}
NAMED_RECIPES = {
    "dfine_n": {"detection": {"backbone_lr": 0.5}},
    "dfine_s": {"detection": {"backbone_lr": 0.5}},
    "dfine_m": {"detection": {"backbone_lr": 0.1}},
    "dfine_x": {"detection": {"backbone_lr": 0.01}},
}
HUB_NAMES = {"n": "nano", "s": "small", "m": "medium", "l": "large", "x": "xlarge"}
# HGNetV2 B0, B2, B4 and B5: channels of the stem; channels into, inside and out of each stage;
# blocks of each stage; layers of a block
BACKBONES = {
    "b0": (
        [3, 16, 16],
        [16, 64, 256, 512],
        [16, 32, 64, 128],
        [64, 256, 512, 1024],
        [1, 1, 2, 1],
        3,
    ),
    "b2": (
        [3, 24, 32],
        [32, 96, 384, 768],
        [32, 64, 128, 256],
        [96, 384, 768, 1536],
        [1, 1, 3, 1],
        4,
    ),
    "b4": (
        [3, 32, 48],
        [48, 128, 512, 1024],
        [48, 96, 192, 384],
        [128, 512, 1024, 2048],
        [1, 1, 3, 1],
        6,
    ),
    "b5": (
        [3, 32, 64],
        [64, 128, 512, 1024],
        [64, 128, 256, 512],
        [128, 512, 1024, 2048],
        [1, 2, 5, 2],
        6,
    ),
}
POINTS = {"decoder_n_points": [3, 6, 3]}
NANO = {
    "num_feature_levels": 2,
    "encoder_ffn_dim": 512,
    "encode_proj_layers": [1],
    "d_model": 128,
    "encoder_hidden_dim": 128,
    "decoder_ffn_dim": 512,
    "decoder_n_points": [6, 6],
    "decoder_in_channels": [128, 128],
    "feat_strides": [16, 32],
    "depth_mult": 0.5,
    "decoder_layers": 3,
    "hidden_expansion": 0.34,
}
WIDE = {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384, 384, 384]}
# the backbone; whether its activations have a learnt scale and shift; how the other settings differ
# from the library's default
SIZES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "n": ("b0", True, NANO),
    "s": ("b0", True, POINTS | {"decoder_layers": 3, "hidden_expansion": 0.5, "depth_mult": 0.34}),
    "m": ("b2", True, POINTS | {"decoder_layers": 4, "depth_mult": 0.67}),
    "l": ("b4", False, POINTS),
    "x": ("b5", False, POINTS | WIDE),
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
    size = name.removeprefix("dfine_")
    backbone, affine, settings = SIZES[size]
    stem, channels_in, channels_inside, channels_out, blocks, layers = BACKBONES[backbone]
    inner = library.HGNetV2Config(
        embedding_size=32,
        hidden_sizes=channels_out,
        stem_channels=stem,
        stage_in_channels=channels_in,
        stage_mid_channels=channels_inside,
        stage_out_channels=channels_out,
        stage_num_blocks=blocks,
        stage_numb_of_layers=[layers] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        use_learnable_affine_block=affine,
        out_indices=[3, 4] if size == "n" else [2, 3, 4],
    )
    encoder_channels = channels_out[2:] if size == "n" else channels_out[1:]
    config = library.DFineConfig(
        backbone_config=inner, num_labels=outputs, encoder_in_channels=encoder_channels, **settings
    )
    return _detr.build_detr(
        home,
        name,
        library.DFineForObjectDetection,
        config,
        f"ustc-community/dfine-{HUB_NAMES[size]}-coco",
        weights,
    )
