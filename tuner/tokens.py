"""Texts as token ids, by the tokenizer that a model came with (extra `text`)."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tuner.errors import SpaceError
from tuner.wanted import Tokens


def encode(wanted: Tokens, texts: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Each leaf int64 (n, wanted.length), cut and padded; with `second`, pairs of texts."""
    found = tokenizer(wanted.folder)(
        list(texts), list(second) if second else None, padding="max_length", truncation=True, max_length=wanted.length, return_tensors="pt"
    )
    return {name: found[name].to(torch.int64) for name in wanted.leaves}


@functools.lru_cache(maxsize=4)
def tokenizer(folder: str) -> Any:
    """The tokenizer in a folder, never run from code that lies there. Raises SpaceError where transformers is not installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise SpaceError("model.name: models of texts need the package transformers: pip install 'tuner-finetune[text]'") from None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
