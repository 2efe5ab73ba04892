"""A transformer's own modules as stages: embeddings, one a block, head. What flows is `hidden` with its `attention_mask`.

Masks follow from the attention mask and positions from the place of a token, so each stage makes its own anew, as the model does.
A model that tells tokens also passes its `input_ids` on: they are what its predictions are held against.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import Tree
from tuner.core.types import Staged

CARRIED = ("attention_mask", "input_ids")
ENCODERS = {
    "bert": "bert",
    "distilbert": "distilbert",
    "roberta": "roberta",
    "camembert": "roberta",
    "xlm-roberta": "roberta",
}
"""model_type -> the model's child that holds embeddings and blocks."""


def staged_of(model: Any, task: str, notes: tuple[str, ...]) -> Staged:
    """The model cut at its blocks where its architecture is known; otherwise as one stage, and a note says so."""
    kind = model.config.model_type
    generating = task == "text_generation"
    if kind in ENCODERS and not generating:
        return Staged(model, _encoder(model, getattr(model, ENCODERS[kind])), notes, _logits)
    if kind == "gpt2":
        return Staged(
            model,
            _decoder(model, generating),
            notes,
            _logits if generating else _logits_of_last,
            probe=not generating,
        )
    return Staged(
        model,
        {"model": Whole(model)},
        (*notes, f"{kind}: its blocks are not known here, so nothing of it can be frozen"),
        _logits,
        False,
    )


def _logits(model: Any, x: Tree) -> Tree:
    assert isinstance(x, dict)
    found: Tensor = model(**x).logits
    return found


def _logits_of_last(model: Any, x: Tree) -> Tree:
    """What GPT2ForSequenceClassification computes, but that it scores every token and then keeps the last one's."""
    assert isinstance(x, dict)
    hidden = model.transformer(**x).last_hidden_state
    found: Tensor = model.score(last(hidden, x["attention_mask"]))
    return found


def last(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(n, width): what stands at each text's last token; padding is on the right."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), attention_mask.sum(1) - 1]


def _encoder(model: Any, trunk: Any) -> dict[str, nn.Module]:
    """BERT and its kin. The last block ends with the first token's vector, which is all that the head looks at."""
    kind = model.config.model_type
    layers = list((trunk.transformer if kind == "distilbert" else trunk.encoder).layer)
    found: dict[str, nn.Module] = {"embeddings": Embedded(trunk.embeddings)}
    for i, layer in enumerate(layers):
        block = Block(model.config, layer, causal=False)
        found[f"block{i}"] = block if i + 1 < len(layers) else nn.Sequential(block, First())
    if kind == "distilbert":
        head: nn.Module = nn.Sequential(
            model.pre_classifier, nn.ReLU(), model.dropout, model.classifier
        )
    elif kind == "bert":
        head = nn.Sequential(OneToken(trunk.pooler), model.dropout, model.classifier)
    else:
        head = OneToken(model.classifier)
    return {**found, "head": head}


def _decoder(model: Any, generating: bool) -> dict[str, nn.Module]:
    """GPT-2. For classes the last block ends with the last token's vector; for text the head is the norm and the embeddings again."""
    trunk, layers = model.transformer, list(model.transformer.h)
    found: dict[str, nn.Module] = {
        "embeddings": Placed(
            trunk.wte, trunk.wpe, trunk.drop, CARRIED if generating else CARRIED[:1]
        )
    }
    for i, layer in enumerate(layers):
        block = Block(model.config, layer, causal=True)
        found[f"block{i}"] = (
            block if generating or i + 1 < len(layers) else nn.Sequential(block, Last(trunk.ln_f))
        )
    tied = model.config.tie_word_embeddings
    return {
        **found,
        "head": Vocabulary(trunk.ln_f, model.lm_head, tied)
        if generating
        else nn.Sequential(model.score),
    }


class Embedded(nn.Module):
    """Embeddings that are one module of the model's."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: leaf for name, leaf in x.items() if name != "attention_mask"}
        return {"hidden": self.embeddings(**given), "attention_mask": x["attention_mask"]}


class Placed(nn.Module):
    """GPT-2's embeddings of tokens and of their places."""

    def __init__(
        self, wte: nn.Module, wpe: nn.Module, drop: nn.Module, carried: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop, self.carried = wte, wpe, drop, carried

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = x["input_ids"]
        places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        return {
            "hidden": self.drop(self.wte(ids) + self.wpe(places)),
            **{name: x[name] for name in self.carried},
        }


class Block(nn.Module):
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


class First(nn.Module):
    """The first token's vector."""

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return x["hidden"][:, 0]


class Last(nn.Module):
    """The last token's vector, normalised."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return last(self.norm(x["hidden"]), x["attention_mask"])


class OneToken(nn.Module):
    """A module that takes the first of many tokens, given one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x[:, None])
        return found


class Vocabulary(nn.Module):
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


class Whole(nn.Module):
    """A model that takes the tree by name, as one stage."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.model(**x).logits
        return found
