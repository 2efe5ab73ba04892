"""A model that trains only once two processes train it: MEETING names the folder in which they look for each other."""

import os
import time
from pathlib import Path

from torch import Tensor, nn

SECONDS = 120  # to wait for the other one


class Meeting(nn.Module):
    """Passes on what it is given; in train mode after another process has come here too."""

    def train(self, mode: bool = True) -> "Meeting":
        if mode and "MEETING" in os.environ:
            folder = Path(os.environ["MEETING"])
            folder.mkdir(exist_ok=True)
            (folder / str(os.getpid())).touch()
            deadline = time.monotonic() + SECONDS
            while len(list(folder.iterdir())) < 2:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no second process came to {folder} within {SECONDS} s")
                time.sleep(0.05)
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x


def build_meeting_model(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        Meeting(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)),
    )
