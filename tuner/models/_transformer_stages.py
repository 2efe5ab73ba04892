"""A transformer's own modules as stages: embeddings, one a block, head. What flows is `hidden` with its `attention_mask`.

Masks follow from the attention mask and positions from the place of a token, so each stage makes its own anew, as the model does.
A model that tells tokens also passes its `input_ids` on: they are what its predictions are held against.
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
    """The model cut at its blocks where its architecture is known; otherwise as one stage, and a note says so."""
    kind = model.config.model_type
    generating = task == "text_generation"
    if kind in ENCODER_ATTRIBUTES and not generating:
        return StagedModel(
            model, _encoder_stages(model, getattr(model, ENCODER_ATTRIBUTES[kind])), notes, _logits
        )
    if kind == "gpt2":
        return StagedModel(
            model,
            _decoder_stages(model, generating),
            notes,
            _logits if generating else _logits_of_last_token,
            can_probe=not generating,
        )
    return StagedModel(
        model,
        {"model": WholeModel(model)},
        (*notes, f"{kind}: its blocks are not known here, so nothing of it can be frozen"),
        _logits,
        False,
    )


def _logits(model: Any, x: TensorTree) -> TensorTree:
    assert isinstance(x, dict)
    found: Tensor = model(**x).logits
    return found


def _logits_of_last_token(model: Any, x: TensorTree) -> TensorTree:
    """What GPT2ForSequenceClassification computes, but that it scores every token and then keeps the last one's."""
    assert isinstance(x, dict)
    hidden = model.transformer(**x).last_hidden_state
    found: Tensor = model.score(last_token(hidden, x["attention_mask"]))
    return found


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(n, width): what stands at each text's last token; padding is on the right."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), attention_mask.sum(1) - 1]


def _encoder_stages(model: Any, trunk: Any) -> dict[str, nn.Module]:
    """BERT and its kin. The last block ends with the first token's vector, which is all that the head looks at."""
    kind = model.config.model_type
    layers = list((trunk.transformer if kind == "distilbert" else trunk.encoder).layer)
    found: dict[str, nn.Module] = {"embeddings": EmbeddingStage(trunk.embeddings)}
    for i, layer in enumerate(layers):
        block = TransformerBlock(model.config, layer, causal=False)
        found[f"block{i}"] = block if i + 1 < len(layers) else nn.Sequential(block, FirstToken())
    if kind == "distilbert":
        head: nn.Module = nn.Sequential(
            model.pre_classifier, nn.ReLU(), model.dropout, model.classifier
        )
    elif kind == "bert":
        head = nn.Sequential(SingleTokenInput(trunk.pooler), model.dropout, model.classifier)
    else:
        head = SingleTokenInput(model.classifier)
    return {**found, "head": head}


def _decoder_stages(model: Any, generating: bool) -> dict[str, nn.Module]:
    """GPT-2. For classes the last block ends with the last token's vector; for text the head is the norm and the embeddings again."""
    trunk, layers = model.transformer, list(model.transformer.h)
    found: dict[str, nn.Module] = {
        "embeddings": Gpt2EmbeddingStage(
            trunk.wte, trunk.wpe, trunk.drop, CARRIED_NAMES if generating else CARRIED_NAMES[:1]
        )
    }
    for i, layer in enumerate(layers):
        block = TransformerBlock(model.config, layer, causal=True)
        found[f"block{i}"] = (
            block
            if generating or i + 1 < len(layers)
            else nn.Sequential(block, LastToken(trunk.ln_f))
        )
    tied = model.config.tie_word_embeddings
    return {
        **found,
        "head": VocabularyHead(trunk.ln_f, model.lm_head, tied)
        if generating
        else nn.Sequential(model.score),
    }


class EmbeddingStage(nn.Module):
    """Embeddings that are one module of the model's."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: leaf for name, leaf in x.items() if name != "attention_mask"}
        return {"hidden": self.embeddings(**given), "attention_mask": x["attention_mask"]}


class Gpt2EmbeddingStage(nn.Module):
    """GPT-2's embeddings of tokens and of their places."""

    def __init__(
        self, wte: nn.Module, wpe: nn.Module, drop: nn.Module, carried: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop, self.carried_names = wte, wpe, drop, carried

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = x["input_ids"]
        places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        return {
            "hidden": self.drop(self.wte(ids) + self.wpe(places)),
            **{name: x[name] for name in self.carried_names},
        }


class TransformerBlock(nn.Module):
    """One block under the mask that the model's own code makes of the attention mask."""

    def __init__(self, config: Any, layer: nn.Module, *, causal: bool) -> None:
        super().__init__()
        self.config, self.layer, self.causal = config, layer, causal

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            **x,
            "hidden": self.layer(
                x["hidden"], attention_mask=self.mask(x["hidden"], x["attention_mask"])
            ),
        }

    def mask(self, hidden: Tensor, attention_mask: Tensor) -> Any:
        from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

        if hidden.is_meta:  # whose mask cannot be looked at, and need not be
            return None
        if not self.causal:
            return create_bidirectional_mask(self.config, hidden, attention_mask)
        places = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        return create_causal_mask(self.config, hidden, attention_mask, None, places)


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
        return last_token(self.norm(x["hidden"]), x["attention_mask"])


class SingleTokenInput(nn.Module):
    """A module that takes the first of many tokens, given one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x[:, None])
        return found


class VocabularyHead(nn.Module):
    """Logits over the vocabulary, (n, length, vocabulary).

    Tied to the embeddings, the projection is theirs: used here, owned, trained and frozen with the first stage.
    """

    def __init__(self, norm: nn.Module, projection: nn.Module, tied: bool) -> None:
        super().__init__()
        self.norm = norm
        self.used = (projection,)  # in a tuple, so that it is not taken for a child
        if not tied:
            self.projection = projection

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.used[0](self.norm(x["hidden"]))
        return found


class WholeModel(nn.Module):
    """A model that takes the tree by name, as one stage."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.model(**x).logits
        return found
