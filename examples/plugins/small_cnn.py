"""A model family: a small convolutional network, cut into stages that can be frozen.

In a space file: `model: {name: 'small_cnn:build', width: [8, 16]}`. It has no pretrained weights; a
model of yours would load them in `build`, with `read_state_dict` and `load_matching_state`.
"""

from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from tuner.api import ImageInputSpec, StagedModel

HALF = (0.5, 0.5, 0.5)


def input_spec() -> ImageInputSpec:
    """tuner calls this, where the module of `build` has it. Without it: 224 x 224 as for ImageNet.

    It can take keys of `build`, such as `width`, as keyword arguments; it gets those that it names.
    """
    return ImageInputSpec(size=32, resize=32, interpolation="bilinear", mean=HALF, std=HALF)


def build(
    outputs: int,
    *,
    width: Annotated[int, Field(ge=4, le=512, description="channels of the first block")] = 16,
    blocks: Annotated[int, Field(ge=1, le=4, description="blocks; each halves the image")] = 2,
) -> StagedModel:
    """tuner calls this with the number of classes; `width` and `blocks` are keys of the space file.

    A plain nn.Module is enough, but it is one stage. An nn.Sequential is cut at its children.
    """
    model = SmallCnn(outputs, width, blocks)
    stages: dict[str, nn.Module] = {f"block{i}": b for i, b in enumerate(model.blocks, 1)}
    # The last stage is the head: it depends on the classes and is always trained. Its nn.Linear
    # begins as a linear probe of the stages before it, unless recipe.head is fresh, or can_probe
    # is False here.
    stages["head"] = model.head
    # Two laws must hold, and tests/helpers/split_laws.py checks them: the stages one after another
    # compute what the model computes, and every parameter and buffer lies in exactly one stage.
    return StagedModel(model, stages)


class SmallCnn(nn.Module):
    """Takes float32 (n, 3, h, w), gives logits (n, outputs)."""

    def __init__(self, outputs: int, width: int, blocks: int) -> None:
        super().__init__()
        channels = [3, *(width * 2**i for i in range(blocks))]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(given, made, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(made),
                nn.ReLU(),
            )
            for given, made in pairwise(channels)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits
