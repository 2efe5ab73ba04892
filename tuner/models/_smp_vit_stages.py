"""Where smp's DPT can be cut: at the stem and the blocks of its ViT, the decoder and the head.

A ViT has no feature maps, but tokens: after four of its blocks they are laid out as maps, all of
one size, and DPT's decoder resizes them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.models._cutter import compare_stages
from tuner.models._feature_maps import FeatureMapStage
from tuner.models._forward_pass import TRACE_ERRORS, UncutModel
from tuner.models._timm import import_timm
from tuner.models._timm_stages import random_image


class TokenStem(nn.Module):
    """An image as tokens: patches and positions, up to the first block.

    It owns everything of the ViT but the blocks. The last norm and the classifier are never called.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit_holder = (vit,)  # in a tuple, so that the whole ViT does not become a child
        for name, child in vit.named_children():
            if name != "blocks":
                self.add_module(name, child)
        for name, parameter in vit.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        vit = self.vit_holder[0]
        tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        return tokens


class TokenDecoderStage(nn.Module):
    """DPT's decoder, which takes maps of patches and, apart from them, the class tokens."""

    def __init__(
        self, decoder: nn.Module, taps: tuple[str, ...], class_tokens: int, grid: tuple[int, int]
    ) -> None:
        """Make the stage.

        Args:
            decoder: smp's decoder.
            taps: The names of the tokens that it takes, the shallowest first.
            class_tokens: How many tokens stand before those of the patches.
            grid: How many patches an image has in height and in width.
        """
        super().__init__()
        self.decoder, self.taps = decoder, taps
        self.class_tokens, self.grid = class_tokens, grid

    def extra_repr(self) -> str:
        return f"{self.taps}, class_tokens={self.class_tokens}, grid={self.grid}"

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        maps, classes = [], []
        for tokens in (x[name] for name in self.taps):
            patches = tokens[:, self.class_tokens :].reshape(len(tokens), *self.grid, -1)
            maps.append(patches.permute(0, 3, 1, 2).contiguous())
            classes.append(tokens[:, : self.class_tokens] if self.class_tokens else None)
        features: Tensor = self.decoder(maps, classes)
        return features


def vit_stages(model: Any, side: int) -> dict[str, nn.Module]:
    """The stages of smp's DPT for images of `side` x `side` pixels: stem, blocks, decoder, head.

    Raises:
        UncutModel: The encoder is no plain ViT, or the decoder does not fit its patches.
    """
    encoder, vit = model.encoder, model.encoder.model
    if not isinstance(vit, import_timm().models.VisionTransformer):
        raise UncutModel(f"its encoder is a {type(vit).__name__} and no VisionTransformer of timm")
    taps = tuple(f"tokens{index}" for index in encoder._output_indices)
    stages: dict[str, nn.Module] = {"stem": FeatureMapStage(TokenStem(vit), "", "tokens")}
    input_name = "tokens"
    for i, block in enumerate(vit.blocks):
        output_name = f"tokens{i}"
        stages[f"blocks{i}"] = FeatureMapStage(
            block, input_name, output_name, keeps_input=input_name in taps
        )
        input_name = output_name
    grid = tuple(vit.patch_embed.grid_size)
    stages["decoder"] = TokenDecoderStage(model.decoder, taps, vit.num_prefix_tokens, grid)
    stages["head"] = nn.Sequential(model.segmentation_head)
    try:
        with torch.no_grad():
            compare_stages(model, stages, random_image(model, side))
    except TRACE_ERRORS:
        patch = vit.patch_embed.patch_size[0]
        raise UncutModel(f"its decoder does not fit {side} pixels in patches of {patch}") from None
    return stages
