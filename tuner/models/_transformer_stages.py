"""Cuts transformers' models of texts: embeddings, each block, and the head.

Two shapes are known: encoders (embeddings, blocks, pooling, head) and decoders (token embeddings,
blocks, norm, head). For token classification nothing is pooled: the head sees every token. Both are
recognised by the model's modules, put together, run on a short text, and compared with the model.
Only then they are believed; any other model stays whole.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.core.types import StagedModel
from tuner.models._cutter import compare_stages
from tuner.models._forward_pass import TRACE_ERRORS, UncutModel
from tuner.models._transformer_blocks import (
    AlbertGroup,
    AllTokens,
    DebertaBlock,
    EmbeddingStage,
    FirstToken,
    LastToken,
    MeanToken,
    MpnetBlock,
    SingleTokenInput,
    TokenEmbeddingStage,
    TokenHead,
    TransformerBlock,
    VocabularyHead,
    WholeModel,
    select_last_token,
)

CARRIED_NAMES = ("attention_mask", "input_ids")
# names that the library has for the same part, in the order in which they are looked for
TOKEN_EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
EMBEDDING_DROPOUTS = ("embed_dropout", "emb_dropout", "drop")
LAYERS = ("layers", "h")
NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f")
OUTPUT_LAYERS = ("lm_head", "embed_out")
BLOCK_INPUTS = (
    "encoder.rel_embeddings",
    "encoder.LayerNorm",
    "encoder.relative_attention_bias",
    "rotary_emb",
)
ENCODER_LAYERS = ("encoder.layer", "transformer.layer", "layers")
EXAMPLE_LENGTHS = (6, 4)  # tokens of the two texts on which the stages are compared
NARROW_WINDOW = 3  # tokens; so short texts tell a sliding attention from a full one

Stages = dict[str, nn.Module]
Forward = Callable[[nn.Module, TensorTree], TensorTree]


def stage_transformer(model: Any, task: str, notes: tuple[str, ...]) -> StagedModel:
    """The model cut at its blocks, or whole where its shape is not known.

    Args:
        model: One of transformers' models for the task.
        task: text_classification, text_generation or token_classification.
        notes: What the user is told about the weights: one line for each new module.
    """
    generating, tagging = task == "text_generation", task == "token_classification"
    is_decoder = _find(model.base_model, TOKEN_EMBEDDINGS) is not None
    takes_last = is_decoder and not generating and not tagging
    forward = _compute_last_token_logits if takes_last else _compute_logits
    try:
        if generating and not is_decoder:
            raise UncutModel("no decoder was recognised in it")
        stages = (
            _decoder_stages(model, generating, tagging)
            if is_decoder
            else _encoder_stages(model, tagging)
        )
        if not next(model.parameters()).is_meta:  # there are no numbers to compare, only sizes
            _compare(model, stages, forward)
    except (UncutModel, *TRACE_ERRORS) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = model.config.model_type
        return StagedModel(
            model,
            {"model": WholeModel(model)},
            (*notes, f"{kind}: its blocks are not known here, so nothing of it can be frozen"),
            _compute_logits,
            can_probe=False,
            uncut_reason=reason,
        )
    can_probe = not generating
    return StagedModel(model, stages, notes, forward, can_probe=can_probe, head_is_new=bool(notes))


def _compute_logits(model: Any, x: TensorTree) -> TensorTree:
    assert isinstance(x, dict)
    logits: Tensor = model(**x).logits
    return logits


def _compute_last_token_logits(model: Any, x: TensorTree) -> TensorTree:
    """The logits of a decoder's last token.

    transformers scores every token and then takes the last token's scores; this scores only the
    last token.
    """
    assert isinstance(x, dict)
    hidden = model.base_model(**x).last_hidden_state
    logits: Tensor = model.score(select_last_token(hidden, x["attention_mask"]))
    return logits


def _compare(model: Any, stages: Stages, forward: Forward) -> None:
    """Raises UncutModel where the stages do not compute what the model computes for two texts."""
    device = next(model.parameters()).device
    longest = max(EXAMPLE_LENGTHS)
    ids = torch.arange(5, 5 + 2 * longest, device=device).view(2, longest)
    lengths = torch.tensor(EXAMPLE_LENGTHS, device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    ids = ids % model.config.vocab_size
    example = {"input_ids": ids, "attention_mask": mask}
    with _narrow_window(model.config):
        compare_stages(model, stages, example, forward)


@contextlib.contextmanager
def _narrow_window(config: Any) -> Iterator[None]:
    """A sliding window of a few tokens inside the block, where the model has one."""
    names = [n for n in ("sliding_window", "local_attention") if getattr(config, n, None)]
    widths = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, NARROW_WINDOW)
        yield
    finally:
        for name, width in widths.items():
            setattr(config, name, width)


def _find(module: Any, names: tuple[str, ...]) -> Any:
    """The first of the attributes that a module has; a name may be a path. None: it has none."""
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


def _layer_types(config: Any, count: int) -> list[str]:
    """The kind of attention of each block: full, or sliding over its neighbours."""
    types = getattr(config, "layer_types", None)
    if types:
        return list(types)
    has_window = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if has_window else "full_attention"] * count


# -- encoders


def _token_head(model: Any) -> nn.Module:
    """From the vector of each token to its logits, as the model's own class does it."""
    parts = (
        getattr(model, "head", None),  # ModernBERT's
        _find(model, ("dropout", "drop")),
        _find(model, ("classifier", "score")),
    )
    return TokenHead(nn.Sequential(*(part for part in parts if part is not None)))


