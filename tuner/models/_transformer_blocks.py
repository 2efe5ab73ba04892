"""The stages of a transformer of texts as modules: embeddings, blocks, and what selects tokens.

The stages pass on `hidden`, float (n, length, width), and its `attention_mask`, int64 (n, length).
The masks and rotations inside a block follow from the attention mask and from the index of a token.
So each stage computes them itself, as the model does. A model that predicts tokens also passes its
`input_ids` on, because its predictions are compared with them.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree


def select_last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The vector of each text's last token, (n, width), where padding is on the right."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), attention_mask.sum(1) - 1]


def count_positions(hidden: Tensor) -> Tensor:
    """The index of each token, int64 (1, length)."""
    return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)


class EmbeddingStage(nn.Module):
    """An encoder's embeddings, and what else the model owns before its blocks.

    Args:
        embeddings: The module of the embeddings.
        projection: The layer behind them, where the blocks are wider.
        block_inputs: Modules from which every block computes something, such as the table of
            relative positions. They belong to this stage and are used in the blocks too.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        projection: nn.Module | None = None,
        block_inputs: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.embeddings, self.projection, self.block_inputs = embeddings, projection, block_inputs
        self.takes_mask = "mask" in inspect.signature(embeddings.forward).parameters

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: tensor for name, tensor in x.items() if name != "attention_mask"}
        if self.takes_mask:
            inputs["mask"] = x["attention_mask"]
        hidden = self.embeddings(**inputs)
        if self.projection is not None:
            hidden = self.projection(hidden)
        return {"hidden": hidden, "attention_mask": x["attention_mask"]}


