"""How the targets of a regression are standardised: by their means and standard deviations."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetScale:
    """The mean and the standard deviation of each target, which is never 0."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @staticmethod
    def of(targets: Tensor) -> "TargetScale":
        """That of targets, float (n, targets); one that does not vary has the deviation 1."""
        values = targets.double()
        mean, deviation = values.mean(0), values.std(0, correction=0)
        varies = deviation > 1e-12 * mean.abs().clamp_min(1e-300)
        return TargetScale(tuple(mean.tolist()), tuple(deviation.where(varies, 1.0).tolist()))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "TargetScale":
        """What `to_dict` gave, read from JSON."""
        return TargetScale(tuple(values["mean"]), tuple(values["deviation"]))

    def to_dict(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "deviation": list(self.deviation)}

    def standardise(self, targets: Tensor) -> Tensor:
        """Targets with the mean 0 and the deviation 1: float32 (n, targets)."""
        mean, deviation = _on_device(self, targets.device)
        return (targets.float() - mean) / deviation

    def restore(self, outputs: Tensor) -> Tensor:
        """Standardised targets in the units of the data: float32 (n, targets)."""
        mean, deviation = _on_device(self, outputs.device)
        return outputs.float() * deviation + mean


@functools.lru_cache(maxsize=64)
def _on_device(scale: TargetScale, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, float32 (targets,), made once: a copy for each batch would make the CPU
    wait for the GPU.
    """
    mean, deviation = (
        torch.tensor(values, device=device) for values in (scale.mean, scale.deviation)
    )
    return mean, deviation