def _encoder_stages(model: Any, tagging: bool) -> Stages:
    """The stages of BERT and of models like it.

    The last block ends with the vector of the first token, or with the mean of all where the model
    pools so: the head uses only this. With `tagging` it ends with all tokens.
    """
    trunk, config = model.base_model, model.config
    blocks = _encoder_blocks(trunk, config)
    if not blocks:
        raise UncutModel("no blocks were recognised in it")
    names = list(blocks)
    ending = AllTokens(_find(trunk, ("final_norm",))) if tagging else _pooling(trunk, config)
    blocks[names[-1]] = nn.Sequential(blocks[names[-1]], ending)
    inputs = [
        module
        for path in (
            "encoder.rel_embeddings",
            "encoder.LayerNorm",
            "encoder.relative_attention_bias",
        )
        if (module := _find(trunk, (path,))) is not None
    ]
    if (rotary := getattr(trunk, "rotary_emb", None)) is not None:
        inputs.append(rotary)
    embeddings = EmbeddingStage(
        trunk.embeddings,
        getattr(trunk, "embeddings_project", None),
        nn.ModuleList(inputs) if inputs else None,
    )
    head = _token_head(model) if tagging else _encoder_head(model, trunk)
    return {"embeddings": embeddings, **blocks, "head": head}


def _encoder_blocks(trunk: Any, config: Any) -> Stages:
    encoder: Any = getattr(trunk, "encoder", None)
    groups = getattr(encoder, "albert_layer_groups", None)
    if groups is not None:
        return _albert_groups(encoder, groups, config)
    layers = list(_find(trunk, ENCODER_LAYERS) or [])
    types = _layer_types(config, len(layers))
    rotary = getattr(trunk, "rotary_emb", None)
    blocks: Stages = {}
    for i, (layer, layer_type) in enumerate(zip(layers, types, strict=True)):
        if hasattr(encoder, "get_rel_embedding"):
            conv = encoder.conv if i == 0 else None
            blocks[f"block{i}"] = DebertaBlock(encoder, layer, conv)
        elif hasattr(encoder, "compute_position_bias"):
            blocks[f"block{i}"] = MpnetBlock(config, encoder, layer)
        else:
            blocks[f"block{i}"] = TransformerBlock(
                config, layer, causal=False, layer_type=layer_type, rotary=rotary
            )
    return blocks


def _albert_groups(encoder: Any, groups: Any, config: Any) -> Stages:
    """One stage for each group of blocks that share their weights."""
    count = len(groups)
    group_of = [
        int(i / (config.num_hidden_layers / count)) for i in range(config.num_hidden_layers)
    ]
    return {
        f"group{i}": AlbertGroup(
            config,
            group,
            encoder.embedding_hidden_mapping_in if i == 0 else None,
            group_of.count(i),
        )
        for i, group in enumerate(groups)
    }


def _pooling(trunk: Any, config: Any) -> nn.Module:
    norm = _find(trunk, ("final_norm",))
    if getattr(config, "classifier_pooling", "cls") == "mean" and norm is not None:
        return MeanToken(norm)
    return FirstToken(norm)


def _encoder_head(model: Any, trunk: Any) -> nn.Module:
    """From the pooled vector to the logits, as the model's own class does it."""
    dropout = _find(model, ("dropout", "drop"))
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return nn.Sequential(model.pre_classifier, nn.ReLU(), dropout, model.classifier)
    if hasattr(trunk, "pooler_activation"):  # ALBERT
        return nn.Sequential(trunk.pooler, trunk.pooler_activation, dropout, model.classifier)
    if hasattr(model, "pooler"):  # DeBERTa
        return nn.Sequential(SingleTokenInput(model.pooler), dropout, model.classifier)
    if hasattr(model, "head"):  # ModernBERT
        return nn.Sequential(model.head, dropout, model.classifier)
    if getattr(trunk, "pooler", None) is not None:  # BERT
        return nn.Sequential(SingleTokenInput(trunk.pooler), dropout, model.classifier)
    return SingleTokenInput(model.classifier)  # RoBERTa, ELECTRA, MPNet


# -- decoders


def _decoder_stages(model: Any, generating: bool, tagging: bool) -> Stages:
    """The stages of GPT-2, Llama and models like them.

    For classification the last block ends with the vector of the last token, with `tagging` with
    those of all tokens. For text generation the head is the last norm, and the token embeddings
    used once more where they are tied.
    """
    trunk, config = model.base_model, model.config
    layers, norm = list(_find(trunk, LAYERS) or []), _find(trunk, NORMS)
    if not layers or norm is None:
        raise UncutModel("no blocks with a norm behind them were recognised in it")
    rotary = getattr(trunk, "rotary_emb", None)
    stages: Stages = {
        "embeddings": TokenEmbeddingStage(
            _find(trunk, TOKEN_EMBEDDINGS),
            getattr(trunk, "wpe", None),
            _find(trunk, EMBEDDING_DROPOUTS),
            rotary,
            CARRIED_NAMES if generating else CARRIED_NAMES[:1],
        )
    }
    for i, layer_type in enumerate(_layer_types(config, len(layers))):
        block = TransformerBlock(
            config, layers[i], causal=True, layer_type=layer_type, rotary=rotary
        )
        ending = AllTokens(norm) if tagging else LastToken(norm)
        is_last = not generating and i + 1 == len(layers)
        stages[f"block{i}"] = nn.Sequential(block, ending) if is_last else block
    if tagging:
        return {**stages, "head": _token_head(model)}
    if not generating:
        return {**stages, "head": nn.Sequential(model.score)}
    cap = getattr(config, "final_logit_softcapping", None)
    head = VocabularyHead(norm, _find(model, OUTPUT_LAYERS), config.tie_word_embeddings, cap)
    return {**stages, "head": head}
