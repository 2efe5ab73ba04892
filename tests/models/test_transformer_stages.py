"""Encoders and decoders of many families are cut at every block: the laws, on small random members."""

import itertools
from typing import Any

import pytest
import torch

from tests.helpers.benchmark_modules import load_benchmark
from tests.helpers.split_laws import check_partition, check_split
from tuner.core.module_digests import module_digest
from tuner.core.types import StagedModel
from tuner.models import _transformer_stages
from tuner.models._transformer_stages import stage_transformer

transformers = pytest.importorskip("transformers")
SURVEY = load_benchmark("stages")
DEFAULT = (
    "deberta-v2",
    "modernbert",
    "albert",
    "electra",
    "mpnet",
    "llama",
    "qwen2",
    "gemma3_text",
)
MEMBERS = [
    pytest.param(kind, task, marks=() if kind in DEFAULT else pytest.mark.slow)
    for kind, task in SURVEY.text_members()
]


def padded_texts() -> dict[str, torch.Tensor]:
    """Three texts of 9, 5 and 1 tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [1]])).long()
    ids = torch.randint(5, 60, (3, 9), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def built(kind: str, task: str) -> StagedModel:
    staged: StagedModel = SURVEY.build_text_model(kind, task)
    generator = torch.Generator().manual_seed(0)
    for value in staged.model.parameters():
        value.data.normal_(0, 0.3, generator=generator)
    return staged


@pytest.mark.parametrize(("kind", "task"), MEMBERS)
def test_every_family_is_cut_at_its_blocks(kind: str, task: str) -> None:
    staged = built(kind, task)
    assert staged.uncut_reason is None
    names = [f"{'group' if kind == 'albert' else 'block'}{i}" for i in range(3)]
    assert list(staged.stages) == ["embeddings", *names, "head"]
    check_partition(staged)
    check_split(staged, padded_texts())


@pytest.mark.parametrize(
    "kind",
    [
        "bert",
        "distilbert",
        "roberta",
        "deberta-v2",
        "modernbert",
        "albert",
        "electra",
        "mpnet",
        "gpt2",
        "llama",
    ],
)
def test_with_a_tag_for_each_token_the_cut_is_the_same(kind: str) -> None:
    staged = built(kind, "token_classification")
    assert staged.uncut_reason is None and staged.can_probe and staged.max_depth == 4
    check_partition(staged)
    check_split(staged, padded_texts())


@pytest.mark.parametrize("kind", ["deberta-v2", "modernbert", "llama"])
def test_while_training_the_stages_drop_what_the_model_drops(kind: str) -> None:
    staged = built(kind, "text_classification")
    staged.model.train()
    outputs: list[Any] = []
    for function in (staged.reference_output, staged.split(0)[1].train()):
        torch.manual_seed(0)
        outputs.append(function(padded_texts()))
    assert torch.equal(*outputs)


def test_tied_weights_belong_to_the_embeddings() -> None:
    staged = built("llama", "text_generation")
    model: Any = staged.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(value is model.lm_head.weight for value in staged.stages["head"].parameters())
    staged.split(1)
    assert not model.lm_head.weight.requires_grad


def test_a_sliding_window_is_seen_although_the_texts_compared_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stages with full attention in the place of a sliding one are not believed."""
    staged = built("mistral", "text_generation")
    assert staged.model.config.sliding_window == 8  # as it was before the comparison
    full = ["full_attention"] * 3
    monkeypatch.setattr(_transformer_stages, "_layer_types", lambda *_: full)
    whole = built("mistral", "text_generation")
    assert list(whole.stages) == ["model"]
    assert whole.uncut_reason == "its units in a row do not compute what it computes"


@pytest.mark.parametrize(("window", "is_equal"), [(8, True), (2, False)])
def test_the_digest_of_a_block_knows_its_window(window: int, is_equal: bool) -> None:
    """Mistral's layers do not keep the window, and the weights are the same."""
    digests = []
    for width in (8, window):
        config = transformers.AutoConfig.for_model(
            "mistral",
            vocab_size=60,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=width,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        staged = stage_transformer(model, "text_classification", ())
        digests.append(module_digest(staged.stages["block0"], ignore_dropout=True))
    assert (digests[0] == digests[1]) is is_equal


def test_an_unknown_shape_stays_whole_and_says_so() -> None:
    config = transformers.AutoConfig.for_model(
        "funnel", vocab_size=60, d_model=16, n_head=2, d_head=8, d_inner=32, block_sizes=[1, 1]
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    staged = stage_transformer(model, "text_classification", ())
    assert list(staged.stages) == ["model"] and staged.max_depth == 0
    assert staged.uncut_reason
    assert staged.notes == (
        "funnel: its blocks are not known here, so nothing of it can be frozen",
    )


def test_a_narrow_and_a_wide_window_differ_on_a_long_text() -> None:
    """The window works in the stages: another one gives another output."""
    outputs = []
    for width in (2, 8):
        staged = built("mistral", "text_classification")
        staged.model.config.sliding_window = width
        with torch.no_grad():
            staged.model.eval()
            outputs.append(staged.split(0)[1].eval()(padded_texts()))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
