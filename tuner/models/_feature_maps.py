"""Stages that pass feature maps on under names.

By the names, heads and decoders find the feature maps that they were built for.
"""

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree

# Tensors (n, height) and (n, width), whose lengths tell the size of the image: one byte for each
# row and each column.
HEIGHT_NAME, WIDTH_NAME = "height", "width"


class FeatureMapStage(nn.Module):
    """A body that reads one named tensor and writes another."""

    def __init__(
        self,
        body: nn.Module,
        input_name: str,
        output_name: str,
        *,
        keeps_input: bool = False,
        writes_size: bool = False,
    ) -> None:
        """Make the stage.

        Args:
            body: What computes the output from the input.
            input_name: The tensor that is read. The first stage reads the image instead.
            output_name: The tensor that is written.
            keeps_input: The input is passed on too, because a later stage needs it.
            writes_size: The stage is the first, and writes how large the image is.
        """
        super().__init__()
        self.body, self.input_name, self.output_name = body, input_name, output_name
        self.keeps_input, self.writes_size = keeps_input, writes_size

    def extra_repr(self) -> str:
        """The names: cached activations are kept by the stage's digest, and this is part of it."""
        return (
            f"{self.input_name} -> {self.output_name}, "
            f"keeps_input={self.keeps_input}, writes_size={self.writes_size}"
        )

    def forward(self, x: TensorTree) -> dict[str, Tensor]:
        if isinstance(x, Tensor):
            n, _, height, width = x.shape
            size = {
                name: x.new_zeros((n, side), dtype=torch.uint8)
                for name, side in ((HEIGHT_NAME, height), (WIDTH_NAME, width))
                if self.writes_size
            }
            return size | {self.output_name: self.body(x)}
        passed = {
            name: tensor
            for name, tensor in x.items()
            if name != self.input_name or self.keeps_input
        }
        return passed | {self.output_name: self.body(x[self.input_name])}
