"""Small members of timm's families, of which the published ones are too large for the default tests."""

from typing import Any

# name -> (arguments that make it small, side of its images, stages)
SMALL_TIMM: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "swin_tiny_patch4_window7_224": (
        {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
        32,
        ["stem", "layers0", "layers1", "head"],
    ),
    "swinv2_tiny_window8_256": (
        {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
        32,
        ["stem", "layers0", "layers1", "head"],
    ),
    "vit_small_patch14_dinov2": (
        {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2},
        28,
        ["stem", "blocks0", "blocks1", "head"],
    ),
    "vit_small_patch16_dinov3": (
        {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
        32,
        ["stem", "blocks0", "blocks1", "head"],
    ),
    "deit_tiny_distilled_patch16_224": (
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
        32,
        ["stem", "blocks0", "blocks1", "head"],
    ),
    "beit_base_patch16_224": (
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
        32,
        ["stem", "blocks0", "blocks1", "head"],
    ),
    "eva02_tiny_patch14_224": (
        {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2},
        28,
        ["stem", "blocks0", "blocks1", "head"],
    ),
    "vit_base_patch32_siglip_256": (
        {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 2},
        64,
        ["stem", "blocks0", "blocks1", "attn_pool", "head"],
    ),
    "pvt_v2_b0": (
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2)},
        64,
        ["stem", "stages0", "stages1", "stages2", "stages3", "head"],
    ),
    "xcit_nano_12_p16_224": (
        {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
        32,
        ["stem", "blocks0", "blocks1", "cls_attn_blocks0", "cls_attn_blocks1", "head"],
    ),
}
