"""Texts as token ids of known lengths, and small stages that work on them."""

import torch
from torch import Tensor, nn

from tuner.core.types import Batch

WIDTH = 16  # of a token's vector


class TokenSource:
    """Texts of given lengths, padded to `length`; every text has other tokens."""

    views = 1

    def __init__(self, counts: list[int], length: int) -> None:
        self.lengths = torch.tensor(counts)
        self.digest = f"{counts} {length}"
        self.mask = (torch.arange(length) < self.lengths[:, None]).to(torch.int64)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 50, self.mask.shape, generator=generator) * self.mask
        self.take_count = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, index: Tensor, view: int) -> Batch:
        self.take_count += len(index)
        return Batch({"input_ids": self.ids[index], "attention_mask": self.mask[index]}, index)


class MixTokens(nn.Module):
    """Each token's vector, mixed with the mean of the text's; it counts the columns that it sees.

    `summary` has no length: it is as wide as a token's vector, which a text may be long as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self._cells = 0  # no setting of the stage, so its name does not follow it

    @property
    def cells(self) -> int:
        return self._cells

    @cells.setter
    def cells(self, count: int) -> None:
        self._cells = count

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = x["attention_mask"]
        self.cells += mask.numel()
        hidden = x["hidden"] if "hidden" in x else self.embedding(x["input_ids"])
        weight = mask[:, :, None].float()
        summary = (hidden * weight).sum(1) / weight.sum(1)
        return {"hidden": hidden + summary[:, None], "attention_mask": mask, "summary": summary}


class Pool(nn.Module):
    """The mean vector of each text, which has no length any more."""

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return x["summary"]


def make_token_stages(count: int) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(*(MixTokens() for _ in range(count))).eval()
