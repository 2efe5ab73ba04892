"""A transformer's own modules as stages: the embeddings, each block, and the head.

The stages pass on `hidden`, float (n, length, width), and its `attention_mask`, int64 (n, length).
The mask inside a block follows from the attention mask, and a position from the index of its token.
So each stage computes both itself, as the model does. A model that predicts tokens also passes its
`input_ids` on, because its predictions are compared with them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.core.types import StagedModel

CARRIED_NAMES = ("attention_mask", "input_ids")
ENCODER_ATTRIBUTES = {
    "bert": "bert",
    "distilbert": "distilbert",
    "roberta": "roberta",
    "camembert": "roberta",
    "xlm-roberta": "roberta",
}
"""model_type -> the model's child that holds embeddings and blocks."""


def stage_transformer(model: Any, task: str, notes: tuple[str, ...]) -> StagedModel:
    """The model cut at its blocks.

    A model whose architecture is not known here becomes one stage, and a note says so.

    Args:
        model: One of transformers' models for the task.
        task: text_classification or text_generation.
        notes: What the user is told about the weights: one line for each new module.
    """
    kind = model.config.model_type
    generating = task == "text_generation"
    if kind in ENCODER_ATTRIBUTES and not generating:
        stages = _encoder_stages(model, getattr(model, ENCODER_ATTRIBUTES[kind]))
        return StagedModel(model, stages, notes, _compute_logits, head_is_new=bool(notes))
    if kind == "gpt2":
        return StagedModel(
            model,
            _decoder_stages(model, generating),
            notes,
            _compute_logits if generating else _compute_last_token_logits,
            can_probe=not generating,
            head_is_new=bool(notes),
        )
    return StagedModel(
        model,
        {"model": WholeModel(model)},
        (*notes, f"{kind}: its blocks are not known here, so nothing of it can be frozen"),
        _compute_logits,
        can_probe=False,
    )


def _compute_logits(model: Any, x: TensorTree) -> TensorTree:
    assert isinstance(x, dict)
    logits: Tensor = model(**x).logits
    return logits


def _compute_last_token_logits(model: Any, x: TensorTree) -> TensorTree:
    """The logits of GPT2ForSequenceClassification.

    transformers scores every token and then takes the last token's scores; this scores only the
    last token.
    """
    assert isinstance(x, dict)
    hidden = model.transformer(**x).last_hidden_state
    logits: Tensor = model.score(select_last_token(hidden, x["attention_mask"]))
    return logits


def select_last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The vector of each text's last token, (n, width), where padding is on the right."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), attention_mask.sum(1) - 1]


def _encoder_stages(model: Any, trunk: Any) -> dict[str, nn.Module]:
    """The stages of BERT and of models like it.

    The last block ends with the vector of the first token, because the head uses only this one.
    """
    kind = model.config.model_type
    layers = list((trunk.transformer if kind == "distilbert" else trunk.encoder).layer)
    stages: dict[str, nn.Module] = {"embeddings": EmbeddingStage(trunk.embeddings)}
    for i, layer in enumerate(layers):
        block = TransformerBlock(model.config, layer, causal=False)
        stages[f"block{i}"] = block if i + 1 < len(layers) else nn.Sequential(block, FirstToken())
    if kind == "distilbert":
        head: nn.Module = nn.Sequential(
            model.pre_classifier, nn.ReLU(), model.dropout, model.classifier
        )
    elif kind == "bert":
        head = nn.Sequential(SingleTokenInput(trunk.pooler), model.dropout, model.classifier)
    else:
        head = SingleTokenInput(model.classifier)
    return {**stages, "head": head}


def _decoder_stages(model: Any, generating: bool) -> dict[str, nn.Module]:
    """The stages of GPT-2.

    For classification the last block ends with the vector of the last token. For text generation
    the head is the last norm, and the token embeddings used once more.
    """
    trunk, layers = model.transformer, list(model.transformer.h)
    stages: dict[str, nn.Module] = {
        "embeddings": Gpt2EmbeddingStage(
            trunk.wte, trunk.wpe, trunk.drop, CARRIED_NAMES if generating else CARRIED_NAMES[:1]
        )
    }
    for i, layer in enumerate(layers):
        block = TransformerBlock(model.config, layer, causal=True)
        ends_with_vector = not generating and i + 1 == len(layers)
        stages[f"block{i}"] = (
            nn.Sequential(block, LastToken(trunk.ln_f)) if ends_with_vector else block
        )
    if not generating:
        return {**stages, "head": nn.Sequential(model.score)}
    tied = model.config.tie_word_embeddings
    return {**stages, "head": VocabularyHead(trunk.ln_f, model.lm_head, tied)}


class EmbeddingStage(nn.Module):
    """Embeddings that are one module of the model."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: tensor for name, tensor in x.items() if name != "attention_mask"}
        return {"hidden": self.embeddings(**inputs), "attention_mask": x["attention_mask"]}


class Gpt2EmbeddingStage(nn.Module):
    """GPT-2's embeddings of tokens and of their positions."""

    def __init__(
        self, wte: nn.Module, wpe: nn.Module, drop: nn.Module, carried: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop, self.carried_names = wte, wpe, drop, carried

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = x["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        return {
            "hidden": self.drop(self.wte(ids) + self.wpe(positions)),
            **{name: x[name] for name in self.carried_names},
        }


class TransformerBlock(nn.Module):
    """One block, with the mask that transformers' own code makes from the attention mask."""

    def __init__(self, config: Any, layer: nn.Module, *, causal: bool) -> None:
        super().__init__()
        self.config, self.layer, self.causal = config, layer, causal

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = self.make_mask(x["hidden"], x["attention_mask"])
        return {**x, "hidden": self.layer(x["hidden"], attention_mask=mask)}

    def make_mask(self, hidden: Tensor, attention_mask: Tensor) -> Any:
        from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

        if hidden.is_meta:  # the values of its mask cannot be read, and nothing needs them
            return None
        if not self.causal:
            return create_bidirectional_mask(self.config, hidden, attention_mask)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        return create_causal_mask(self.config, hidden, attention_mask, None, positions)


class FirstToken(nn.Module):
    """The first token's vector."""

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return x["hidden"][:, 0]


class LastToken(nn.Module):
    """The last token's vector, normalised."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return select_last_token(self.norm(x["hidden"]), x["attention_mask"])


class SingleTokenInput(nn.Module):
    """A module that takes the first of many tokens, called with one token alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x[:, None])
        return y


class VocabularyHead(nn.Module):
    """Logits over the vocabulary, (n, length, vocabulary).

    A projection that is tied to the token embeddings shares their weights. It is used here, but it
    belongs to the first stage, and is trained and frozen with it.
    """

    def __init__(self, norm: nn.Module, projection: nn.Module, tied: bool) -> None:
        super().__init__()
        self.norm = norm
        self.used = (projection,)  # in a tuple, so that it does not become a child
        if not tied:
            self.projection = projection

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.used[0](self.norm(x["hidden"]))
        return logits


class WholeModel(nn.Module):
    """A whole model as one stage; it takes the tensors of the tree by name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**x).logits
        return logits
