"""Texts in the activation cache: nothing is computed or kept for padding, and the suffix cannot tell."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.frozen_prefixes import make_frozen_prefix
from tests.helpers.token_sources import WIDTH, MixTokens, Pool, TokenSource, make_token_stages
from tuner.core.types import Batch
from tuner.files.cache_entries import disk_usage, list_entries
from tuner.training.activation_cache import CachedSource, CacheLimits, source_behind
from tuner.training.cache_costs import measure_costs
from tuner.training.epoch import MAX_EVAL_BATCH
from tuner.training.frozen_prefix import UncachedSource
from tuner.training.preparation import MemorySource

COUNTS = [3, 16, 9, 1, 12, 5, 20, 2, 7, 4]
TOKEN_BYTES = 4 * WIDTH + 8  # its vector and its place in the attention mask


def cached(home: Path, stages: nn.Module, source: TokenSource) -> CachedSource:
    behind = source_behind(make_frozen_prefix(stages), source, CacheLimits(home, mode="always"))
    assert isinstance(behind, CachedSource)
    return behind


def check_equal(got: Batch, expected: Batch) -> None:
    """Equal shapes, and equal values but in padding, which the mask hides."""
    assert isinstance(got.x, dict) and isinstance(expected.x, dict)
    assert {k: v.shape for k, v in got.x.items()} == {k: v.shape for k, v in expected.x.items()}
    mask = expected.x["attention_mask"].bool()
    assert torch.equal(got.x["attention_mask"], expected.x["attention_mask"])
    assert torch.allclose(got.x["hidden"][mask], expected.x["hidden"][mask], atol=1e-6)
    assert not got.x["hidden"][~mask].any()
    assert torch.allclose(got.x["summary"], expected.x["summary"], atol=1e-6)
    assert torch.equal(got.y, expected.y)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [20, 64, 512])
def test_what_is_read_is_what_would_be_computed(length: int, tmp_path: Path) -> None:
    source, stages = TokenSource(COUNTS, length), make_token_stages(2)
    from_cache = cached(tmp_path, stages, source)
    uncached = UncachedSource(make_frozen_prefix(stages), source)
    for texts in ([6], [3], [0, 3, 7], [6, 0, 1], list(range(10)), [9, 9, 2]):
        index = torch.tensor(texts)
        check_equal(from_cache.take(index, 0), uncached.take(index, 0))


def test_batches_of_several_widths_are_in_memory_together() -> None:
    """As in a plan, or where hidden layers of a head are trained: more texts than one batch."""
    source = TokenSource([3] * MAX_EVAL_BATCH + [20, 5], 64)
    uncached = UncachedSource(make_frozen_prefix(make_token_stages(2)), source)
    index = torch.tensor([1, MAX_EVAL_BATCH, MAX_EVAL_BATCH + 1])
    got, expected = MemorySource.of(uncached).take(index, 0).x, uncached.take(index, 0).x
    assert isinstance(got, dict) and isinstance(expected, dict)
    mask = expected["attention_mask"].bool()
    assert torch.equal(got["attention_mask"], expected["attention_mask"])
    assert torch.allclose(got["hidden"][mask], expected["hidden"][mask], atol=1e-6)


def test_padding_is_neither_computed_nor_kept(tmp_path: Path) -> None:
    """At 512 tokens these texts are padding to 98 %."""
    source, stages = TokenSource(COUNTS * 20, 512), make_token_stages(2)
    tokens = sum(COUNTS) * 20
    first = stages[0]
    assert isinstance(first, MixTokens)
    UncachedSource(make_frozen_prefix(stages), source).take(torch.tensor([0, 3, 7]), 0)
    assert first.cells == 3 * 8
    first.cells = 0
    cached(tmp_path, stages, source).take(torch.tensor([0]), 0)
    assert tokens <= first.cells < 2.1 * tokens  # each is rounded up to 8 tokens
    (entry,) = list_entries(tmp_path / "activations")
    per_text = (disk_usage(entry) - tokens * TOKEN_BYTES) / len(source)
    assert 0 < per_text < 4 * WIDTH + 40  # the summary, the label and the text's place


def test_filling_begins_at_a_shallower_entry_and_may_end_without_a_length(tmp_path: Path) -> None:
    source, stages = TokenSource(COUNTS, 64), make_token_stages(2)
    cached(tmp_path, stages[:1], source).take(torch.tensor([0]), 0)
    source.take_count = 0
    index = torch.tensor([6, 0, 3])
    expected = UncachedSource(make_frozen_prefix(stages), TokenSource(COUNTS, 64)).take(index, 0)
    check_equal(cached(tmp_path, stages, source).take(index, 0), expected)
    pooled = cached(tmp_path, nn.Sequential(*stages, Pool()), source).take(index, 0)
    assert isinstance(pooled.x, torch.Tensor) and isinstance(expected.x, dict)
    assert torch.allclose(pooled.x, expected.x["summary"], atol=1e-6)
    assert torch.equal(pooled.y, expected.y)  # type: ignore[arg-type]
    assert source.take_count == 0


def test_costs_are_those_of_usual_texts_and_not_of_the_first(tmp_path: Path) -> None:
    counts = [2] * 40 + [30] * 400
    source = TokenSource(counts, 512)
    cost = measure_costs(UncachedSource(make_frozen_prefix(make_token_stages(1)), source), tmp_path)
    usual = sum(counts) / len(counts) * TOKEN_BYTES + 4 * WIDTH
    assert 0.8 * usual < cost["bytes"] < 1.2 * usual


def test_other_texts_of_the_same_form_have_costs_of_their_own(tmp_path: Path) -> None:
    frozen = make_frozen_prefix(make_token_stages(1))
    for counts in ([3] * 40, [200] * 40, [4] * 40):
        measure_costs(UncachedSource(frozen, TokenSource(counts, 512)), tmp_path)
    notes = [json.loads(note.read_text())["bytes"] for note in tmp_path.glob("*.cost.json")]
    assert len(notes) == 2 and max(notes) > 20 * min(notes)  # 3 and 4 tokens are alike
