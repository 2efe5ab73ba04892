"""The next token of a text: cross-entropy, scored as perplexity's negative logarithm, told as continuations."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tuner.config.run import Recipe
from tuner.core.input_spec import InputSpec, TensorTree, TextInputSpec
from tuner.core.types import Batch, Dataset, Prediction, Task, relative_difference
from tuner.preprocessing.tokenization import decode_texts, load_tokenizer, trim_padding
from tuner.tasks._classification_reports import encode_csv

METRICS = ("negative_log_perplexity",)
IGNORED_TOKEN = -100  # the library's own mark of what is not to be predicted
MAX_WORST = 50  # texts listed
ROWS_PER_CHUNK = 8  # texts whose logits are held at once when scoring: (ROWS, length, vocabulary)


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    *,
    max_new_tokens: Annotated[
        int, Field(ge=1, le=10_000, description="how many tokens predict adds to a text at most")
    ] = 40,
    top_k: Annotated[
        int,
        Field(
            ge=1,
            le=100_000,
            description="each token is drawn from the likeliest so many; 1: always the likeliest",
        ),
    ] = 1,
    temperature: Annotated[
        float,
        Field(
            gt=0,
            le=100,
            description="below 1: likelier tokens are drawn more often; above 1: less often",
        ),
    ] = 1.0,
    seed: Annotated[
        int, Field(ge=0, le=2**32 - 1, description="of the tokens that predict draws")
    ] = 0,
) -> Task:
    """`top_k`: the next token is drawn from so many, by `seed`; 1 takes the likeliest."""
    return TextGeneration(recipe.label_smoothing, max_new_tokens, top_k, temperature, seed)


class TextGeneration(Task):
    """Nets give logits (n, length, vocabulary) for a tree that holds `input_ids` and `attention_mask` at every depth; y is not needed.

    Predictions are each text's `log_likelihood`, float32 (n,), summed over its `tokens`, int64 (n,), all but the first.
    """

    metrics = METRICS

    output_description = "logits of the next token at each token, (batch, length, vocabulary)"

    def __init__(
        self, label_smoothing: float, max_new_tokens: int, top_k: int, temperature: float, seed: int
    ) -> None:
        self.label_smoothing, self.max_new_tokens = label_smoothing, max_new_tokens
        self.top_k, self.temperature, self.seed = top_k, temperature, seed

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Mean over the tokens that follow another."""
        x = trim_padding(batch.x)
        logits = net(x)[:, :-1].float()
        return F.cross_entropy(
            logits.flatten(0, 1),
            next_token_targets(x).flatten(),
            ignore_index=IGNORED_TOKEN,
            label_smoothing=self.label_smoothing,
        )

    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        assert isinstance(x, dict)
        found, counts = [], []
        for start in range(0, len(x["input_ids"]), ROWS_PER_CHUNK):
            part = trim_padding(
                {name: leaf[start : start + ROWS_PER_CHUNK] for name, leaf in x.items()}
            )
            truth = next_token_targets(part)
            losses = F.cross_entropy(
                net(part)[:, :-1].float().transpose(1, 2),
                truth,
                ignore_index=IGNORED_TOKEN,
                reduction="none",
            )
            found.append(-losses.sum(1))
            counts.append((truth != IGNORED_TOKEN).sum(1))
        return {"log_likelihood": torch.cat(found), "tokens": torch.cat(counts)}

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """The mean log-likelihood of a token: minus the cross-entropy, minus perplexity's logarithm."""
        likelihood, tokens = _concatenate_pairs(pairs)
        return {
            "negative_log_perplexity": float(likelihood.double().sum() / tokens.sum().clamp(min=1))
        }

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """The texts that surprise the model most, per token, as it saw them."""
        likelihood, tokens = _concatenate_pairs(pairs)
        each = likelihood / tokens.clamp(min=1)
        worst = each.argsort(stable=True)[:MAX_WORST]
        texts = decode_texts(data.input_spec, data.valid.take(worst, 0).x)
        rows = [
            [f"{each[i]:.4f}", int(tokens[i]), text]
            for i, text in zip(worst.tolist(), texts, strict=True)
        ]
        return {"worst.csv": encode_csv(["log_likelihood_per_token", "tokens", "text"], rows)}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """Each text continued, token by token, until the model ends it or `max_new_tokens` are said."""
        assert isinstance(x, dict) and isinstance(input_spec, TextInputSpec)
        words = load_tokenizer(input_spec.tokenizer_folder)
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(x["input_ids"], x["attention_mask"], strict=True)
        ]
        told = []
        for prompt, said in zip(
            prompts,
            self._continue_texts(function, prompts, input_spec, words.eos_token_id),
            strict=True,
        ):
            text = words.decode(said, skip_special_tokens=True)
            told.append(
                Prediction(
                    text.replace("\n", "\\n"),
                    {"continuation": text, "prompt_tokens": len(prompt), "new_tokens": len(said)},
                )
            )
        return told

    def _continue_texts(
        self,
        function: Callable[[TensorTree], TensorTree],
        prompts: Sequence[list[int]],
        input_spec: TextInputSpec,
        end: int | None,
    ) -> list[list[int]]:
        """The ids that follow each prompt. An empty prompt begins after the end of another text."""
        generator = torch.Generator().manual_seed(self.seed)
        texts = [list(prompt) or [end or 0] for prompt in prompts]
        said: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        for _ in range(self.max_new_tokens):
            if not going:
                break
            tree, at = _pad_ids([texts[i][-input_spec.length :] for i in going])
            logits = function(tree)
            assert isinstance(logits, Tensor)
            chosen = self._draw_next(logits[torch.arange(len(going)), at].float(), generator)
            for i, token in zip(going, chosen, strict=True):
                said[i].append(token)
                texts[i].append(token)
            going = [i for i in going if said[i][-1] != end]
        return said

    def _draw_next(self, logits: Tensor, generator: torch.Generator) -> list[int]:
        """One id for each row of logits, (n, vocabulary)."""
        values, ids = logits.topk(min(self.top_k, logits.shape[1]))
        drawn = torch.multinomial((values / self.temperature).softmax(1), 1, generator=generator)
        return [int(i) for i in ids.gather(1, drawn)]


def next_token_targets(x: TensorTree) -> Tensor:
    """The token after each, int64 (n, length - 1); IGNORED where it is padding."""
    assert isinstance(x, dict)
    return x["input_ids"].masked_fill(x["attention_mask"] == 0, IGNORED_TOKEN)[:, 1:]


def _pad_ids(texts: Sequence[list[int]]) -> tuple[TensorTree, Tensor]:
    """Ids of several lengths as a tree, padded on the right to two tokens at least, and the place of each one's last."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.zeros(len(texts), max(2, int(lengths.max())), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
    return {"input_ids": ids, "attention_mask": mask}, lengths - 1


def _concatenate_pairs(pairs: Iterable[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    found = [predicted for predicted, _ in pairs]
    return torch.cat([part["log_likelihood"] for part in found]).cpu(), torch.cat(
        [part["tokens"] for part in found]
    ).cpu()
