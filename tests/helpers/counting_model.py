"""A model of the user's own that says when it is trained, draws random numbers of every kind, and can end processes on its way.

COUNTED names a file: a line is added when an epoch of training begins. KILL is `who:n`: when the n-th does, that one is killed by
SIGKILL: the worker, the coordinator, or both. Lines stay, so each kill happens once.
"""

import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tuner.training import checkpoints


class CountedModule(nn.Module):
    """Passes on what it is given, a little shaken while training."""

    def train(self, mode: bool = True) -> "CountedModule":
        file = os.environ.get("COUNTED")
        if mode and file:
            checkpoints.MIN_WRITE_SECONDS = float(
                os.environ.get("STAKE", "0")
            )  # these epochs are short, and each shall count
            with open(file, "a") as lines:
                lines.write(f"{os.getpid()}\n")
            self.kill(len(Path(file).read_text().splitlines()))
        super().train(mode)
        return self

    def kill(self, number: int) -> None:
        who, _, at = os.environ.get("KILL", "").partition(":")
        if not who or int(at) != number:
            return
        if who in ("coordinator", "both"):
            os.kill(os.getppid(), signal.SIGKILL)
        if who in ("worker", "both"):
            os.kill(os.getpid(), signal.SIGKILL)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return (
            x * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(())
        )


def build_counted_model(outputs: int) -> nn.Module:
    """Four stages; BatchNorm in the first and in the third, dropout before the head."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        CountedModule(),
        nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        nn.Sequential(nn.Dropout(0.3), nn.Linear(16, outputs)),
    )
