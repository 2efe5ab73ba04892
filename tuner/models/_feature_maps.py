"""Stages that hand feature maps on under names, so that heads and decoders find those that they were built for."""

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree

HEIGHT_NAME, WIDTH_NAME = (
    "height",
    "width",
)  # leaves whose lengths are the input's, (n, height) and (n, width): a byte a row and a column


class FeatureMapStage(nn.Module):
    """A body that reads one leaf and writes another. What it read goes on only where a later stage needs it: `keeps`.

    The first stage reads the image; `sizes`: it writes down how large that was.
    """

    def __init__(
        self, body: nn.Module, reads: str, writes: str, *, keeps: bool = False, sizes: bool = False
    ) -> None:
        super().__init__()
        self.body, self.input_name, self.output_name, self.keeps_input, self.writes_size = (
            body,
            reads,
            writes,
            keeps,
            sizes,
        )

    def forward(self, x: TensorTree) -> dict[str, Tensor]:
        if isinstance(x, Tensor):
            n, _, height, width = x.shape
            given = {
                name: x.new_zeros((n, side), dtype=torch.uint8)
                for name, side in ((HEIGHT_NAME, height), (WIDTH_NAME, width))
                if self.writes_size
            }
            return given | {self.output_name: self.body(x)}
        passed = {
            name: leaf for name, leaf in x.items() if name != self.input_name or self.keeps_input
        }
        return passed | {self.output_name: self.body(x[self.input_name])}
