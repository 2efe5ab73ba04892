"""A detector's backbone as stages.

The first stage checks that the size of the canvas is possible. The parts of the backbone follow,
and the feature maps that the neck needs go on beside them.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tuner.core.detectors import IMAGE_NAME, DetectorStage
from tuner.errors import SpaceError

STRIDE = 32  # of the coarsest feature map; the side of a canvas is a multiple of it


class CanvasCheck(nn.Module):
    """Checks the side of the canvas and gives the pixels in the order of colours of the weights.

    The order is RGB, or BGR where the weights were trained on OpenCV's order of colours.
    """

    def __init__(self, name: str, *, min_side: int = STRIDE, bgr: bool = False) -> None:
        super().__init__()
        self._name, self.min_side, self.bgr = name, min_side, bgr  # a name changes no digest

    def forward(self, x: Tensor) -> Tensor:
        """The pixels (n, 3, side, side).

        Raises:
            SpaceError: The side cannot be halved five times, or it is smaller than `min_side`.
        """
        side = x.shape[-1]
        if side % STRIDE or side < self.min_side:
            nearest = max(self.min_side, round(side / STRIDE) * STRIDE)
            raise SpaceError(
                f"data.size: {side}, but {self._name} takes multiples of {STRIDE} from "
                f"{self.min_side} on; nearest: {nearest}"
            )
        return x.flip(1) if self.bgr else x


class BackboneStage(DetectorStage):
    """One part of the backbone: it reads one tensor and writes another.

    The tensors `passed_names` go on beside its output, for the neck.
    """

    def __init__(
        self,
        body: nn.Module,
        input_name: str,
        output_name: str,
        passed_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.body, self.input_name, self.output_name = body, input_name, output_name
        self.passed_names = tuple(passed_names)

    def extra_repr(self) -> str:
        """The names: cached activations are kept by the stage's digest, and this is part of it."""
        return f"{self.input_name} -> {self.output_name}, passes {self.passed_names}"

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        passed = {name: x[name] for name in self.passed_names}
        return passed | {self.output_name: self.body(x[self.input_name])}


def backbone_stages(parts: Mapping[str, nn.Module], taps: Sequence[str]) -> dict[str, nn.Module]:
    """One stage for each part of a backbone.

    Args:
        parts: The parts by name, in the order of the forward pass.
        taps: The parts whose outputs are passed on as far as the neck.
    """
    stages: dict[str, nn.Module] = {}
    input_name = IMAGE_NAME
    for name, body in parts.items():
        passed_names = [tap for tap in taps if tap in stages]
        stages[name] = BackboneStage(body, input_name, name, passed_names)
        input_name = name
    return stages