class TokenEmbeddingStage(nn.Module):
    """A decoder's embeddings of tokens, and of their positions where it has a table of these.

    `rotary` turns positions into rotations inside each block. It has no weights, and belongs here.
    """

    def __init__(
        self,
        tokens: nn.Module,
        positions: nn.Module | None,
        dropout: nn.Module | None,
        rotary: nn.Module | None,
        carried: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = tokens, positions, dropout
        self.rotary, self.carried_names = rotary, carried

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.tokens(x["input_ids"])
        if self.positions is not None:
            hidden = hidden + self.positions(count_positions(hidden))
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        return {"hidden": hidden, **{name: x[name] for name in self.carried_names}}


class TransformerBlock(nn.Module):
    """One block, with the mask and the rotation that transformers' own code gives it.

    Args:
        config: The model's configuration.
        layer: The block.
        causal: Whether a token sees only itself and those before it.
        layer_type: full_attention, or sliding_attention where a token sees only its neighbours.
        rotary: The model's module of rotations, which belongs to the first stage.
    """

    def __init__(
        self,
        config: Any,
        layer: nn.Module,
        *,
        causal: bool,
        layer_type: str = "full_attention",
        rotary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer, self.causal, self.layer_type = config, layer, causal, layer_type
        # for the digest of the block: the mask follows from it, and some layers do not keep it
        self.window = (
            getattr(config, "sliding_window", None) if layer_type == "sliding_attention" else None
        )
        self.rotary_holder = (rotary,)  # in a tuple, so that it does not become a child
        self.argument_names = set(inspect.signature(layer.forward).parameters)
        self.rotates_by_type = rotary is not None and (
            "layer_type" in inspect.signature(rotary.forward).parameters
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = x["hidden"]
        arguments: dict[str, Any] = {"attention_mask": self.make_mask(hidden, x["attention_mask"])}
        positions = count_positions(hidden)
        if self.rotary_holder[0] is not None:
            arguments["position_embeddings"] = self.rotate(hidden, positions)
        if "position_ids" in self.argument_names:
            arguments["position_ids"] = positions
        return {**x, "hidden": first_of(self.layer(hidden, **arguments))}

    def rotate(self, hidden: Tensor, positions: Tensor) -> Any:
        """Cosines and sines of the positions, as the layer takes them."""
        rotary = self.rotary_holder[0]
        assert rotary is not None
        return rotary(hidden, positions, *((self.layer_type,) if self.rotates_by_type else ()))

    def make_mask(self, hidden: Tensor, attention_mask: Tensor) -> Any:
        from transformers import masking_utils

        if hidden.is_meta:  # the values of its mask cannot be read, and nothing needs them
            return None
        is_sliding = self.layer_type == "sliding_attention"
        if not self.causal:
            make_mask: Any = (
                masking_utils.create_bidirectional_sliding_window_mask
                if is_sliding
                else masking_utils.create_bidirectional_mask
            )
            return make_mask(self.config, hidden, attention_mask)
        make_mask = (
            masking_utils.create_sliding_window_causal_mask
            if is_sliding
            else masking_utils.create_causal_mask
        )
        return make_mask(self.config, hidden, attention_mask, None, count_positions(hidden))


def first_of(output: Any) -> Tensor:
    """The hidden values that a layer gives, alone or before others."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class DebertaBlock(nn.Module):
    """One block of DeBERTa, with the relative positions that its encoder computes for all of them.

    The encoder's table of relative positions belongs to the first stage; the convolution beside the
    first block belongs to that block.
    """

    def __init__(self, encoder: Any, layer: nn.Module, conv: nn.Module | None) -> None:
        super().__init__()
        self.encoder_holder = (encoder,)  # in a tuple, so that it does not become a child
        self.layer, self.conv = layer, conv

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden, attention_mask = x["hidden"], x["attention_mask"]
        encoder = self.encoder_holder[0]
        output = first_of(
            self.layer(
                hidden,
                encoder.get_attention_mask(attention_mask),
                relative_pos=encoder.get_rel_pos(hidden, None, None),
                rel_embeddings=encoder.get_rel_embedding(),
            )
        )
        if self.conv is not None:
            output = self.conv(hidden, output, attention_mask)
        return {**x, "hidden": output}


class MpnetBlock(nn.Module):
    """One block of MPNet, with the bias of positions that its encoder computes for all of them."""

    def __init__(self, config: Any, encoder: Any, layer: nn.Module) -> None:
        super().__init__()
        self.encoder_holder = (encoder,)  # in a tuple, so that it does not become a child
        self.block = TransformerBlock(config, layer, causal=False)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = x["hidden"]
        mask = self.block.make_mask(hidden, x["attention_mask"])
        bias = self.encoder_holder[0].compute_position_bias(hidden)
        return {**x, "hidden": first_of(self.block.layer(hidden, mask, bias))}


class AlbertGroup(nn.Module):
    """Blocks of ALBERT that share their weights, one after the other."""

    def __init__(self, config: Any, group: nn.Module, projection: nn.Module | None, n: int) -> None:
        """`projection` is before the first block; `n` is the number of blocks."""
        super().__init__()
        self.projection, self.repeats = projection, n
        self.block = TransformerBlock(config, group, causal=False)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.projection is not None:
            x = {**x, "hidden": self.projection(x["hidden"])}
        for _ in range(self.repeats):
            x = self.block(x)
        return x


class FirstToken(nn.Module):
    """The first token's vector, normalised where the model has a norm behind its blocks."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        hidden = x["hidden"] if self.norm is None else self.norm(x["hidden"])
        return hidden[:, 0]


class MeanToken(nn.Module):
    """The mean of the normalised vectors of a text's tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        hidden, mask = self.norm(x["hidden"]), x["attention_mask"]
        mean: Tensor = (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return mean


class LastToken(nn.Module):
    """The last token's vector, normalised."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return select_last_token(self.norm(x["hidden"]), x["attention_mask"])


class AllTokens(nn.Module):
    """The vectors of all tokens, normalised where the model has a norm behind its blocks."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return x if self.norm is None else {**x, "hidden": self.norm(x["hidden"])}


class TokenHead(nn.Module):
    """Logits of each token, (n, length, classes), from its vector alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.inner(x["hidden"])
        return y


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

    def __init__(
        self, norm: nn.Module, projection: nn.Module, tied: bool, cap: float | None
    ) -> None:
        """`cap`: logits are bent into -cap..cap by a tanh, as in Gemma 2; None: they are not."""
        super().__init__()
        self.norm, self.cap = norm, cap
        self.used = (projection,)  # in a tuple, so that it does not become a child
        if not tied:
            self.projection = projection

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.used[0](self.norm(x["hidden"]))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class WholeModel(nn.Module):
    """A whole model as one stage; it takes the tensors of the tree by name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Tensor]) -> TensorTree:
        logits: Tensor = self.model(**x).logits
        return logits
