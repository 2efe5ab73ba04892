"""A detector's backbone as stages: a canvas that fits, parts in a row, and the maps that its neck taps."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tuner.core.detectors import IMAGE_NAME, DetectorStage
from tuner.errors import SpaceError

STRIDE = 32  # of the coarsest map: canvases are multiples of it


class CheckedCanvas(nn.Module):
    """The pixels as the network takes them: RGB, or BGR where its weights were trained on OpenCV's order of colours."""

    def __init__(self, name: str, *, least: int = STRIDE, bgr: bool = False) -> None:
        super().__init__()
        self.name, self.minimum, self.bgr = name, least, bgr

    def forward(self, x: Tensor) -> Tensor:
        """Raises SpaceError where halving the canvas five times leaves a remainder, and where it is smaller than `least`."""
        side = x.shape[-1]
        if side % STRIDE or side < self.minimum:
            fits = max(self.minimum, round(side / STRIDE) * STRIDE)
            raise SpaceError(
                f"data.size: {side}, but {self.name} takes multiples of {STRIDE} from {self.minimum} on; nearest: {fits}"
            )
        return x.flip(1) if self.bgr else x


class BackboneStage(DetectorStage):
    """One part of the backbone, from leaf `source` to leaf `name`; the leaves of `keep` go on beside it, for the neck."""

    def __init__(self, body: nn.Module, source: str, name: str, keep: Sequence[str] = ()) -> None:
        super().__init__()
        self.body, self.source, self.name, self.kept_names = body, source, name, tuple(keep)

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x[name] for name in self.kept_names} | {self.name: self.body(x[self.source])}


def backbone_stages(parts: Mapping[str, nn.Module], taps: Sequence[str]) -> dict[str, nn.Module]:
    """A backbone's parts in a row; what those of `taps` give reaches the neck."""
    found: dict[str, nn.Module] = {}
    source = IMAGE_NAME
    for name, body in parts.items():
        found[name] = BackboneStage(body, source, name, [tap for tap in taps if tap in found])
        source = name
    return found
