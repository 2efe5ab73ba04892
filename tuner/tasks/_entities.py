"""Entities in sequences of tags, and their scores by the definition of CoNLL.

An entity is right where its first word, its last word and its type are right (Tjong Kim Sang and De
Meulder, Introduction to the CoNLL-2003 Shared Task, CoNLL 2003). B-X begins an entity of type X and
I-X continues it; an I-X behind anything else begins one too, as in the task's conlleval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

OUTSIDE = "O"


@dataclass(frozen=True)
class TagSet:
    """What the tags mean.

    Args:
        types: The types of entities, in the order of their first tags.
        type_of: int64 (tags,), an index into `types`; -1 for O.
        begins: bool (tags,), whether the tag is B-….
    """

    types: tuple[str, ...]
    type_of: NDArray[np.int64]
    begins: NDArray[np.bool_]

    @staticmethod
    def of(tags: Sequence[str]) -> "TagSet":
        """Of the names of the tags: O, B-X and I-X."""
        types = tuple(dict.fromkeys(tag.partition("-")[2] for tag in tags if tag != OUTSIDE))
        type_of = [types.index(tag.partition("-")[2]) if tag != OUTSIDE else -1 for tag in tags]
        return TagSet(
            types,
            np.array(type_of, np.int64),
            np.array([tag.startswith("B-") for tag in tags], np.bool_),
        )


class Entities(NamedTuple):
    """Entities of several texts: int64 (entities,) each.

    `rows` are the texts, `firsts` and `lasts` positions of the first and last word, `types` indices
    into those of the tag set.
    """

    rows: NDArray[np.int64]
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]
    types: NDArray[np.int64]

    def as_set(self) -> set[tuple[int, int, int, int]]:
        """(row, first, last, type) of each entity."""
        return set(zip(*(column.tolist() for column in self), strict=True))


def find_entities(tags: NDArray[np.int64], counted: NDArray[np.bool_], tag_set: TagSet) -> Entities:
    """The entities in the tags of texts, in their order.

    Args:
        tags: int64 (n, length), the tag of each token.
        counted: bool (n, length), which tokens are the first of a word; others are passed over.
        tag_set: What the tags mean.
    """
    rows, positions = np.nonzero(counted)
    kinds = tag_set.type_of[tags[rows, positions]]
    begins = tag_set.begins[tags[rows, positions]]
    # a word continues an entity where the word before it has the same type, in the same text
    continues = np.zeros(len(rows), np.bool_)
    continues[1:] = (rows[1:] == rows[:-1]) & (kinds[1:] == kinds[:-1]) & ~begins[1:]
    in_entity = kinds >= 0
    first = np.flatnonzero(in_entity & ~continues)
    last = np.flatnonzero(in_entity & ~np.append(continues[1:], False))
    return Entities(rows[first], positions[first], positions[last], kinds[first])


def count_entities(
    predicted: NDArray[np.int64],
    truth: NDArray[np.int64],
    counted: NDArray[np.bool_],
    tag_set: TagSet,
) -> dict[str, Tensor]:
    """Entities of each type in each text that are `hits`, `true` and `predicted`: int64 (n, types).

    Args:
        predicted: int64 (n, length).
        truth: int64 (n, length), any tag where it is not counted.
        counted: bool (n, length).
        tag_set: What the tags mean.
    """
    found = find_entities(predicted, counted, tag_set).as_set()
    true = find_entities(truth, counted, tag_set).as_set()
    counts = {}
    for name, entities in (("hits", found & true), ("true", true), ("predicted", found)):
        matrix = torch.zeros(len(truth), len(tag_set.types), dtype=torch.int64)
        for row, _, _, kind in entities:
            matrix[row, kind] += 1
        counts[name] = matrix
    return counts


def precision_recall_f1(hits: int, true: int, predicted: int) -> tuple[float, float, float]:
    """The three scores of counted entities, 0 for 0 of 0, as conlleval has them."""
    return (
        hits / predicted if predicted else 0.0,
        hits / true if true else 0.0,
        2 * hits / (true + predicted) if true + predicted else 0.0,
    )
