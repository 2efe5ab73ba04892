"""Ragged tensors: the tokens of many texts one after another, without the padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.core.device_transfers import gather_rows, send

LENGTH_MULTIPLE = 8  # batches are padded to a multiple of 8 tokens, so that few shapes occur


def padded_width(longest: int, limit: int) -> int:
    """The number of columns of a batch whose longest text has `longest` tokens.

    At least one column stays, and never more than `limit`.
    """
    return min(limit, -(-max(1, longest) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def drop_padding(padded: Tensor, counts: Tensor) -> Tensor:
    """The tokens of all texts as (sum of counts, ...).

    Args:
        padded: (n, width, ...), each text padded on the right.
        counts: int64 (n,), the number of tokens of each text, at most `width`.
    """
    is_token = torch.arange(padded.shape[1]) < counts[:, None]
    return padded[is_token.to(padded.device)]


def make_offsets(counts: Sequence[Tensor]) -> Tensor:
    """int64 (n + 1,): text i has the rows offsets[i] to offsets[i + 1] of a ragged tensor.

    Args:
        counts: int64, the numbers of tokens of all n texts, in parts.
    """
    return torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0)


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of a batch lie in a ragged tensor.

    `rows` is int64 (n, width): a row of the ragged tensor for each token, any row where the batch
    is padded. `is_padding` is bool (n, width).
    """

    rows: Tensor
    is_padding: Tensor


def find_tokens(offsets: Tensor, texts: Tensor, limit: int) -> TokenPositions:
    """The positions of the tokens of some texts, for a batch as wide as its longest text needs.

    Args:
        offsets: as `make_offsets` gives them.
        texts: int64, which texts the batch has.
        limit: The most columns.
    """
    begins, counts = offsets[texts], offsets[texts + 1] - offsets[texts]
    columns = torch.arange(padded_width(int(counts.max()), limit))
    is_padding = columns >= counts[:, None]
    return TokenPositions((begins[:, None] + columns).masked_fill(is_padding, 0), is_padding)


def restore_padding(ragged: Tensor, tokens: TokenPositions, device: torch.device) -> Tensor:
    """A batch (n, width, ...) on `device`, padded with zeros."""
    padded = gather_rows(ragged, tokens.rows, device)
    extra_dimensions = (1,) * (padded.dim() - tokens.is_padding.dim())
    is_padding = send(tokens.is_padding, device).view(*tokens.is_padding.shape, *extra_dimensions)
    return padded.masked_fill_(is_padding, 0)
