"""Which token of a text stands for which of its words.

A word is a span of characters, and its first token has the word's tag; its other tokens have none
(Devlin et al., BERT, NAACL 2019, section 5.3).
"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

WordRule = Literal["punctuation", "spaces"]
Span = tuple[int, int]  # the first character, and the one behind the last
# Chinese and Japanese are written without spaces: each character is a word, as in BERT's tokenizers
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_PATTERNS = {
    "punctuation": re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]"),
    "spaces": re.compile(r"\S+"),
}


def find_words(text: str, rule: WordRule) -> list[Span]:
    """The words of a text.

    Args:
        text: The text.
        rule: `punctuation`: a run of letters and digits is a word, and each other character that is
            no space; `spaces`: what is between spaces is a word.
    """
    return [match.span() for match in _PATTERNS[rule].finditer(text)]


def align_words(
    words: Sequence[Span], token_starts: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The words that have a token of their own, and the position of each one's first token.

    A word has none where the text is truncated before it, or where a token that begins in an
    earlier word holds it too.

    Args:
        words: The words of a text, from left to right.
        token_starts: int32 (length,), where each token begins in the text; -1 for others.

    Returns:
        The numbers of the words and the positions, int64 (words with a token,) each, rising.
    """
    if not words:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    begins, ends = np.array(words, np.int64).T
    positions = np.flatnonzero(token_starts >= 0)
    starts = token_starts[positions]
    word_of = np.searchsorted(begins, starts, side="right") - 1
    inside = (word_of >= 0) & (starts < ends[word_of])
    numbers, first = np.unique(word_of[inside], return_index=True)
    return numbers, positions[inside][first]
